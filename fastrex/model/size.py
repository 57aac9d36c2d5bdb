"""Networks no larger than the file that is to fill them: seen while they are built, before their memory is taken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import FastrexError

ROOM = 1 << 24  # values that a network may make beside those that its file holds
_FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn}
_PLACES = {"device", "generator", "out", "pin_memory"}


class NoLargerThan(TorchFunctionMode):
    """While it is entered, tensors of at most about twice the values of ``state`` are made, all together.

    Not every network of timm's can be built without memory to compare its shapes: some compute with numbers of theirs.

    Args:
        name: what messages call the source of ``state``.

    Raises:
        FastrexError: inside, for a network that ``state`` cannot fill.
    """

    def __init__(self, state: Mapping[str, Tensor], name: str) -> None:
        super().__init__()
        self.held = sum(tensor.numel() for tensor in state.values())
        self.left = 2 * self.held + ROOM
        self.name = name

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES:
            shaped = {key: value for key, value in kwargs.items() if key not in _PLACES}
            self.left -= func(*args, **shaped, device="meta").numel()
            if self.left < 0:
                raise FastrexError(
                    f"load_encoder: {self.name} must hold all values of its network, got {self.held}, and the network "
                    "takes more than twice as many"
                )
        return func(*args, **kwargs)
