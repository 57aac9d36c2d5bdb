"""The one reader of other people's pickled files: what ``torch.save`` writes (.pth, .pt).

Nothing in the file is executed. The zip archive and its storages are read here; the pickle passes a scan and then an
``Unpickler`` that knows tensors and plain containers. Every other global (``argparse.Namespace``, numpy's scalars,
``os.system``) becomes an inert placeholder that swallows its arguments and its state.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import FastrexError

MAX_ARCHIVE = 32 * 2**30
MAX_ENTRIES = 100_000
MAX_PICKLE = 16 * 2**20
MAX_COPIED = 1_000_000
MAX_PLACEHOLDERS = 1000
MAX_DEPTH = 64

CONVERT = "load it where you trust it and save its state_dict with a current torch.save or with safetensors"
_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# Opcodes that reach objects past find_class, or that no torch file has.
_REFUSED = {"EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER", "BYTEARRAY8", "PERSID"}


class _Plain(dict[Any, Any]):
    """What an OrderedDict becomes: attributes that a file gives it (``_metadata``) are dropped."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        pass


class _Inert:
    """Placeholder for an object of a foreign class: it takes everything and does nothing."""

    __slots__ = ()
    kind = "?"

    def __new__(cls, *args: object, **kwargs: object) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def _swallow(self, *args: object) -> None:
        pass

    __setstate__ = append = extend = add = __setitem__ = _swallow

    def __call__(self, *args: object) -> _Inert:
        return self

    def __repr__(self) -> str:
        return f"<{self.kind}>"


class _Function:
    """A function for the pickle to call, without attributes that the pickle could set."""

    __slots__ = ("_run",)
    _run: Callable[..., Any]

    def __init__(self, run: Callable[..., Any]) -> None:
        object.__setattr__(self, "_run", run)

    def __setattr__(self, name: str, value: object) -> None:
        raise pickle.UnpicklingError("a function's attribute is set")

    def __call__(self, *args: Any) -> Any:
        return self._run(*args)


class _Archive:
    """The zip archive of one file: entries by exact name, sizes checked before anything is allocated."""

    def __init__(self, file: zipfile.ZipFile, size: int) -> None:
        entries = file.infolist()
        if len(entries) > MAX_ENTRIES:
            raise FastrexError(f"it has {len(entries)} entries, more than {MAX_ENTRIES}")
        self.entries = {entry.filename: entry for entry in entries}
        if len(self.entries) != len(entries):
            raise FastrexError("two of its entries have the same name")
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
            raise FastrexError("it has compressed or encrypted entries, which torch.save does not write")
        if sum(entry.file_size for entry in entries) > size:
            raise FastrexError("its entries claim more bytes than the file has")
        roots = [name.removesuffix("/data.pkl") for name in self.entries if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise FastrexError(f"it is a zip file, but none that torch.save wrote; {CONVERT}")
        self.root = roots[0]
        if f"{self.root}/constants.pkl" in self.entries:
            raise FastrexError(f"it is a TorchScript program, not a checkpoint; {CONVERT}")
        self.file = file
        self.swap = self.read("byteorder", 16, sys.byteorder.encode()) != sys.byteorder.encode()

    def read(self, name: str, limit: int, default: bytes | None = None) -> bytes:
        entry = self.entries.get(f"{self.root}/{name}")
        if entry is None:
            if default is None:
                raise FastrexError(f"its entry {name} is missing")
            return default
        if entry.file_size > limit:
            raise FastrexError(f"its entry {name} has {entry.file_size} bytes, more than {limit}")
        return self.file.read(entry)

    def storage(self, key: str, dtype: torch.dtype, count: int) -> Tensor:
        if not re.fullmatch(r"\d{1,9}", key) or count < 0:
            raise FastrexError(f"it names a storage {key[:20]!r} of {count} elements")
        entry = self.entries.get(f"{self.root}/data/{key}")
        held = -1 if entry is None else entry.file_size
        if held != count * dtype.itemsize:
            raise FastrexError(
                f"its storage {key} must have {count * dtype.itemsize} bytes, the archive has {max(held, 0)}"
            )
        if count == 0:
            return torch.empty(0, dtype=dtype)
        data = torch.frombuffer(bytearray(self.read(f"data/{key}", held)), dtype=torch.uint8)
        if self.swap:
            data = data.reshape(-1, dtype.itemsize).flip(1).reshape(-1).contiguous()
        return data != 0 if dtype == torch.bool else data.view(dtype)


class _Reader(pickle.Unpickler):
    """Turns the pickle of one archive into tensors, plain containers and placeholders."""

    def __init__(self, data: bytes, archive: _Archive) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self.archive = archive
        self.storages: dict[tuple[str, torch.dtype], Tensor] = {}
        self.known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): _Function(lambda *args: self._copied(_Plain, *args)),
            ("torch._utils", "_rebuild_tensor"): _Function(self._tensor),
            ("torch._utils", "_rebuild_tensor_v2"): _Function(self._tensor),
            ("torch._utils", "_rebuild_parameter"): _Function(lambda data, *_: data),
            ("torch._utils", "_rebuild_parameter_with_state"): _Function(lambda data, *_: data),
        }
        for kind in (dict, list, set, tuple, frozenset):
            for module in ("builtins", "__builtin__"):
                self.known[module, kind.__name__] = _Function(lambda *args, kind=kind: self._copied(kind, *args))
        for name, dtype in _DTYPES.items():
            self.known["torch", name] = self.known["torch.storage", name] = dtype
        self.placeholders: dict[str, type[_Inert]] = {}
        self.left_to_copy = MAX_COPIED

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.known:
            return self.known[module, name]
        kind = f"{module}.{name}"
        if kind not in self.placeholders:
            if len(self.placeholders) == MAX_PLACEHOLDERS:
                raise FastrexError(f"it names more than {MAX_PLACEHOLDERS} classes and functions")
            self.placeholders[kind] = type("Placeholder", (_Inert,), {"__slots__": (), "kind": kind})
        return self.placeholders[kind]

    def persistent_load(self, pid: Any) -> Any:
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise FastrexError(f"it refers to {str(pid)[:40]!r}, which is no storage")
        _, dtype, key, _, count = pid
        if not isinstance(dtype, torch.dtype):
            return _Inert()
        if not isinstance(key, str) or type(count) is not int:
            raise FastrexError("it names a storage by something else than a key and a length")
        if (key, dtype) not in self.storages:
            self.storages[key, dtype] = self.archive.storage(key, dtype, count)
        return self.storages[key, dtype]

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Any:
        if not isinstance(storage, Tensor):
            return _Inert()
        numbers = [offset, *size, *stride]
        if len(size) != len(stride) or any(type(n) is not int or not 0 <= n < 2**48 for n in numbers):
            raise FastrexError("a tensor has an impossible shape")
        count, last = 1, offset
        for length, step in zip(size, stride, strict=True):
            count *= length
            last += (length - 1) * step
        if count > storage.numel() or (count and last >= storage.numel()):
            raise FastrexError(f"a tensor of shape {list(size)} reaches past its storage of {storage.numel()} elements")
        return storage.as_strided(size, stride, offset) if count else storage.new_empty(size)

    def _copied(self, kind: Callable[..., Any], *args: Any) -> Any:
        """A container from another: within a budget, since a short pickle can ask for many copies of a long one."""
        if args:
            self.left_to_copy -= len(args[0])
            if self.left_to_copy < 0:
                raise FastrexError(f"it copies more than {MAX_COPIED} items between containers")
        return kind(*args)


