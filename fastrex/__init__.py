"""fastrex trains transferable supervised image encoders with the t-ReX method.

``fastrex.train(config)`` runs a training, ``fastrex.load_encoder(path)`` gives back an encoder; the command ``fastrex``
does the same from a shell. Importing this package loads neither torch nor DALI.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import Config
    from .export import load_encoder
    from .trainer import Result, train

__all__ = ["Config", "Result", "load_config", "load_encoder", "train"]


def __getattr__(name: str) -> Any:
    if name in ("train", "Result"):
        from . import trainer

        return getattr(trainer, name)
    if name == "load_encoder":
        from .export import load_encoder

        return load_encoder
    if name == "Config":
        from .config import Config

        return Config
    if name == "load_config":
        from .config import load

        return load
    raise AttributeError(f"module 'fastrex' has no attribute {name!r}")
