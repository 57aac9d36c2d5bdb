"""What ``data.path`` may name: a folder of images, a list of them, a tar shard or a folder of shards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from .lists import SUFFIXES, find_list
from .scan import Listing, find_layout
from .shards import find_shards


class Source(Protocol):
    """Where images are named. ``stamp`` tells, without a look at the images, whether it has changed."""

    @property
    def root(self) -> Path: ...

    @property
    def stamp(self) -> str: ...

    def listing(self, threads: int) -> Listing: ...


def find_source(path: str | Path) -> Source:
    """The source at ``path``; FastrexError where there is none."""
    path = Path(os.path.abspath(Path(path).expanduser()))
    if path.is_dir():
        return find_shards(path) or find_layout(path)
    suffix = path.suffix.lower()
    if path.is_file() and suffix in SUFFIXES:
        return find_list(path)
    # What is compressed is refused by its first bytes, with a way out.
    shards = (
        find_shards(path) if path.is_file() and (suffix in (".tar", ".tgz") or ".tar." in path.name.lower()) else None
    )
    return shards or find_layout(path)
