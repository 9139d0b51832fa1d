# SPDX-License-Identifier: MIT
"""Weights of a ConvMixer from a file or a state_dict, and back: the paper's keys and timm's, torch.save's files and safetensors.

    the paper's keys     0. 2.      3.0.fn.0.weight          3.1.  3.3.          {depth + 5}.
    timm's keys          stem.      blocks.0.0.fn.0.weight   blocks.0.1.  ...    head.

Nothing in a file runs, and no memory is allocated for a tensor before the file has been found to hold it (_torch_file.py).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from convmixer_kernels.recognize import activation_name

from ._torch_file import StoredTensor, TorchFile
from .presets import PUBLISHED_FILES, Preset
from .reference import ACTIVATIONS

#: Forms of the keys.
FORMS = ("paper", "timm")
#: Where training programs put a state_dict, moving averages first. Ours: state_dict, state_dict_ema.
_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_WEIGHTS = ("state_dict", "model_state_dict", "model", "module", "net", "weights")
#: What wrappers put into a key: nn.DataParallel, DDP and AveragedModel; torch.compile; FSDP; activation checkpointing.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
#: Key of what a file of `save` tells beside its tensors.
INFO = "convmixer"
_COUNTER = "num_batches_tracked"
_MOST_LAYERS = 4096
_TOLD = ("activation", "image_size", "mean", "std", "crop", "classes")


class _Entry(NamedTuple):
    """A tensor that has not been read yet."""

    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[], Tensor]


def load(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    activation: str | None = None,
    ema: bool = True,
) -> nn.Sequential:
    """A ConvMixer with the weights of a file or a state_dict, on the CPU, in evaluation mode and in the dtypes that were saved.

    Equivalent to, with sizes read from the tensors:

        model = ConvMixer(dim, depth, kernel_size, patch_size, n_classes, in_chans=in_chans, activation=activation)
        model.load_state_dict(state_dict)
        model.eval()

    Args:
        source: a file of torch.save (the published ``.pth.tar`` too) or ``.safetensors``, or what torch.load returned. It has the
            keys of the paper's code or timm's, also with the prefixes of DDP, torch.compile, FSDP and AveragedModel, and also
            inside a training checkpoint (``state_dict``, ``model``, ``state_dict_ema``, ...).
        activation: "gelu" (exact erf: the paper's code), "gelu_tanh", "relu" (the published 768/32) or "identity". Tensors do not
            tell it: it may be left out only for a file of :func:`save` or of convmixer.train, and for the three published files
            under their published names.
        ema: take the moving average of the weights if the file has it beside the weights.

    Also not told by tensors, and so taken as in the paper's code: zero padding "same" and batch norm's eps of 1e-5.

    Returns:
        As :func:`convmixer.ConvMixer`; call ``.train()`` to go on training.

    Raises:
        OSError: there is no such file.
        ValueError: it is not a checkpoint (the message says what it looks like), it is truncated, it names code, its activation is
            not known, or its tensors are not those of a ConvMixer (the message names each key).
        TypeError: `source` is neither a path nor a mapping.
        ImportError: a ``.safetensors`` file without the package safetensors.
    """
    return load_with_preset(source, activation=activation, ema=ema)[0]


def load_with_preset(
    source: str | os.PathLike[str] | Mapping[str, Any], *, activation: str | None = None, ema: bool = True
) -> tuple[nn.Sequential, Preset]:
    """As :func:`load`, and what is known of the architecture, of its images and of its classes."""
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"load: activation must be one of {', '.join(ACTIVATIONS)}, got activation={activation!r}")
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        with ExitStack() as stack, _told_of(path):
            content, entry_of, limit = _open(path, stack)
            return _build(content, entry_of, limit, activation, ema, path.name)
    if not isinstance(source, Mapping):
        raise TypeError(f"load: source must be a path or a state_dict, got {type(source).__name__}")
    with _told_of("the state_dict"):
        return _build(source, _entry_of_tensor, None, activation, ema, "")


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    form: str = "paper",
    preset: Preset | None = None,
) -> None:
    """Write the weights of a ConvMixer, with what :func:`load` cannot see in them, its activation.

    The file appears complete or not at all. It is ``{"state_dict": ..., "convmixer": {"activation": ...}}`` by torch.save, which
    timm's and the paper's programs read as they are, or, if `path` ends in ``.safetensors``, a file of that format.

    Args:
        model: of :func:`convmixer.ConvMixer`, the paper's code or timm, also inside DDP, torch.compile or AveragedModel.
        path: the file; one that exists is replaced.
        form: of the keys, "paper" or "timm".
        preset: normalisation, crop and names of classes, which are written too.

    Raises:
        ValueError: unknown `form`, or the model is not a ConvMixer; the message says why.
        OSError: the file cannot be written.
        ImportError: ``.safetensors`` without the package safetensors.
    """
    if form not in FORMS:
        raise ValueError(f"save: form must be one of {', '.join(FORMS)}, got form={form!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"save: model must be an nn.Module, got {type(model).__name__}")
    activation = activation_of(model)
    with _told_of("the model", "save"):
        entries, _ = _entries(model.state_dict(), _entry_of_tensor, None, ema=True)
        inferred = _infer(entries)
        _check(entries, dataclasses.replace(inferred, activation=activation))
    state = {
        (key if form == "paper" else _timm_key(key, inferred.depth)): entry.read() for key, entry in entries.items()
    }
    write_state(path, state, info_of(preset, activation))


def info_of(preset: Preset | None, activation: str) -> dict[str, Any]:
    """What a file tells beside its tensors."""
    told = {} if preset is None else {name: getattr(preset, name) for name in _TOLD if getattr(preset, name)}
    told = {name: list(value) if isinstance(value, tuple) else value for name, value in told.items()}
    return {**told, "activation": activation}


def write_state(path: str | os.PathLike[str], state: dict[str, Tensor], info: dict[str, Any]) -> None:
    if Path(path).suffix == ".safetensors":
        data = _require_safetensors().save(state, metadata={"format": "pt", INFO: json.dumps(info)})
        write_atomically(path, lambda file: file.write(data))
    else:
        write_atomically(path, lambda file: torch.save({"state_dict": state, INFO: info}, file))


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """A file that is complete or not there, after a kill or a power cut too: written beside `path`, synced, then renamed."""
    path = Path(path)
    # always the same name: what a kill leaves is replaced the next time
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    # the rename itself, where the file system can: the file is complete in any case
    with suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def activation_of(model: nn.Module) -> str:
    """The one activation of a model's mixer layers, or of its stem if it has none.

    Raises:
        ValueError: it has none that is known, or several.
    """
    names = {
        activation_name(sequence[at + 1])
        for sequence in model.modules()
        if isinstance(sequence, nn.Sequential)
        for at in range(len(sequence) - 1)
        if isinstance(sequence[at], nn.Conv2d) and isinstance(sequence[at + 1], nn.Module)
    }
    if len(names) != 1 or None in names:
        found = ", ".join(sorted(map(str, names))) or "no convolution with an activation"
        raise ValueError(
            f"save: model must be a ConvMixer with one activation of {', '.join(ACTIVATIONS)}, got {found}"
        )
    (name,) = names
    assert name is not None
    return name


@contextmanager
def _told_of(subject: object, caller: str = "load") -> Iterator[None]:
    """Puts the name of the file before what is wrong with it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{caller}: {subject} {error}") from error


def _open(path: Path, stack: ExitStack) -> tuple[Any, Callable[[Any], _Entry | None], int]:
    """The content of a file, what makes an entry of a leaf of it, and the file's size in bytes."""
    if path.is_dir():
        raise IsADirectoryError(f"load: {path} is a folder, not a checkpoint")
    with open(path, "rb") as file:
        start = file.read(512)
    size = os.path.getsize(path)
    (length,) = struct.unpack("<Q", start[:8].ljust(8, b"\0"))
    if start[8:9] == b"{" and length <= size - 8:
        return (*_open_safetensors(path, stack), size)
    if path.suffix == ".safetensors":
        _refuse_if_known(start)
        raise ValueError(f"is truncated, or no safetensors file: its header claims {length} bytes, the file has {size}")
    if not start.startswith((b"PK\x03\x04", b"\x80\x02")):
        _refuse_if_known(start)
        raise ValueError(f"is not a file of torch.save or safetensors: it starts with {start[:16]!r}")
    stored = stack.enter_context(TorchFile(path))

    def entry_of(leaf: Any) -> _Entry | None:
        if not isinstance(leaf, StoredTensor):
            return None
        nbytes = leaf.dtype.itemsize * torch.Size(leaf.shape).numel()
        return _Entry(leaf.shape, nbytes, lambda: stored.read(leaf))

    return stored.content, entry_of, size


def _refuse_if_known(start: bytes) -> None:
    text = start.lstrip().lower()
    if not start:
        raise ValueError("is empty")
    if text.startswith(b"version https://git-lfs"):
        raise ValueError("is a Git LFS pointer, not the file itself: fetch it with git lfs pull")
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ValueError("is a web page, not a checkpoint: download the file itself")
    if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        raise ValueError("is a compressed file: unpack it first")
    if start.startswith(b"\x80"):
        raise ValueError("is a pickle that torch.save did not write: this reads tensors and runs no code")
    if start[257:262] == b"ustar":
        raise ValueError("is a tar archive, as torch.save wrote them before version 0.1.10: save it again")
    if all(byte >= 32 or byte in b"\t\n\r" for byte in start):
        raise ValueError("is a text file, not a checkpoint")


def _require_safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("a .safetensors file needs the package safetensors: pip install '.[train]'") from error
    return safetensors.torch


def _open_safetensors(path: Path, stack: ExitStack) -> tuple[Any, Callable[[Any], _Entry | None]]:
    package = _require_safetensors()
    try:
        file = stack.enter_context(package.safe_open(path, framework="pt", device="cpu"))
        told = json.loads((file.metadata() or {}).get(INFO, "{}"))
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, no mapping
    except OSError:
        raise
    except Exception as error:  # SafetensorError is an Exception of its own; JSON raises ValueError
        raise ValueError(f"is truncated, or no safetensors file: {error}") from error

    def entry_of(name: Any) -> _Entry | None:
        # the library has compared sizes and offsets with the file
        return _Entry(shapes[name], 0, lambda: file.get_tensor(name)) if name in shapes else None

    return {"state_dict": {name: name for name in shapes}, INFO: told}, entry_of


def _entry_of_tensor(value: Any) -> _Entry | None:
    if not isinstance(value, Tensor):
        return None

    def read() -> Tensor:
        tensor = value.detach()
        full = getattr(tensor, "full_tensor", None)  # of a DTensor
        return (tensor if full is None else full()).to("cpu", copy=True).contiguous()

    return _Entry(tuple(value.shape), value.numel() * value.element_size(), read)


def _build(
    content: Any,
    entry_of: Callable[[Any], _Entry | None],
    limit: int | None,
    activation: str | None,
    ema: bool,
    name: str,
) -> tuple[nn.Sequential, Preset]:
    entries, told = _entries(content, entry_of, limit, ema)
    preset = _complete(_infer(entries), told, activation, name)
    _check(entries, preset)
    # on the device "meta": no memory and no random weights for what is replaced
    model = preset.build(device="meta")
    state = {key: entry.read() for key, entry in entries.items()}
    for key, tensor in model.state_dict().items():
        if key not in state:
            state[key] = torch.zeros((), dtype=tensor.dtype)
    for key, tensor in state.items():
        if key.endswith(_COUNTER) != (not tensor.is_floating_point()):
            raise ValueError(f"is not a ConvMixer's: {key} has dtype {tensor.dtype}")
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval(), preset


def _entries(
    content: Any, entry_of: Callable[[Any], _Entry | None], limit: int | None, ema: bool
) -> tuple[dict[str, _Entry], dict[str, Any]]:
    """The tensors under the paper's keys, and what the file tells beside them.

    Raises:
        ValueError: there are none, or they need more bytes than `limit`.
    """
    told: dict[str, Any] = {}
    for _ in range(8):  # wrappers inside wrappers
        if not isinstance(content, Mapping):
            raise ValueError(f"holds a {type(content).__name__}, not a state_dict")
        if isinstance(content.get(INFO), Mapping):
            told = dict(content[INFO])
        names = (*_AVERAGES, *_WEIGHTS) if ema else (*_WEIGHTS, *_AVERAGES)
        inner = next((content[name] for name in names if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        content = inner
    found = {}
    for key, leaf in content.items():
        entry = entry_of(leaf) if isinstance(key, str) else None
        if entry is not None:
            found[".".join(part for part in key.split(".") if part not in _WRAPPERS)] = entry
    found.pop("n_averaged", None)  # of AveragedModel
    if not found:
        raise ValueError(f"holds no tensors by name: its keys are {_listed(map(str, content))}")
    while len(tops := {key.partition(".")[0] for key in found}) == 1 and all("." in key for key in found):
        # the name of the model in a larger module
        found = {key.removeprefix(f"{next(iter(tops))}."): entry for key, entry in found.items()}
    total = sum(entry.nbytes for entry in found.values())
    if limit is not None and total > limit:
        raise ValueError(f"is corrupt: its tensors claim {total} bytes, the file has {limit}")
    layers = {int(match[1]) for key in found if (match := re.match(r"blocks\.(\d+)\.", key))}
    return {_paper_key(key, len(layers)): entry for key, entry in found.items()}, told


def _paper_key(key: str, depth: int) -> str:
    part, _, rest = key.partition(".")
    if part == "stem":
        return rest
    if part == "blocks" and (match := re.match(r"(\d{1,6})\.(.*)", rest)):
        return f"{3 + int(match[1])}.{match[2]}"
    # pooling and flattening come before the classifier
    return f"{3 + depth + 2}.{rest}" if part == "head" else key


def _timm_key(key: str, depth: int) -> str:
    index, _, rest = key.partition(".")
    if int(index) < 3:
        return f"stem.{key}"
    return f"blocks.{int(index) - 3}.{rest}" if int(index) < 3 + depth else f"head.{rest}"


def _infer(entries: Mapping[str, _Entry]) -> Preset:
    """The architecture, with an activation that is not known yet."""
    patch = entries["0.weight"].shape if "0.weight" in entries else ()
    heads = {
        int(match[1]): entry.shape
        for key, entry in entries.items()
        if len(entry.shape) == 2 and (match := re.fullmatch(r"(\d{1,6})\.weight", key))
    }
    depth = 0
    while f"{3 + depth}.0.fn.0.weight" in entries:
        depth += 1
    if depth > _MOST_LAYERS:
        raise ValueError(f"claims {depth} layers, which is no ConvMixer")
    if len(patch) != 4:
        raise ValueError(
            "is not a ConvMixer's: 0.weight (timm: stem.0.weight), of shape (dim, channels, patch, patch), "
            f"{'is missing' if not patch else f'has shape {patch}'}; its keys are {_listed(entries)}"
        )
    dim, in_chans = patch[:2]
    kernel = entries["3.0.fn.0.weight"].shape if depth else (dim, 1, 1, 1)
    if len(kernel) != 4 or min(*patch, *kernel) < 1:
        raise ValueError(f"is not a ConvMixer's: 0.weight has shape {patch}, 3.0.fn.0.weight has shape {kernel}")
    head = heads.get(depth + 5)
    known = in_chans == 3
    return Preset(
        dim,
        depth,
        kernel[2] if kernel[2] == kernel[3] else (kernel[2], kernel[3]),
        patch[2] if patch[2] == patch[3] else (patch[2], patch[3]),
        max(1, head[0]) if head else 1000,
        in_chans,
        activation="",
        mean=Preset.mean if known else (),
        std=Preset.std if known else (),
    )


def _complete(preset: Preset, told: Mapping[str, Any], activation: str | None, name: str) -> Preset:
    """With the activation, and with what the file tells of its images and classes."""
    told = {key: told[key] for key in _TOLD if told.get(key) is not None}
    told = {key: tuple(value) if isinstance(value, list) else value for key, value in told.items()}
    wrong = next((key for key, value in told.items() if not _is_told(key, value, preset)), None)
    if wrong is not None:
        raise ValueError(f"tells a {wrong} that does not fit its tensors: {str(told[wrong])[:100]}")
    file = name.partition(".")[0]
    published = next((each for start, each in PUBLISHED_FILES.items() if re.match(rf"{start}(?![a-z0-9])", file)), None)
    sizes = ("dim", "depth", "kernel_size", "patch_size", "in_chans")
    if published and all(getattr(published, size) == getattr(preset, size) for size in sizes):
        told = {"activation": published.activation, **told}
    if activation is not None:
        told["activation"] = activation
    if "activation" not in told:
        raise ValueError(
            f"does not tell its activation: pass activation=, one of {', '.join(ACTIVATIONS)}. The paper's code has gelu, the "
            "published convmixer_768_32 (timm's too) has relu"
        )
    return dataclasses.replace(preset, **told)


def _is_told(key: str, value: Any, preset: Preset) -> bool:
    if key == "activation":
        return value in ACTIVATIONS
    if key == "classes":
        return isinstance(value, tuple) and len(value) == preset.n_classes and all(isinstance(v, str) for v in value)
    if key == "image_size":
        return type(value) is int and 0 < value < 1 << 16
    numbers = value if isinstance(value, tuple) else (value,)
    if not all(type(number) in (int, float) and abs(number) < 1e6 for number in numbers):
        return False
    if key == "crop":
        return len(numbers) == 1 and 0 < numbers[0] <= 1
    return len(numbers) == preset.in_chans and (key == "mean" or min(numbers) > 0)


def _check(entries: Mapping[str, _Entry], preset: Preset) -> None:
    """Raises ValueError with the keys that are missing, that no ConvMixer of these sizes has, and that have another shape."""
    expected = {key: tuple(tensor.shape) for key, tensor in preset.build(device="meta").state_dict().items()}
    missing = [key for key in expected if key not in entries and not key.endswith(_COUNTER)]
    unexpected = [key for key in entries if key not in expected]
    shapes = [
        f"{key} {entry.shape} instead of {expected[key]}"
        for key, entry in entries.items()
        if key in expected and entry.shape != expected[key]
    ]
    if missing or unexpected or shapes:
        parts = [
            f"{what}: {_listed(keys)}"
            for what, keys in (("missing", missing), ("unexpected", unexpected), ("wrong shapes", shapes))
            if keys
        ]
        sizes = f"dim {preset.dim}, depth {preset.depth}, kernel {preset.kernel_size}, patch {preset.patch_size}"
        raise ValueError(f"does not fit a ConvMixer of {sizes}, {preset.n_classes} classes. {'; '.join(parts)}")


def _listed(keys: Any, limit: int = 8) -> str:
    keys = list(keys)
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(str(key)[:100] for key in keys[:limit]) + more
