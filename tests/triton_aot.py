# SPDX-License-Identifier: MIT
"""Compiles the kernels that the Triton backend launches, for GPUs that need not be here: python tests/triton_aot.py sm_90 > report.json

The backend's own primitives run on meta tensors; each launch is recorded instead of run, once for each configuration in
the tables, and compiled for the target. The report gives registers, stack, shared memory, tensor-core and spill instructions.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from convmixer_kernels.backends import triton as backend
from convmixer_kernels.primitives import Norm
from convmixer_kernels.triton_kernels import config, tuning

TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "small": 120}
#: Bytes of shared memory that a block may have.
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "small": 99 << 10}
#: Lists of kernels that are products on tensor cores.
PRODUCTS = ("pointwise", "depthwise_toeplitz")
TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA")
_TYPES = {torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


class Launch:
    """One launch: the kernel, its arguments by name, and the list and configuration that it came from."""

    def __init__(self, kernel: JITFunction, positional: tuple, keywords: dict) -> None:
        self.kernel = kernel
        self.options = {
            name: keywords.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in keywords
        }
        self.arguments = dict(zip(kernel.arg_names, positional, strict=False)) | keywords
        self.case, self.list_name, self.index = "", "", 0

    def source(self) -> ASTSource:
        constants = {p.name for p in self.kernel.params if p.is_constexpr}
        signature, constexprs, aligned = {}, {}, {}
        for position, name in enumerate(self.kernel.arg_names):
            value = self.arguments[name]
            if value is None or name in constants:
                signature[name], constexprs[(position,)] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[name], aligned[(position,)] = _TYPES[value.dtype], [["tt.divisibility", 16]]
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
        return ASTSource(fn=self.kernel, signature=signature, constexprs=constexprs, attrs=aligned)

    @property
    def identity(self) -> str:
        shown = {k: str(v.dtype) if isinstance(v, Tensor) else v for k, v in self.arguments.items()}
        varying = {p.name for p in self.kernel.params if p.do_not_specialize}
        shown = {k: v for k, v in shown.items() if k not in varying or v is None}
        return f"{self.kernel.__name__} {shown} {self.options}"


def _catch(generation: str, every: bool, call: Callable[[], object]) -> list[Launch]:
    """The launches of `call` on a GPU of this generation, with the default or with every configuration."""
    caught: list[Launch] = []

    def run(kernel, *arguments, grid, warmup, **keywords):
        caught.append(Launch(kernel, arguments, keywords))

    def choose(kernel, key, device, launch, last=None):
        result = None
        for index, candidate in enumerate(config.candidates(kernel, generation)):
            if every or index == 0:
                first = len(caught)
                given = (launch if last is None else last)(candidate)
                result = given if index == 0 else result
                for item in caught[first:]:
                    item.list_name, item.index = kernel, index
        return result

    saved = JITFunction.run, tuning.run, tuning.processors
    JITFunction.run, tuning.run, tuning.processors = run, choose, lambda device: 132
    try:
        call()
    finally:
        JITFunction.run, tuning.run, tuning.processors = saved
    return caught


def _tensors(dtype: torch.dtype, channels: int, size: int, channels_last: bool) -> tuple[Tensor, Norm, tuple]:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(64, channels, size, size, dtype=dtype, device="meta").to(memory_format=memory_format)
    vector = torch.empty(channels, device="meta")
    return x, Norm(vector, vector, vector.to(dtype), vector.to(dtype), 1e-5), (vector, vector)


def _depthwise(dtype, k, channels_last=False, size=32):
    x, norm, sums = _tensors(dtype, 1536, size, channels_last)
    weight, bias = torch.empty(1536, 1, k, k, dtype=dtype, device="meta"), norm.bias
    yield True, f"eval k{k}", lambda: backend.depthwise_eval(x, weight, bias, "gelu", norm, True)
    yield False, f"train k{k}", lambda: backend.depthwise_train(x, weight, bias, "gelu")
    yield (
        False,
        f"input grad k{k}",
        lambda: backend.depthwise_input_grad(x, x, weight, "gelu", norm, sums, True),
    )
    yield (
        True,
        f"weight grad k{k}",
        lambda: backend.depthwise_weight_grad(x, x, x, weight, bias, "gelu", norm, sums),
    )
    yield (
        k == 9,
        f"block backward k{k}",
        lambda: backend.depthwise_block_backward(x, x, x, weight, bias, "gelu", norm, True, True, (True,) * 5),
    )


def _convolution(dtype, kernel, dilation, channels_last=False):
    x, _, _ = _tensors(dtype, 768, 56, channels_last)
    weight, plain = torch.empty(768, 1, *kernel, dtype=dtype, device="meta"), ("identity", None)
    name = f"k{kernel[0]}x{kernel[1]} d{dilation[0]}x{dilation[1]}"
    yield False, f"eval {name}", lambda: backend.depthwise_eval(x, weight, None, *plain, False, dilation)
    yield (
        False,
        f"weight grad {name}",
        lambda: backend.depthwise_weight_grad(x, None, x, weight, None, *plain, None, dilation),
    )


def _pointwise(dtype, channels_last=False, channels=1536):
    x, norm, sums = _tensors(dtype, channels, 32, channels_last)
    weight, bias, needs = torch.empty(channels, channels, 1, 1, dtype=dtype, device="meta"), norm.bias, (True,) * 3
    yield True, "eval", lambda: backend.pointwise_eval(x, weight, bias, "gelu", norm)
    yield False, "train", lambda: backend.pointwise_train(x, weight, bias, "gelu")
    yield (
        channels > 128,
        "backward",
        lambda: backend.pointwise_backward(x, x, x, weight, bias, "gelu", norm, sums, needs),
    )
    yield (
        False,
        "block backward",
        lambda: backend.pointwise_block_backward(x, x, x, weight, bias, "gelu", norm, True, False, (True,) * 5),
    )


def _batch_norm(dtype, channels_last=False):
    x, norm, _ = _tensors(dtype, 1536, 32, channels_last)
    yield True, "normalize", lambda: backend.normalize(x, "gelu", norm, x)
    yield True, "norm backward", lambda: backend.norm_backward(x, x, "gelu", norm)


def cases() -> Iterator[tuple[bool, str, Callable[[], object]]]:
    """(whether every configuration is compiled or only the default, name, call that launches it) of each case."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    groups = [
        ("depthwise bfloat16 contiguous", _depthwise(bf16, 9)),
        ("depthwise bfloat16 channels_last", _depthwise(bf16, 9, True)),
        ("depthwise float32 contiguous", _depthwise(fp32, 9)),
        ("pointwise bfloat16 contiguous", _pointwise(bf16)),
        ("pointwise bfloat16 channels_last", _pointwise(bf16, True)),
        ("pointwise float16 channels_last fused", _pointwise(fp16, True, 128)),
        ("pointwise bfloat16 contiguous fused", list(_pointwise(bf16, False, 128))[2:]),
        ("pointwise float32 contiguous", _pointwise(fp32)),
        ("pointwise float32 channels_last", _pointwise(fp32, True)),
        ("batch norm bfloat16 contiguous", _batch_norm(bf16)),
        ("batch norm bfloat16 channels_last", _batch_norm(bf16, True)),
        ("depthwise float16 contiguous", _depthwise(fp16, 31, size=56)),
        ("depthwise float16 contiguous", _convolution(fp16, (63, 63), (1, 1))),
        ("depthwise float16 contiguous", _convolution(fp16, (7, 7), (3, 3))),
        ("depthwise float16 channels_last", _convolution(fp16, (51, 5), (1, 1), True)),
        ("depthwise float32 contiguous", _convolution(fp32, (7, 7), (3, 3))),
    ]
    for group, members in groups:
        for every, name, call in members:
            yield every, f"{group}: {name}", call


