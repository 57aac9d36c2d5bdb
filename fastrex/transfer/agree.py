"""What the ranks of a transfer must know of one another: whether any of them has met an error, and rank 0's numbers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ..distributed import World, gather_rows, text_from_main
from ..errors import FastrexError

WORDS = 2048  # bytes of an error that travel


def agree(error: FastrexError | None, world: World) -> None:
    """Go on together or not at all: where any rank has met an error, all raise it.

    A rank that raised alone would leave the others waiting for it in their next collective.

    Raises:
        FastrexError: this rank's own error, else that of the first rank that has one.
    """
    if world.size > 1:
        box = torch.zeros(1, WORDS, dtype=torch.uint8)
        words = str(error).encode("utf-8", "backslashreplace")[:WORDS] if error is not None else b""
        box[0, : len(words)] = torch.tensor(list(words), dtype=torch.uint8)
        every = gather_rows(box.to(world.device), world).cpu()
        for said in every:
            if error is None and bool(said[0]):
                error = FastrexError(bytes(said.tolist()).rstrip(b"\0").decode("utf-8", "ignore"))
    if error is not None:
        raise error


def numbers_from_main(numbers: Sequence[int], world: World) -> list[int]:
    """Rank 0's numbers on every rank."""
    found: list[int] = json.loads(text_from_main(json.dumps(list(numbers)), world))
    return found


@contextlib.contextmanager
def shortage(name: str) -> Iterator[None]:
    """What a set may meet that is no fault of the program, as its own error: the other sets go on, and no rank leaves
    the others waiting.

    Raises:
        FastrexError: too little memory for ``name``, or a matrix that cannot be decomposed.
    """
    way_out = ""
    try:
        yield
    except torch.OutOfMemoryError:
        way_out = "fit into the GPU's memory, it does not; free some of it, or give a smaller --batch, or --device cpu"
    except MemoryError:
        way_out = "fit into memory, it does not; free some of it, or use a machine with more"
    except (torch.linalg.LinAlgError, np.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        way_out = f"have features that a probe can be fitted to, it has not ({reason[:200]}); look at the encoder"
    except RuntimeError as error:
        # What torch says on a CPU.
        if "not enough memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        way_out = "fit into memory, it does not; free some of it, or use a machine with more"
    if way_out:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise FastrexError(f"transfer: {name} must {way_out}")
