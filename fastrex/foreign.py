"""The one reader of other people's pickled files: what ``torch.save`` writes (.pth, .pt), and plain pickles of words.

Nothing in a file is executed. Its pickle passes a scan and then an ``Unpickler`` that knows plain containers, and
tensors or numpy's arrays of words. In a checkpoint every other global (``argparse.Namespace``, numpy's scalars,
``os.system``) becomes an inert placeholder that swallows its arguments and its state; a plain pickle that names one is
refused.
"""

from __future__ import annotations

import io
import os
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import opcodes, untrusted, words
from .archive import CONVERT, DTYPES, Archive, not_a_zip
from .errors import FastrexError
from .stored import StoredZip

__all__ = ["CONVERT", "load", "read", "read_words"]

MAX_ARCHIVE = 32 * 2**30
MAX_PICKLE = 16 * 2**20
MAX_WORDS = 4 * 2**30
MAX_COPIED = 1_000_000
MAX_PLACEHOLDERS = 1000
MAX_DIMENSIONS = 64
MAX_SHARED = 8  # times the size of the file that all tensors may have together, where they share or repeat values
ROOM = 1 << 22  # bytes that they may have beyond, in a small file


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


class _Sealed:
    """Base of what the pickle may hold, but not change."""

    __slots__ = ()

    def __setattr__(self, name: str, value: object) -> None:
        raise pickle.UnpicklingError("a function's attribute is set")


class _Function(_Sealed):
    """A function for the pickle to call."""

    __slots__ = ("_run",)
    _run: Callable[..., Any]

    def __init__(self, run: Callable[..., Any]) -> None:
        object.__setattr__(self, "_run", run)

    def __call__(self, *args: Any) -> Any:
        return self._run(*args)


class _Held(_Sealed):
    """A tensor while the pickle runs: its own methods would be called by BUILD (``set_``: memory at will) and ADDITEMS
    (``add``: a broadcast sum)."""

    __slots__ = ("tensor",)
    tensor: Tensor

    def __init__(self, tensor: Tensor) -> None:
        object.__setattr__(self, "tensor", tensor)


class _Reader(pickle.Unpickler):
    """Knows plain containers; ``known``: what else a pickle may name."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self.known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): _Function(lambda *args: self._copied(_Plain, *args)),
        }
        for kind in (dict, list, set, tuple, frozenset):
            for module in ("builtins", "__builtin__"):
                self.known[module, kind.__name__] = _Function(lambda *args, kind=kind: self._copied(kind, *args))
        self.left_to_copy = MAX_COPIED

    def _copied(self, kind: Callable[..., Any], *args: Any) -> Any:
        """A container from another: within a budget, since a short pickle can ask for many copies of a long one."""
        if args:
            self.left_to_copy -= len(args[0])
            if self.left_to_copy < 0:
                raise FastrexError(f"it copies more than {MAX_COPIED} items between containers")
        return kind(*args)


class _WordReader(_Reader):
    """Turns a plain pickle into words, numbers, containers and numpy's arrays of words."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        functions = words.Functions(2 * len(data) + ROOM).known()  # twice: as bytes, as an array
        self.known |= {name: _Function(run) if callable(run) else run for name, run in functions.items()}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.known:
            raise FastrexError(f"it names {module[:80]}.{name[:80]}, which lists of words do not need")
        return self.known[module, name]


class _TensorReader(_Reader):
    """Turns the pickle of one archive into tensors, plain containers and placeholders."""

    def __init__(self, data: bytes, archive: Archive, size: int) -> None:
        super().__init__(data)
        self.archive = archive
        self.left_to_show = MAX_SHARED * size + ROOM
        self.storages: dict[str, _Held] = {}
        for name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            self.known["torch._utils", name] = _Function(self._tensor)
        for name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            self.known["torch._utils", name] = _Function(self._parameter)
        for name, dtype in DTYPES.items():
            self.known["torch", name] = self.known["torch.storage", name] = dtype
        self.placeholders: dict[str, type[_Inert]] = {}

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
            # Never its words: lists that hold one another twice print for ever.
            raise FastrexError(f"it refers to a {type(pid).__name__} that is no storage")
        _, dtype, key, _, count = pid
        if not isinstance(dtype, torch.dtype):
            return _Inert()
        if not isinstance(key, str) or type(count) is not int:
            raise FastrexError("it names a storage by something else than a key and a length")
        if key not in self.storages:
            self.storages[key] = _Held(self.archive.storage(key, dtype, count))
        # Read once, whatever it is called for: torch.save gives a storage one type.
        if self.storages[key].tensor.dtype != dtype:
            raise FastrexError(f"its storage {key} has two types")
        return self.storages[key]

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Any:
        if not isinstance(storage, _Held):
            return _Inert()
        held = storage.tensor
        if len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
            raise FastrexError("a tensor has an impossible shape")
        if any(type(n) is not int or not 0 <= n < 2**48 for n in (offset, *size, *stride)):
            raise FastrexError("a tensor has an impossible shape")
        count, last = 1, offset
        for length, step in zip(size, stride, strict=True):
            count *= length
            last += (length - 1) * step
        if count and last >= held.numel():
            raise FastrexError(f"a tensor of shape {list(size)} reaches past its storage of {held.numel()} elements")
        # Whoever copies them all must not need more memory than a few such files.
        self.left_to_show -= count * held.dtype.itemsize
        if self.left_to_show < 0:
            raise FastrexError(f"its tensors repeat values so often that they have {MAX_SHARED} times its size")
        return _Held(held.as_strided(size, stride, offset) if count else held.new_empty(size))

    def _parameter(self, data: Any, *_: Any) -> Any:
        """Of a tensor only: a container under a second name would grow behind the scan's back."""
        return data if isinstance(data, _Held) else _Inert()