def launches(generation: str) -> list[Launch]:
    """The launches that are compiled for a generation, each once."""
    found: dict[str, Launch] = {}
    for every, name, call in cases():
        for item in _catch(generation, every, call):
            item.case = name
            found.setdefault(item.identity, item)
    return list(found.values())


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def compile_one(item: Launch, capability: int, wants_code: bool) -> dict[str, object]:
    """Compile for the target and read the resources, and with `wants_code` count instructions, else 0."""
    start = time.monotonic()
    compiled = triton.compile(item.source(), target=GPUTarget("cuda", capability, 32), options=item.options)
    seconds = time.monotonic() - start
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        environment = os.environ | {"PATH": f"{Path(_tool('cuobjdump')).parent}:{os.environ['PATH']}"}
        # a listing of the code takes longer than the compilation of a small kernel
        flags = ["-res-usage", "-sass"] if wants_code else ["-res-usage"]
        command = [_tool("cuobjdump"), *flags, file.name]
        listing = subprocess.run(command, capture_output=True, text=True, env=environment).stdout
    resources = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", listing)
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", listing, re.M)
    counted = {
        name: instructions.count(name) for name in (*TENSOR_CORES, "LDL", "STL", "LDGSTS", "LDG", "FFMA", "FMUL")
    }
    return {
        "case": item.case,
        "kernel": item.kernel.__name__,
        "list": item.list_name,
        "index": item.index,
        "options": item.options,
        "seconds": round(seconds, 2),
        "registers": int(resources[1]),
        "stack": int(resources[2]),
        "local": int(resources[4]),
        "shared": compiled.metadata.shared,
        "instructions": len(instructions),
        **counted,
    }


def _line(row: dict[str, object]) -> str:
    cells = [f"{row['seconds']:5.1f} s", f"{row['registers']:3} registers", f"{row['stack']:4} stack"]
    cells += [f"{row['shared']:6} shared", f"{row['instructions']:5} instructions"]
    cells += [f"{sum(row[name] for name in TENSOR_CORES):3} products", f"{row['LDL']:3} LDL"]
    return ", ".join(cells) + f"  {row['kernel']} {row['list']}[{row['index']}] {row['case']}"


def main() -> int:
    generation = sys.argv[1]
    report = []
    for item in launches(generation):
        wants_code = "-v" in sys.argv or item.list_name.startswith(PRODUCTS) or item.list_name == "depthwise_fma"
        report.append(compile_one(item, TARGETS[generation], wants_code))
        if "-v" in sys.argv:
            print(_line(report[-1]), file=sys.stderr, flush=True)
    json.dump(report, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
