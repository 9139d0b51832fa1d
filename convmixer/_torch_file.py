# SPDX-License-Identifier: MIT
"""Files of torch.save, read as data: which tensors a file claims to hold, and each tensor's bytes when they are asked for.

torch.load(weights_only=True) runs no code of the file, but it allocates what the file claims: a few hundred bytes can ask for
terabytes (a storage resized to its tensor's sizes, a deflated record, torch.FloatTensor(n)). This interprets the instructions of
a pickle itself, calls nothing that the file names, and compares every claim with the file's size before a tensor is made.

Both formats: the zip archive, and the sequence of pickles that torch.save wrote before version 1.6 and still writes with
_use_new_zipfile_serialization=False (the published ConvMixers are that old).
"""

from __future__ import annotations

import io
import math
import os
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
#: Bytes of a pickle: names and sizes, without the tensors' values. A ConvMixer with its optimizer's state needs less than 1 MB.
_PICKLE_LIMIT = 64 << 20
_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_STORAGES = {
    f"{module}.{name}": dtype for name, dtype in _DTYPES.items() for module in ("torch", "torch.storage", "torch.cuda")
}
#: What training scripts store beside the weights. Nothing of it is made: it is skipped.
_SKIPPED = re.compile(
    r"argparse\.Namespace|pathlib\.(Pure)?(Posix|Windows)?Path|(builtins|__builtin__)\.(set|frozenset|complex|bytearray)"
    r"|_codecs\.encode|collections\.(Counter|defaultdict)|torch\.(Size|device|serialization\._get_layout)"
    r"|torch\.(float|bfloat|complex|int|uint)\d+|torch\.bool"
    r"|numpy\.(_?core\.)?multiarray\.(scalar|_reconstruct)|numpy\.(dtype|ndarray|dtypes\.\w+|random\.\w+)"
)


class FileError(ValueError):
    """What is wrong with a file, as a predicate of it: "is truncated: ..."."""