def _scan(data: bytes) -> None:
    """Refuse a pickle whose opcodes could hurt before ``find_class`` is asked: odd ones, a huge memo, deep nesting.

    Nesting is followed through the stack, because hashing a deeply nested tuple would overflow C's.
    """
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}
    for op, arg, _ in pickletools.genops(data):
        if op.name in _REFUSED:
            raise FastrexError(f"its pickle uses {op.name}, which no torch file needs")
        if op.name == "MARK":
            marks.append(len(stack))
        elif op.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            place = len(memo) if arg is None else int(arg)
            if place > len(data):
                raise FastrexError(f"its pickle asks for a memo of {place} places")
            memo[place] = stack[-1]
        elif op.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(arg or 0)])
        elif op.name == "DUP":
            stack.append(stack[-1])
        elif op.name == "POP" and marks and marks[-1] == len(stack):
            marks.pop()
        else:
            names = [item.name for item in op.stack_before]
            below = names.index("mark") if "mark" in names else len(names)
            start = (marks.pop() if below < len(names) else len(stack)) - below
            if start < 0:
                raise FastrexError("its pickle takes more from the stack than is there")
            taken = stack[start:]
            del stack[start:]
            filled = op.name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
            depth = max(taken[0], *(d + 1 for d in taken[1:]), 0) if filled else 1 + max(taken, default=0)
            if depth > MAX_DEPTH:
                raise FastrexError(f"its containers are nested more than {MAX_DEPTH} deep")
            stack.extend([depth] * len(op.stack_after))


def load(path: Path) -> tuple[dict[Any, Any], list[str]]:
    """The dictionary in the file and the names of the globals that became placeholders."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise FastrexError(f"foreign: {path} cannot be read ({error.strerror or error})") from error
    try:
        if size > MAX_ARCHIVE:
            raise FastrexError(f"it has {size} bytes, more than {MAX_ARCHIVE}")
        if not head.startswith(b"PK\x03\x04"):
            raise FastrexError(_not_a_zip(head))
        with zipfile.ZipFile(path) as file:
            archive = _Archive(file, size)
            data = archive.read("data.pkl", MAX_PICKLE)
            _scan(data)
            reader = _Reader(data, archive)
            content = reader.load()
    except FastrexError as error:
        raise FastrexError(f"foreign: {path} cannot be read: {error}") from None
    except Exception as error:
        # A damaged or hostile file can make zipfile and pickle raise nearly anything; nothing of it was executed.
        raise FastrexError(
            f"foreign: {path} is damaged ({type(error).__name__}: {str(error)[:120]}); get it again"
        ) from error
    if not isinstance(content, dict):
        what = content.kind if isinstance(content, _Inert) else type(content).__name__
        raise FastrexError(f"foreign: {path} must hold a dict of tensors, got {what}; {CONVERT}")
    return content, sorted(reader.placeholders)


def _not_a_zip(head: bytes) -> str:
    if not head:
        return "it is empty; get it again"
    if head.startswith(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."):
        return f"it has torch's format from before version 1.6; {CONVERT}"
    if head[8:9] == b"{":
        return "it looks like safetensors; rename it to .safetensors"
    if head.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer, not the file itself; run git lfs pull"
    if head.startswith(b"\x80"):
        return f"it is a bare pickle; {CONVERT}"
    return f"it is no torch file (it begins with {head[:16]!r}); {CONVERT}"


def read(path: str | Path) -> dict[Any, Any]:
    """Read the dictionary that someone saved with ``torch.save`` (torch 1.6 or newer), without executing anything.

    Tensors come on the CPU; an OrderedDict comes as a dict; objects of other classes come as inert placeholders.

    Raises:
        FastrexError: the file is missing, damaged, of another format, or holds no dictionary; says how to convert it.
    """
    return load(Path(path))[0]
