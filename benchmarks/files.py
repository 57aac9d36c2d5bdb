"""The files that figures go to."""

from __future__ import annotations

import json
from pathlib import Path

from fastrex.files import write_output


def write_json(path: Path, content: object) -> None:
    """Whole or not at all."""
    write_output(path, json.dumps(content, indent=1) + "\n")
