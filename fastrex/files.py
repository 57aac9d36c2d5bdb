"""Files that are there whole or not at all, also after a kill or a power cut: written beside their place, flushed,
renamed. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# What file systems say that cannot flush a folder, or do not let this user open it for that.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.EBADF, errno.EACCES)


@contextlib.contextmanager
def replacing(path: Path, suffix: str = "") -> Iterator[Path]:
    """A name beside ``path`` to write to (``suffix``: for writers that choose their format by it); what stands
    there at the end takes the place of ``path`` in one rename, with the mode that the umask asks for.

    After an error ``path`` is as it was and nothing else is left. Two writers never share the name.

    Raises:
        OSError: the folder is missing, full or read-only, or ``path`` is no regular file.
    """
    if path.exists() and not path.is_file():
        # A rename would put a file where a device or a pipe was: as root, /dev/null is gone for everybody.
        raise OSError(errno.EISDIR if path.is_dir() else errno.EINVAL, "is no regular file", str(path))
    temp = path.with_name(f".{path.name[:40]}.{os.getpid()}-{secrets.token_hex(4)}{suffix}")
    try:
        yield temp
        temp.chmod(0o666 & ~umask())
        sync(temp)
        temp.replace(path)
        sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)


def sweep(path: Path, unused_s: float = 0.0) -> None:
    """Remove what killed writers of ``path`` left beside it (:func:`replacing`) and nobody has written to for
    ``unused_s`` seconds; 0: the caller knows that it is the only writer."""
    left = re.compile(rf"\.{re.escape(path.name[:40])}\.\d+-[0-9a-f]{{8}}(\.\w+)?")
    with contextlib.suppress(OSError):
        for other in path.parent.iterdir():
            if left.fullmatch(other.name) and (not unused_s or time.time() - other.stat().st_mtime > unused_s):
                other.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a small file."""
    with replacing(path) as temp:
        temp.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Replace a small text file (UTF-8)."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a small JSON file."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_output(path: Path, content: str | bytes) -> None:
    """Write where a user asked for it: a file is replaced whole, also behind a link; a device or pipe (/dev/stdout) is
    written to.

    Raises:
        OSError: as :func:`replacing`, or nobody reads the pipe.
    """
    content = content.encode("utf-8") if isinstance(content, str) else content
    if path.is_file() or path.is_dir() or not path.exists():
        write_bytes(Path(os.path.realpath(path)), content)
        return
    # Opening a pipe that nobody reads would wait for ever.
    with open(os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC), "wb") as file:
        os.set_blocking(file.fileno(), True)
        file.write(content)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk; a folder as far as its file system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC or not path.is_dir():
            raise


def digest(path: Path) -> str:
    """sha256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def umask() -> int:
    """The mask that this process creates files with."""
    # Read from /proc: os.umask can only be asked by setting it, for all threads.
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def nearest(path: Path) -> Path:
    """``path`` itself or what is nearest above it and exists, be it a broken link.

    Raises:
        OSError: links in a circle, a folder that may not be searched.
    """
    for place in (path, *path.parents):
        try:
            place.stat()
        except (FileNotFoundError, NotADirectoryError):
            if place.is_symlink():
                return place
        else:
            return place
    return Path("/")
