# SPDX-License-Identifier: MIT
"""python -m tests.fuzz --wrong: one random wrong argument in a good call of an operator, public or registered.

The call must raise TypeError, ValueError, RuntimeError or NotImplementedError with a message that starts with the operator's name,
before any primitive of a backend runs, and must leave every tensor as it was: values, version, memory.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from fuzz import device_of, laid_out, prepared
from helpers import BLOCK_TENSORS
from torch import Tensor

import convmixer_kernels as ck
from convmixer_kernels import dispatch

OPERATORS = {
    "depthwise_conv2d": BLOCK_TENSORS[:2],
    "depthwise_block": BLOCK_TENSORS,
    "pointwise_block": BLOCK_TENSORS,
    "mixer_layer": tuple(f"{half}_{name}" for half in ("depthwise", "pointwise") for name in BLOCK_TENSORS),
}
ERRORS = (TypeError, ValueError, RuntimeError, NotImplementedError)
N, C, OUT, H, W = 2, 8, 6, 5, 4


def _freed(t: Tensor, left: int) -> Tensor:
    t.detach().untyped_storage().resize_(left)
    return t


def _reach(t: Tensor) -> int:
    """The bytes of its storage that t needs."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return (t.storage_offset() + last + 1) * t.itemsize


def _wrong_dtype(t: Tensor, x: Tensor) -> list[torch.dtype]:
    """Dtypes that neither are x's nor float32 beside a 16-bit x."""
    all_of_them = [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint8]
    if t is x:
        return all_of_them
    floats = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    narrow = x.dtype in (torch.float16, torch.bfloat16)
    return all_of_them + [f for f in floats if f != x.dtype and not (narrow and f == torch.float32)]


#: Wrong values for a tensor argument; they get a random number generator, the tensor and x.
TENSORS: dict[str, Callable[[random.Random, Tensor, Tensor], Any]] = {
    "no tensor": lambda rng, t, x: rng.choice(
        (t.tolist(), 1.0, "x", object(), t.float().cpu().numpy(), torch.Size([8]), (t,))
    ),
    "dtype": lambda rng, t, x: t.to(rng.choice(_wrong_dtype(t, x))),
    "one dimension more": lambda rng, t, x: t.unsqueeze(rng.randrange(t.dim() + 1)),
    "one dimension less": lambda rng, t, x: t[0],
    "more channels": lambda rng, t, x: torch.cat([t, t], 1 if t is x else 0),
    "fewer channels": lambda rng, t, x: t[:, :-1] if t is x else t[:-1],
    "no element": lambda rng, t, x: t[:, :, :0] if t is x else t[:0],
    "meta": lambda rng, t, x: t.to("meta"),
    "sparse": lambda rng, t, x: t.float().to_sparse().to(t.dtype),
    "mkldnn": lambda rng, t, x: t.float().cpu().to_mkldnn(),
    "nested": lambda rng, t, x: torch.nested.nested_tensor([t[0], t[0]] if t.dim() > 1 else [t, t]),
    "freed": lambda rng, t, x: _freed(t, 0),
    "shrunk": lambda rng, t, x: _freed(t, rng.randrange(1, _reach(t))),
}
_NUMBERS = (
    "0.1",
    None,
    1j,
    True,
    10**400,
    -(10**400),
    math.nan,
    math.inf,
    -math.inf,
    Fraction(10**400),
    np.array([0.1]),
    [0.1],
)
#: Wrong values for an option.
OPTIONS: dict[str, tuple] = {
    "training": (1, 0, None, "yes", np.True_, torch.tensor(True), 0.0),
    "residual": (1, 0, None, "yes", np.True_, torch.tensor(True)),
    "momentum": (*_NUMBERS, torch.tensor([0.1])),
    "eps": (*_NUMBERS, -1.0, -1e-30, torch.tensor([1e-5])),
    "activation": ("swish", "GELU", "", None, 3, b"gelu", ["gelu"], torch.nn.functional.gelu, np.array(["gelu"])),
    "dilation": (0, -1, True, 1.0, None, "2", (), (1,), (1, 0), (2, 2, 2), (True, 1), [1.0, 1], torch.tensor([1, 1])),
    "backend": ("tpu", "CPU", "", 1, b"cpu", ["cpu"], "automatic", torch.device("cpu")),
}


def _arguments(rng: random.Random, op: str, backend: str) -> dict[str, Any]:
    """Good arguments of the public operator by name."""
    # triton's interpreter computes bfloat16 wrongly
    dtype = rng.choice((torch.float32, torch.float16) + (torch.bfloat16,) * (backend != "triton"))
    parameters = torch.float32 if rng.random() < 0.5 else dtype
    g = torch.Generator().manual_seed(rng.randrange(1 << 30))

    def normal(*shape: int, dtype: torch.dtype = parameters) -> Tensor:
        t = torch.randn(*shape, generator=g).to(dtype).to(device_of(backend))
        return laid_out(t, rng.choice(("contiguous", "contiguous", "offset", "strided")))

    def block(first: bool) -> list[Tensor]:
        c = C if first else OUT
        weight = normal(C, 1, rng.choice((1, 2, 3)), rng.choice((1, 3))) if first else normal(OUT, C, 1, 1)
        return [weight, *(normal(c) for _ in range(4)), normal(c).abs() + 0.5]

    depthwise, pointwise = block(True), block(False)
    made = {"pointwise_block": pointwise, "mixer_layer": depthwise + pointwise}.get(op, depthwise)
    x = laid_out(normal(N, C, H, W, dtype=dtype), rng.choice(("contiguous", "channels_last", "sliced")))
    arguments = {"x": x, **dict(zip(OPERATORS[op], made, strict=False))}
    if rng.random() < 0.5:
        for name, t in arguments.items():
            t.requires_grad_("running" not in name)
    options = {"training": rng.random() < 0.5, "momentum": 0.1, "eps": 1e-5, "activation": "gelu"}
    options |= {"residual": True} if op == "depthwise_block" else {}
    options = {"dilation": rng.choice((1, 2, (1, 3)))} if op == "depthwise_conv2d" else options
    return arguments | options | {"backend": backend}


