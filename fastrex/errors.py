"""The one error that fastrex shows to its users as a single line."""

from __future__ import annotations


class FastrexError(RuntimeError):
    """Something outside the program is wrong (a file, a folder, a setting); the message names it and the way out."""


class UsageError(FastrexError):
    """The words of a command, a recipe or a setting are off; exit code 2."""


class DivergedError(FastrexError):
    """Training met a loss, feature or gradient that is not finite; the last good checkpoint stays."""
