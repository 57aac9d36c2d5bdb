"""Activations that are computed again in the backward instead of being kept (Chen et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Whether a forward is one of the backward's. A plain global: one process drives one device, and the thread that runs
# the forward waits for the backward's.
_again = False


def again() -> bool:
    """Whether this forward repeats an earlier one, which must leave no second trace in running statistics."""
    return _again


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor, *, random: bool = False) -> Tensor:
    """``function(x)``, of which only ``x`` is kept for the backward.

    Args:
        random: whether ``function`` draws random numbers. Repeating them reads the generator's state, which no CUDA
            graph can capture.
    """
    result: Tensor = checkpoint(
        function,
        x,
        use_reentrant=False,
        preserve_rng_state=random,
        context_fn=_contexts,
    )
    return result


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _repeating()


@contextmanager
def _repeating() -> Iterator[None]:
    global _again
    before, _again = _again, True
    try:
        yield
    finally:
        _again = before
