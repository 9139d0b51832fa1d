# SPDX-License-Identifier: MIT
"""What benchmarks.gpu measures of whole models: a forward pass and a training step of ours, of eager PyTorch and of torch.compile."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import convmixer_kernels
from benchmarks import gpu_ops
from benchmarks import models as model_cases
from convmixer_kernels.testing import relative_error, within_twice_eager

if TYPE_CHECKING:
    from benchmarks.gpu import Run

#: Name, images of a batch.
MODELS = (("1536/20@224", 32), ("256/8@32", 256), ("768/32@224", 32))


def measure_model(run: Run, name: str, batch: int, layout: str, training: bool, backends: Sequence[str]) -> None:
    """Forward or training step of a published model in bfloat16, ours by backend, and eager."""
    reference_model, own, images = _models(name, batch)
    mode = "train" if training else "eval"
    row = {"case": f"model {name} {mode} batch {batch}", "dtype": "bfloat16", "layout": layout}
    for backend in (*backends, None):
        implementation = f"eager {layout}" if backend is None else gpu_ops.implementation_name(backend)
        problem = None if backend is None else _model_wrong(reference_model, own, images[:4], backend)
        if problem is not None:
            run.row({**row, "implementation": implementation, "ok": False, "error": problem})
            continue
        model = reference_model if backend is None else own
        model.to(memory_format=gpu_ops.LAYOUTS[layout])
        with _using(backend):
            found = _model_row(model, images, gpu_ops.LAYOUTS[layout], training)
        run.row({**row, "implementation": implementation, "ok": True, **found})


def compiled_model(run: Run, name: str, batch: int, training: bool) -> None:
    """torch.compile's row of the reference model, with its default options."""
    reference_model, _, images = _models(name, batch)
    mode = "train" if training else "eval"
    row = {"case": f"model {name} {mode} batch {batch}", "dtype": "bfloat16", "layout": "contiguous"}
    found = _model_row(torch.compile(reference_model), images, torch.contiguous_format, training)
    run.row({**row, "implementation": "torch.compile", "ok": True, **found})


def _models(name: str, batch: int) -> tuple[torch.nn.Sequential, torch.nn.Sequential, Tensor]:
    case = model_cases.CASES[name]
    generator = torch.Generator("cuda").manual_seed(0)
    images = torch.randn((batch, 3, case.image_size, case.image_size), generator=generator, device="cuda")
    reference_model = _reference_model(case, images[:8])
    return reference_model, model_cases.ours_like(case, reference_model), images


def _using(backend: str | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if backend is None else convmixer_kernels.use_backend(backend)


def _reference_model(case: model_cases.Case, images: Tensor) -> torch.nn.Sequential:
    """random_reference's weights, made on the GPU: on the CPU the largest model alone would take a minute."""
    with torch.device("cuda"):
        model = model_cases.random_reference(case, images)
    return model.to("cuda", torch.bfloat16)


def _model_wrong(eager_model: torch.nn.Module, own: torch.nn.Module, images: Tensor, backend: str) -> str | None:
    images = images.bfloat16()
    with torch.no_grad():
        theirs = eager_model.eval()(images)
        try:
            with _using(backend):
                mine = own.eval()(images)
        except gpu_ops.failures() as error:
            return str(error).splitlines()[0][:300]
        exact = eager_model.double()(images.double())
        eager_model.bfloat16()
    error, allowed = relative_error(mine, exact), relative_error(theirs, exact)
    if within_twice_eager(error, allowed, torch.bfloat16):
        return None
    return f"output: relative error {error:.2e}, eager's {allowed:.2e}"


def _model_row(model: torch.nn.Module, images: Tensor, memory_format: torch.memory_format, training: bool) -> dict:
    images = images.bfloat16().to(memory_format=memory_format)
    model.train(training)

    def call(i: int) -> None:
        if training:
            model.zero_grad(set_to_none=True)
            model(images).float().square().mean().backward()
        else:
            with torch.no_grad():
                model(images)

    stream = torch.cuda.Stream()
    try:
        # a backward captured into a graph must have been warmed up on a side stream
        with torch.cuda.stream(stream):
            call(0)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        called = gpu_ops.measure(call, 0.3, capture=False)
        peak = torch.cuda.max_memory_allocated()
        # where a call takes a tenth of a second, launches do not count, and a graph would take the run's time
        timing = gpu_ops.measure(call, 0.5) if called["median_us"] < 1e5 else called
    except gpu_ops.failures() as error:
        torch.cuda.synchronize()
        return {"error": str(error).splitlines()[0][:200]}
    # what a program sees that calls the model, launches included
    timing = {**timing, "called_us": called["median_us"]}
    return {**timing, "images_per_s": 1e6 * images.shape[0] / timing["median_us"], "peak_bytes": peak}
