"""Where the index of a data set may be stored."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def cache_dir() -> Path:
    """Folder for what fastrex keeps between runs: ``FASTREX_CACHE``, or ``~/.cache/fastrex``. It may not exist yet."""
    return Path(os.environ.get("FASTREX_CACHE") or "~/.cache/fastrex").expanduser()


def default_path(root: str | Path) -> Path:
    """Where ``fastrex data index`` puts the index of ``root``: ``.fastrex/index.npz`` in a folder, or the cache folder
    if that is read-only or ``root`` a file."""
    *inside, cached = stored_paths(root)
    for path in inside:
        folder = path.parent
        writable = os.access(folder if folder.exists() else folder.parent, os.W_OK | os.X_OK)
        # Not through a link: it may come with somebody else's data, and lead anywhere.
        if writable and not folder.is_symlink() and (folder.is_dir() or not folder.exists()):
            return path
    return cached


def stored_paths(root: str | Path) -> list[Path]:
    """Where an index of ``root`` may be stored; the last place is in the cache folder."""
    root = Path(root).expanduser()
    key = hashlib.blake2b(os.fsencode(root.resolve()), digest_size=16).hexdigest()
    inside = [] if root.is_file() else [root / ".fastrex" / "index.npz"]
    return [*inside, cache_dir() / "index" / f"{key}.npz"]