def _break(rng: random.Random, op: str, arguments: dict[str, Any]) -> str:
    """Makes one argument wrong in place. Returns what it did."""
    statistics = [name for name in arguments if "running" in name]
    special = ["None"]
    if statistics:
        special += ["one statistic", "statistics in eval", "gradient of a statistic", "one value a channel", "eps of 0"]
    kind = rng.choice(["tensor"] * 8 + ["option"] * 4 + special)
    if kind == "tensor":
        name = rng.choice([n for n, value in arguments.items() if isinstance(value, Tensor)])
        how = rng.choice(list(TENSORS))
        with torch.no_grad():
            arguments[name] = TENSORS[how](rng, arguments[name], arguments["x"])
        return f"{name}: {how}"
    if kind == "option":
        name = rng.choice([n for n in arguments if n in OPTIONS])
        arguments[name] = rng.choice(OPTIONS[name])
        return f"{name}={arguments[name]!r}"
    name = rng.choice(statistics) if statistics else ""
    if kind == "None":
        name = rng.choice(["x"] + [n for n in arguments if n.endswith("weight") and "norm" not in n])
        arguments[name] = None
    elif kind == "one statistic":
        arguments[name] = None
    elif kind == "statistics in eval":
        arguments |= {
            "training": False,
            name: None,
            name.replace("mean", "var"): None,
            name.replace("var", "mean"): None,
        }
    elif kind == "gradient of a statistic":
        arguments[name].requires_grad_()
    elif kind == "one value a channel":
        arguments |= {"x": arguments["x"].detach()[:1, :, :1, :1], "training": True}
    else:
        arguments |= {"eps": 0.0, "training": True}
    return f"{kind} {name}"


def _has_memory(t: Any) -> bool:
    return isinstance(t, Tensor) and t.layout == torch.strided and not t.is_nested and t.device.type != "meta"


def _state(tensors: list[Tensor]) -> list[tuple]:
    """What must not change: bits, version and memory of each tensor, those of a freed one without its bits."""
    told = []
    for t in tensors:
        storage = t.untyped_storage()
        bits = torch.tensor([], dtype=torch.uint8, device=t.device).set_(storage).cpu().clone()
        told.append(
            (bits, t._version, storage.data_ptr(), storage.nbytes(), t.shape, t.stride(), t.dtype, t.requires_grad)
        )
    return told


def _registered(op: str, arguments: dict[str, Any]) -> tuple:
    """The arguments of torch.ops.convmixer.<op>, which takes no running statistics in training and no momentum."""
    names = OPERATORS[op]
    if op == "depthwise_conv2d":
        return (arguments["x"], *(arguments[n] for n in names), [1, 1], arguments["backend"])
    parameters = [arguments[n] for n in names if "running" not in n]
    used = [None if arguments["training"] is True else arguments[n] for n in names if "running" in n]
    options = [arguments["training"], arguments["eps"], arguments["activation"], op != "pointwise_block", True]
    return (arguments["x"], *parameters, *used, *options, arguments["backend"])


def check(seed: int, number: int, backend: str) -> str | None:
    """None, or what is wrong about the error of this case."""
    rng = random.Random(f"wrong {seed} {number}")
    op = rng.choice(list(OPERATORS))
    arguments = _arguments(rng, op, backend)
    good = [t for t in arguments.values() if isinstance(t, Tensor)]
    done = _break(rng, op, arguments)
    tensors = good + [t for t in arguments.values() if _has_memory(t)]
    before = _state(tensors)
    # a registered operator has no momentum, and statistics only in eval; the dispatcher itself refuses what is no tensor
    if rng.random() < 0.25 and any(
        done.endswith(how) for how in ("dimension more", "dimension less", "channels", "meta", "freed", "shrunk")
    ):
        registered = "running" not in done or arguments.get("training") is False
    else:
        registered = False
    ran: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for module in map(dispatch.load, dispatch.BACKENDS):
            for name in PRIMITIVES:
                if hasattr(module, name):
                    patch.setattr(
                        module, name, lambda *_, name=name: ran.append(name) or (_ for _ in ()).throw(_Ran(name))
                    )
        told = f"{'torch.ops.convmixer.' if registered else ''}{op} with {done}"
        try:
            if registered:
                getattr(torch.ops.convmixer, op)(*_registered(op, arguments))
            else:
                getattr(ck, op)(**arguments)
        except _Ran:
            return f"{told}: {ran} ran"
        except ERRORS as error:
            if not str(error).startswith(f"{op}: "):
                return f"{told}: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
        else:
            return f"{told}: no error"
    for i, (old, new) in enumerate(zip(before, _state(tensors), strict=True)):
        if old[1:] != new[1:] or not torch.equal(old[0], new[0]):
            return f"{told}: changed tensor {i}"
    return None


class _Ran(BaseException):
    """A primitive was called."""


PRIMITIVES = [n for n, f in vars(dispatch.load("reference")).items() if callable(f) and n in vars(dispatch.load("cpu"))]
PRIMITIVES = [
    n for n in (*PRIMITIVES, "mixer_eval") if n.startswith(("depthwise_", "pointwise_", "norm", "mixer_eval"))
]


def run_case(seed: int, number: int, backend: str) -> str | None:
    """None, or why the case failed."""
    with prepared(backend):
        try:
            return check(seed, number, backend)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
