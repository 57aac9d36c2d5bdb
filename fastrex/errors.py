"""The one error that fastrex shows to its users as a single line."""

from __future__ import annotations

import errno
import os

WAYS_OUT = {
    errno.ENOENT: "check the name",
    errno.ENOTDIR: "a part of the path is a file; check the name",
    errno.EISDIR: "give a file",
    errno.EEXIST: "choose another name",
    errno.EACCES: "check its permissions or choose another place",
    errno.EPERM: "check its permissions or choose another place",
    errno.EROFS: "choose a place that can be written",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its symbolic links lead in a circle; remove one of them",
    errno.ENOSPC: "free some space or choose another place",
    errno.EDQUOT: "free some of your quota or choose another place",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f) or choose another place",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "raise the machine's limit on open files",
    errno.ENOMEM: "free some memory",
    errno.EAGAIN: "raise the limit on processes (ulimit -u)",
    errno.EIO: "check the disk",
    errno.ESTALE: "check the network file system",
}


class FastrexError(RuntimeError):
    """Something outside the program is wrong (a file, a folder, a setting); the message names it and the way out."""


class UsageError(FastrexError):
    """The words of a command, a recipe or a setting are off; exit code 2."""


class DivergedError(FastrexError):
    """Training met a loss, feature or gradient that is not finite; the last good checkpoint stays."""


def explain(error: OSError) -> str:
    """What the operating system refused, to which file, and the way out."""
    names = [repr(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    reason = error.strerror or str(error) or type(error).__name__
    way_out = WAYS_OUT.get(error.errno or 0, "")
    return f"{' -> '.join(names)}{': ' if names else ''}{reason}{'; ' if way_out else ''}{way_out}"


def one_line(text: str) -> str:
    """``text`` as a terminal can show it in one line: line breaks, control characters and bytes of file names that are
    no text are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text.strip())