def _opened(content: Any) -> Any:
    """``content`` with the tensors and arrays themselves; what stands in it several times is looked at once."""
    done: dict[int, tuple[Any, Any]] = {}  # by identity, which lasts as long as the original does
    pending: list[Any] = []

    def opened(value: Any) -> Any:
        if isinstance(value, _Held):
            return value.tensor
        if isinstance(value, words.Array):
            return value.opened()
        if isinstance(value, dict | list | tuple) and id(value) not in done:
            if isinstance(value, tuple):  # no deeper than the scan allows: what is built of others is not changed later
                done[id(value)] = value, tuple(opened(inner) for inner in value)
            else:
                done[id(value)] = value, value
                pending.append(value)
        return done[id(value)][1] if id(value) in done else value

    content = opened(content)
    while pending:
        container = pending.pop()
        for key, value in list(container.items() if isinstance(container, dict) else enumerate(container)):
            container[key] = opened(value)
    return content


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever goes wrong while ``path`` is read, as one line."""
    try:
        yield
    except OSError as error:
        raise FastrexError(f"foreign: {path} cannot be read ({error.strerror or error}); give a file") from error
    except FastrexError as error:
        raise FastrexError(f"foreign: {path} cannot be read: {error}") from None
    except MemoryError as error:
        raise FastrexError(
            f"foreign: {path} cannot be read: it needs more memory than there is; get it again, or free some memory"
        ) from error
    except Exception as error:
        # A damaged or hostile file can make zipfile and pickle raise nearly anything; nothing of it was executed.
        raise FastrexError(
            f"foreign: {path} is damaged ({type(error).__name__}: {str(error)[:120]}); get it again"
        ) from error


def load(path: Path) -> tuple[dict[Any, Any], list[str]]:
    """The dictionary in the file and the names of the globals that became placeholders."""
    with _reading(path), untrusted.opened(path) as file:
        size, head = os.fstat(file.fileno()).st_size, file.read(64)
        if size > MAX_ARCHIVE:
            raise FastrexError(f"it has {size} bytes, more than {MAX_ARCHIVE}")
        if not head.startswith(b"PK\x03\x04"):
            raise FastrexError(not_a_zip(head))
        try:
            archive = Archive(StoredZip(file, size))
        except ValueError as error:
            raise FastrexError(f"{error}; get it again") from None
        data = archive.read("data.pkl", MAX_PICKLE)
        opcodes.check(data)
        reader = _TensorReader(data, archive, size)
        content = _opened(reader.load())
    if not isinstance(content, dict):
        what = re.sub(r"[^\w.]", "?", content.kind[:80]) if isinstance(content, _Inert) else type(content).__name__
        raise FastrexError(f"foreign: {path} must hold a dict of tensors, got {what}; {CONVERT}")
    return content, sorted(reader.placeholders)


def read(path: str | Path) -> dict[Any, Any]:
    """Read the dictionary that someone saved with ``torch.save`` (torch 1.6 or newer), without executing anything.

    Tensors come on the CPU; an OrderedDict comes as a dict; objects of other classes come as inert placeholders.

    Raises:
        FastrexError: the file is missing, damaged, of another format, or holds no dictionary; says how to convert it.
    """
    return load(Path(path))[0]


def read_words(path: str | Path) -> Any:
    """Read a plain pickle (protocols 0 to 5) of lists, tuples, dicts and sets of words and numbers, without executing
    anything.

    numpy's arrays of words (of any version) come as arrays of dtype ``U`` or ``S``, those of objects as lists, its
    scalars as str or bytes. The memory that it takes is about twice the size of the file.

    Raises:
        FastrexError: the file is missing, damaged, too large, or names anything else than those types.
    """
    path = Path(path)
    with _reading(path), untrusted.opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_WORDS:
            raise FastrexError(f"it has {size} bytes, more than {MAX_WORDS}; get it again")
        data = file.read(size)
        opcodes.check(data, opcodes.WORDS)
        return _opened(_WordReader(data).load())