class StoredTensor(NamedTuple):
    """A tensor that a file claims to hold."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # elements
    storage: str


class _Global(NamedTuple):
    name: str


class _Skipped(NamedTuple):
    name: str


class TorchFile:
    """A file of torch.save.

    Raises:
        FileError: it is no such file, or truncated, or claims more than it holds, or needs more than data.
    """

    content: Any  # of dict, list, tuple, str, numbers, None and StoredTensor

    def __init__(self, path: Path) -> None:
        self._size = os.path.getsize(path)
        self._numel: dict[str, tuple[torch.dtype, int]] = {}  # storage -> elements, as the pickle claims
        self._start: dict[str, int] = {}  # storage -> its first byte, in the sequence of pickles
        self._storages: dict[str, Tensor] = {}
        self._file = open(path, "rb")  # noqa: SIM115, closed by __exit__
        try:
            start = self._file.read(4)
            self._file.seek(0)
            if start == b"PK\x03\x04":
                self._open_zip()
            else:
                # a buffer: a read of more than it holds allocates nothing, which a file's read does
                self._open_sequence(io.BytesIO(self._file.read(_PICKLE_LIMIT)))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, tensor: StoredTensor) -> Tensor:
        """The tensor, on the CPU. Tensors of one storage share memory."""
        dtype, numel = self._numel[tensor.storage]
        flat = self._storages.get(tensor.storage)
        if flat is None:
            data = bytearray(self._bytes(tensor.storage, numel * dtype.itemsize))
            flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            self._storages[tensor.storage] = flat
        return flat.as_strided(tensor.shape, tensor.stride, tensor.offset)

    def _open_zip(self) -> None:
        try:
            self._zip = zipfile.ZipFile(self._file)
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise FileError(f"is truncated or corrupt: the directory at the end of a zip archive: {error}") from error
        names = self._zip.namelist()
        pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if any("/code/" in name or name.endswith("/constants.pkl") for name in names):
            raise FileError("is a TorchScript archive, a program: save the model's state_dict with torch.save")
        if len(pickles) != 1:
            raise FileError("is a zip archive that torch.save did not write: it has no data.pkl")
        for info in self._zip.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise FileError(f"has a compressed record, {info.filename}, which torch.save never writes")
            if info.file_size > self._size:
                raise FileError(
                    f"is truncated or corrupt: record {info.filename} claims {info.file_size} bytes, the file has {self._size}"
                )
        self._folder = pickles[0].removesuffix("data.pkl")
        if f"{self._folder}byteorder" in names and self._record("byteorder") != b"little":
            raise FileError("holds big-endian numbers, which this does not read")
        if self._zip.getinfo(pickles[0]).file_size > _PICKLE_LIMIT:
            raise FileError("holds no state_dict: its data.pkl is too large for names and sizes")
        self.content = self._interpret(io.BytesIO(self._record("data.pkl")))

    def _record(self, name: str) -> bytes:
        try:
            return self._zip.read(self._folder + name)
        except KeyError as error:
            raise FileError(f"is corrupt: it has no record {name}") from error
        except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError, RuntimeError) as error:
            raise FileError(f"is truncated or corrupt: record {name}: {error}") from error

    def _open_sequence(self, pickles: io.BytesIO) -> None:
        magic = self._interpret(pickles)
        if magic != _MAGIC:
            raise FileError("is a pickle that torch.save did not write")
        version, system = self._interpret(pickles), self._interpret(pickles)
        if version != _LEGACY_VERSION or not isinstance(system, dict) or system.get("little_endian") is not True:
            raise FileError("was written by another version of torch.save, or on a big-endian machine")
        self.content = self._interpret(pickles)
        keys = self._interpret(pickles)
        at = pickles.tell()
        for key in keys if isinstance(keys, list) else ():
            if not isinstance(key, str) or key not in self._numel:
                raise FileError(f"is corrupt: it stores {key!r}, which none of its tensors uses")
            dtype, numel = self._numel[key]
            self._file.seek(at)
            stored = int.from_bytes(self._file.read(8), "little")
            if stored != numel and at + 8 <= self._size:
                raise FileError(f"is corrupt: storage {key} has {stored} elements, its tensors claim {numel}")
            self._start[key] = at + 8
            at += 8 + numel * dtype.itemsize
            if at > self._size:
                raise FileError(f"is truncated: storage {key} ends at byte {at}, the file has {self._size}")
        missing = sorted(self._numel.keys() - self._start.keys())
        if missing:
            raise FileError(f"is truncated or corrupt: storage {missing[0]} is not in it")

    def _bytes(self, storage: str, size: int) -> bytes:
        if not self._start:
            return self._record(f"data/{storage}")
        self._file.seek(self._start[storage])
        return self._file.read(size)

    def _claim_storage(self, pid: Any) -> tuple[torch.dtype, str]:
        """("storage", type, key, location, elements), and in the sequence of pickles also None."""
        if not (isinstance(pid, tuple) and 5 <= len(pid) <= 6 and pid[0] == "storage" and isinstance(pid[1], _Global)):
            raise FileError("is corrupt: a reference that names no storage")
        dtype, key, numel = _STORAGES.get(pid[1].name), pid[2], pid[4]
        if dtype is None or not isinstance(key, str) or type(numel) is not int or numel < 0:
            raise FileError(f"is corrupt, or holds numbers of a type that no ConvMixer has: {pid[1].name}")
        if len(pid) == 6 and pid[5] is not None:
            raise FileError("holds views of storages, as torch.save wrote them before version 0.4: save it again")
        size = numel * dtype.itemsize
        if size > self._size:
            raise FileError(f"is truncated or corrupt: storage {key} claims {size} bytes, the file has {self._size}")
        if hasattr(self, "_folder"):
            try:
                stored = self._zip.getinfo(f"{self._folder}data/{key}").file_size
            except KeyError as error:
                raise FileError(f"is corrupt: it has no record data/{key}") from error
            if stored != size:
                raise FileError(f"is corrupt: storage {key} claims {size} bytes, its record has {stored}")
        if self._numel.setdefault(key, (dtype, numel)) != (dtype, numel):
            raise FileError(f"is corrupt: storage {key} is claimed twice, with other sizes")
        return dtype, key

    def _claim_tensor(self, arguments: Any) -> StoredTensor:
        """torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks[, metadata])"""
        try:
            (dtype, key), offset, shape, stride = arguments[:4]
            shape, stride = tuple(shape), tuple(stride)
            numbers = all(type(n) is int and n >= 0 for n in (offset, *shape, *stride))
        except (TypeError, ValueError):
            numbers = False
        if not numbers or len(shape) != len(stride) or len(shape) > 64:
            raise FileError("is corrupt: a tensor without a storage, sizes or strides")
        numel = self._numel[key][1]
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if math.prod(shape) > numel or (math.prod(shape) > 0 and last >= numel):
            raise FileError(f"is corrupt: a tensor claims sizes {_short(shape)}, its storage has {numel} elements")
        return StoredTensor(dtype, shape, stride, offset, key)

    def _reduce(self, function: Any, arguments: Any) -> Any:
        name = function.name if isinstance(function, _Global) else repr(type(function).__name__)
        if name == "torch._utils._rebuild_tensor_v2":
            return self._claim_tensor(arguments)
        if name == "torch._utils._rebuild_parameter" and isinstance(arguments, tuple) and arguments:
            return arguments[0]
        if name == "collections.OrderedDict" and arguments == ():
            return {}
        if isinstance(function, _Global) and _SKIPPED.fullmatch(name):
            return _Skipped(name)
        raise FileError(f"is corrupt: a pickle that calls {name}")

    def _interpret(self, file: io.BytesIO) -> Any:
        """The value of the pickle at the file's position. Containers are made, functions and classes are only compared by name."""
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}

        def since_mark() -> list[Any]:
            at = marks.pop()
            items = stack[at:]
            del stack[at:]
            return items

        try:
            for opcode, argument, _ in pickletools.genops(file):
                name = opcode.name
                if name in _CONSTANTS:
                    stack.append(_CONSTANTS[name])
                elif name in _LITERALS:
                    stack.append(argument)
                elif name in _EMPTY:
                    stack.append(_EMPTY[name]())
                elif name in ("BINPUT", "LONG_BINPUT"):
                    memo[argument] = stack[-1]
                elif name in ("BINGET", "LONG_BINGET"):
                    stack.append(memo[argument])
                elif name == "MARK":
                    marks.append(len(stack))
                elif name == "TUPLE":
                    stack.append(tuple(since_mark()))
                elif name in _TUPLES:
                    stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
                elif name in ("APPEND", "APPENDS"):
                    items = since_mark() if name == "APPENDS" else [stack.pop()]
                    _as(stack[-1], list).extend(items)
                elif name in ("SETITEM", "SETITEMS"):
                    items = since_mark() if name == "SETITEMS" else [stack.pop() for _ in "kv"][::-1]
                    for key, value in zip(items[::2], items[1::2], strict=True):
                        # others are no names of tensors, and a key's hash may be as deep as the file likes
                        if isinstance(key, (str, int, float)):
                            _as(stack[-1], dict)[key] = value
                elif name == "GLOBAL":
                    stack.append(_known(argument.replace(" ", ".", 1)))
                elif name == "BINPERSID":
                    stack.append(self._claim_storage(stack.pop()))
                elif name in ("REDUCE", "NEWOBJ"):
                    arguments = stack.pop()
                    stack.append(self._reduce(stack.pop(), arguments))
                elif name == "BUILD":
                    # attributes of an OrderedDict (_metadata) or of what is skipped
                    stack.pop()
                    if not isinstance(stack[-1], (dict, _Skipped)):
                        raise FileError("is corrupt: a pickle that sets attributes of what has none")
                elif name == "STOP":
                    return stack.pop()
                elif name != "PROTO":
                    raise FileError(f"has the pickle instruction {name}, which torch.save does not write")
        except (IndexError, KeyError) as error:
            raise FileError("is corrupt: a pickle that takes what it did not store") from error
        except FileError:
            raise
        except ValueError as error:  # of pickletools
            raise FileError(f"is truncated or corrupt: {error}") from error
        raise FileError("is truncated: a pickle without its end")


def _known(name: str) -> _Global:
    if (
        name in _STORAGES
        or name in ("collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter")
        or _SKIPPED.fullmatch(name)
    ):
        return _Global(name)
    raise FileError(
        f"names {name[:200]}: code, which this never runs. Save a state_dict, with nothing beside it, by torch.save"
    )


def _as(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        # a list or dict that is skipped
        if isinstance(value, _Skipped):
            return kind()
        raise FileError(f"is corrupt: a pickle that fills a {type(value).__name__} as a {kind.__name__}")
    return value


def _short(shape: tuple[int, ...]) -> str:
    return str(shape) if len(str(shape)) < 100 else f"{str(shape)[:100]}..."


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY: dict[str, type] = {"EMPTY_LIST": list, "EMPTY_DICT": dict}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_LITERALS = frozenset(
    {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "BINSTRING"}
)
