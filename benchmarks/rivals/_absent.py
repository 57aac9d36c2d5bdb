"""Why a rival is not measured."""

from __future__ import annotations


class Absent(Exception):
    """A rival cannot run here, or not this case; the message is the reason, which the records keep."""
