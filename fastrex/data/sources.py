"""What ``data.path`` may name: a folder of images, a list of them, a tar shard or a folder of shards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from ..errors import FastrexError, explain
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
    try:
        place = Path(os.path.abspath(Path(path).expanduser()))
        place.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # said below, with what may be given
    except OSError as error:
        raise FastrexError(explain(error)) from None
    except (ValueError, RuntimeError) as error:  # a NUL, ~nobody
        raise FastrexError(f"{str(path)!r}: {error}; give the folder with the images") from None
    if place.is_dir():
        return find_shards(place) or find_layout(place)
    suffix = place.suffix.lower()
    if place.is_file() and suffix in SUFFIXES:
        return find_list(place)
    # What is compressed is refused by its first bytes, with a way out.
    tar = place.is_file() and (suffix in (".tar", ".tgz") or ".tar." in place.name.lower())
    return (find_shards(place) if tar else None) or find_layout(place)
