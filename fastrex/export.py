"""Read an encoder from any source, and write it as a folder that fastrex, torchvision, timm and the Hub can load."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from . import checkpoint, files, layouts, tensorfile, untrusted
from . import config as config_module
from .card import model_card
from .config import DataConfig, ModelConfig
from .errors import FastrexError
from .model.resnet import build_encoder, infer_arch
from .model.size import NoLargerThan
from .rundir import CONFIG, version
from .settings import build

WEIGHTS, FACTS, CARD = "model.safetensors", "config.json", "README.md"
TARGETS = ("torchvision", "timm", "hf")
_PREPROCESSING = ("mean", "std", "eval_resize", "eval_size")
_MAX_JSON = 2**20


@dataclass(frozen=True)
class Source:
    """An encoder as it was found.

    Attributes:
        state: its tensors under torchvision's names (timm's for a ``timm:`` encoder).
        arch: arch, stem, width and bn_eps, as in ``ModelConfig``.
        preprocessing: mean, std, eval_resize, eval_size as in ``DataConfig``; empty where the source does not say.
        provenance: where it came from, as words.
        facts: recipe, license and figures that the source knows.
        channels: of the images, 3 or 1 (grey).
    """

    state: dict[str, Tensor]
    arch: dict[str, Any]
    preprocessing: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    channels: int = 3

    def settings(self) -> list[str]:
        """The preprocessing as ``section.key=value`` settings."""
        grey = ["data.channels=1"] if self.channels == 1 else []
        return [*grey, *(f"data.{key}={json.dumps(value)}" for key, value in self.preprocessing.items())]


def load_source(source: str | Path) -> Source:
    """Read an encoder from a run, a checkpoint, an export, a ``.safetensors`` file or a foreign ``.pth``/``.pt``.

    A run gives its newest good checkpoint, or its export where that is of the same step or nothing else is left.

    Raises:
        FastrexError: nothing is there, it is damaged, or it holds no encoder that fastrex knows.
    """
    path = Path(source)
    if path.is_dir():
        if (path / CONFIG).is_file() or (path / "checkpoints").is_dir():
            return _from_run(path)
        if (path / checkpoint.STATE).is_file():
            return _from_checkpoint(path)
        if (path / WEIGHTS).is_file():
            return _from_weights(path / WEIGHTS)
        raise FastrexError(
            f"load_source: {path} must be a run, a checkpoint or an export, got a folder without {WEIGHTS}"
        )
    if not path.exists():
        raise FastrexError(
            f"load_source: {path} does not exist; give a run, a checkpoint, an export, .safetensors or .pth"
        )
    if path.suffix in (".pth", ".pt"):
        state, provenance = layouts.encoder_state(path)
        arch = _arch(state, path, {})
        return Source(state, arch, provenance=provenance, channels=_channels(state, arch))
    if path.suffix == ".safetensors":
        inside = path.name == WEIGHTS and (path.parent / checkpoint.STATE).is_file()
        return _from_checkpoint(path.parent) if inside else _from_weights(path)
    raise FastrexError(f"load_source: {path} must end in .safetensors, .pth or .pt, got {path.suffix or 'no ending'}")


def load_encoder(source: str | Path) -> nn.Module:
    """The encoder of ``source`` (see :func:`load_source`) in eval mode: images [B, C, H, W] -> features [B, D].

    C is 3, or 1 for an encoder of grey images. ``num_features`` of the module is D. A ``ResNet``, or timm's model for a
    ``timm:`` encoder.
    """
    return assemble(load_source(source), str(source))


def export(
    source: str | Path,
    out: str | Path,
    to: str = "torchvision",
    *,
    facts: Mapping[str, object] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the encoder of ``source`` into the folder ``out``: weights, ``config.json`` (timm's schema), model card.

    The folder appears by one rename, after its weights were read back into a fresh model and gave the same bits.

    Args:
        source: see :func:`load_source`.
        out: new or empty folder.
        to: "torchvision" or "timm" (refused for networks that these do not have; torchvision has none for grey
            images), or "hf" (every encoder).
        facts: ``recipe``, ``license`` (an identifier of the Hub), and figures for the card.
        overwrite: replace an export that already stands in ``out`` (nothing else is ever replaced).

    Raises:
        ValueError: unknown ``to``.
        FastrexError: bad source, ``out`` not empty, no counterpart in ``to``, or the written files do not verify.
    """
    if to not in TARGETS:
        raise ValueError(f"export: to must be one of {', '.join(TARGETS)}, got {to!r}")
    out = Path(out)
    there = {entry.name for entry in out.iterdir()} if out.is_dir() else set()
    if there and not (overwrite and there <= {WEIGHTS, FACTS, CARD}):
        raise FastrexError(f"export: OUT must be a new or empty folder, got {out}; choose another")
    if out.exists() and not out.is_dir():
        raise FastrexError(f"export: OUT must be a folder, got the file {out}")
    found = load_source(source)
    if to != "hf" and _counterpart(found, to) is None:
        known = ", ".join(f"{key}={value}" for key, value in {**found.arch, "channels": found.channels}.items())
        other = "--to timm, or " if _counterpart(found, "timm") else ""
        raise FastrexError(
            f"export: {to} has no counterpart of this encoder ({known}); use {other}--to hf and fastrex.load_encoder"
        )
    model = assemble(found, str(source))
    temp = out.parent / f".{out.name}.tmp-{os.getpid()}"
    old = out.parent / f".{out.name}.old-{os.getpid()}"
    try:
        temp.mkdir(parents=True)
        _write(temp, model, found, dict(facts or {}))
        _verify(temp, model, found)
        if there:
            out.rename(old)
        temp.rename(out)
        files.sync(out.parent)
    except OSError as error:
        raise FastrexError(
            f"export: {out} cannot be written ({error.strerror or error}); free space or choose another"
        ) from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    return out


def _from_run(run: Path) -> Source:
    written = _from_weights(run / "export" / WEIGHTS) if (run / "export" / WEIGHTS).is_file() else None
    damage = "there is none"
    for step in reversed(checkpoint.steps(run)):
        # A run that went on after its export has newer weights in its checkpoints.
        if written is not None and written.provenance.get("step") == str(step):
            return written
        try:
            return _from_checkpoint(checkpoint.folder(run, step))
        except checkpoint.BadCheckpoint as error:
            damage = str(error)
    if written is not None:
        return written
    raise FastrexError(f"load_source: {run} must hold an export or a good checkpoint: {damage}")


def _from_checkpoint(path: Path) -> Source:
    manifest = checkpoint.read_state(path)
    file = checkpoint.verified(path, manifest, WEIGHTS)
    tensors = {key: value for key, value in tensorfile.load(file).items() if key.startswith("encoder.")}
    state = {key.removeprefix("encoder."): value for key, value in tensors.items()}
    run = path.resolve().parent.parent
    provenance = {
        "run": run.name,
        "step": str(manifest["step"]),
        "sha256": manifest["files"][WEIGHTS]["sha256"],
        "prefix": "encoder.",
    }
    if not (run / CONFIG).is_file():
        arch = _arch(state, path, {})
        return Source(state, arch, provenance=provenance, channels=_channels(state, arch))
    config = config_module.read(run / CONFIG)
    preprocessing = {key: getattr(config.data, key) for key in _PREPROCESSING}
    model = config.model
    known = {"arch": model.arch, "stem": model.stem, "width": model.width, "bn_eps": model.bn_eps}
    arch = _arch(state, path, known)
    channels = _channels(state, arch, config.data.channels)
    return Source(state, arch, preprocessing, provenance, {"recipe": config.recipe}, channels)


def _from_weights(path: Path) -> Source:
    """A safetensors file, with the ``config.json`` beside it where it is the weights of an export."""
    facts = _facts(path.parent / FACTS) if path.name == WEIGHTS and (path.parent / FACTS).is_file() else {}
    own = _section(facts, "fastrex")
    tensors = tensorfile.load(path)
    digest = files.digest(path)
    if own.get("sha256", digest) != digest:
        raise FastrexError(f"load_source: {path} must match its checksum in {FACTS}, it is damaged or was replaced")
    # An export of an export names the first origin.
    provenance = {key: str(value) for key, value in _section(own, "provenance").items()}
    provenance = provenance or {"file": path.name, "sha256": digest}
    if str(own.get("arch")).startswith("timm:"):
        state = tensors
    else:
        prefixes = sorted(layouts.encoder_prefixes(tensors), key=len)
        if not prefixes:
            raise FastrexError(
                f"load_source: {path} must hold the weights of a ResNet, got {', '.join(list(tensors)[:5])}, ..."
            )
        state = layouts.select_encoder(tensors, prefixes[0])
    known = _section(own, "preprocessing") if own else _from_timm(_section(facts, "pretrained_cfg"), path)
    checked = build(DataConfig, {k: v for k, v in known.items() if k in _PREPROCESSING}, "data")
    preprocessing = {key: getattr(checked, key) for key in _PREPROCESSING if key in known}
    carried = {key: own[key] for key in ("recipe", "license") if own.get(key)} | _section(own, "metrics")
    arch = _arch(state, path, own)
    channels = _channels(state, arch, 1 if own.get("channels") == 1 else 3)
    return Source(state, arch, preprocessing, provenance, carried, channels)


def _from_timm(cfg: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The preprocessing that a model of timm's library on the Hub describes; nothing where it does not."""
    if not {"mean", "std", "crop_pct", "input_size"} <= cfg.keys():
        return {}
    try:
        size = int(cfg["input_size"][-1])
        resize = math.floor(size / cfg["crop_pct"])
        # One number stands for all channels, as in timm.
        mean, std = ([*cfg[key]] * (3 if len(cfg[key]) == 1 else 1) for key in ("mean", "std"))
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise FastrexError(f"load_source: {path.parent / FACTS} has an unusable pretrained_cfg ({error})") from None
    return {"mean": mean, "std": std, "eval_resize": resize, "eval_size": size}


def _arch(state: Mapping[str, Tensor], path: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """The encoder's kind: of a ResNet read from its tensors, so that a wrong file beside them cannot mislead."""
    eps = build(ModelConfig, {"bn_eps": known.get("bn_eps", ModelConfig.bn_eps)}, "model").bn_eps
    if str(known.get("arch")).startswith("timm:"):
        return {"arch": str(known["arch"]), "stem": ModelConfig.stem, "width": ModelConfig.width, "bn_eps": eps}
    try:
        return {**infer_arch(state), "bn_eps": eps}
    except FastrexError as error:
        raise FastrexError(f"load_source: {path} holds no encoder that fastrex knows: {error}") from None


def _channels(state: Mapping[str, Tensor], arch: Mapping[str, Any], known: int = 3) -> int:
    """Of the images: a ResNet's first layer says it, for timm's networks it must be ``known``."""
    return known if str(arch["arch"]).startswith("timm:") else int(state["conv1.weight"].shape[1])


def assemble(source: Source, name: str) -> nn.Module:
    """The encoder of a source that has been read, in eval mode; ``name`` is what errors call it."""
    config = ModelConfig(**source.arch)
    try:
        if not config.arch.startswith("timm:"):
            # Without memory first: a first layer alone can claim a width whose other layers no machine could hold.
            with torch.device("meta"):
                build_encoder(config, source.channels).load_state_dict(source.state, assign=True)
        with NoLargerThan(source.state, name):
            model = build_encoder(config, source.channels)
        model.load_state_dict(source.state)
    except FastrexError:
        raise
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:200]
        raise FastrexError(f"load_encoder: {name} must fit {source.arch['arch']}, it does not: {problem}") from None
    return model.eval()


def _counterpart(source: Source, library: str) -> str | None:
    """The name of the same network in torchvision or timm, if there is one."""
    arch = str(source.arch["arch"])
    if arch.startswith("timm:"):
        return arch.removeprefix("timm:") if library == "timm" else None
    plain = all(source.arch[key] == getattr(ModelConfig, key) for key in ("stem", "width", "bn_eps"))
    return arch if plain and (source.channels == 3 or library == "timm") else None


def _write(folder: Path, model: nn.Module, source: Source, facts: dict[str, object]) -> None:
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    weights = safetensors.torch.save(tensors, {"format": "pt"})
    _write_file(folder / WEIGHTS, weights)
    merged = {**source.facts, **facts}
    data, grey = DataConfig(**source.preprocessing), source.channels == 1
    config = {
        "architecture": _counterpart(source, "timm") or f"fastrex_{source.arch['arch']}",
        "num_classes": 0,
        "num_features": model.num_features,
        **({"model_args": {"in_chans": 1}} if grey else {}),
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [source.channels, data.eval_size, data.eval_size],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": _crop_pct(data.eval_size, data.eval_resize),
            "crop_mode": "center",
            "mean": [sum(data.mean) / 3] if grey else list(data.mean),
            "std": [sum(data.std) / 3] if grey else list(data.std),
            "num_classes": 0,
            **_timm_facts(model),
        },
        "fastrex": {
            "version": version(),
            **source.arch,
            **({"channels": 1} if grey else {}),
            "preprocessing": source.preprocessing,
            "recipe": merged.pop("recipe", None),
            "license": merged.pop("license", None),
            "metrics": merged,
            "provenance": source.provenance,
            "sha256": hashlib.sha256(weights).hexdigest(),
        },
    }
    try:
        text = json.dumps(config, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"export: facts must be plain numbers and words, got {error}") from None
    _write_file(folder / FACTS, f"{text}\n".encode())
    _write_file(
        folder / CARD,
        model_card(
            config,
            assumed=not source.preprocessing,
            torchvision=_counterpart(source, "torchvision"),
            timm=_counterpart(source, "timm"),
        ).encode("utf-8", "replace"),  # halves of characters, as a source's JSON may hold them
    )
    files.sync(folder)


def _crop_pct(size: int, resize: int) -> float:
    """size / resize, rounded so that timm's floor(size / crop_pct) gives ``resize`` back."""
    share = size / resize
    return share if math.floor(size / share) == resize else math.nextafter(share, 0.0)


def _timm_facts(model: nn.Module) -> dict[str, Any]:
    own = getattr(model, "pretrained_cfg", None) or {"pool_size": (7, 7), "first_conv": "conv1", "classifier": "fc"}
    return {key: own[key] for key in ("pool_size", "first_conv", "classifier") if own.get(key) is not None}


def _verify(folder: Path, model: nn.Module, source: Source) -> None:
    """Read the folder as a user would, and compare its outputs bit for bit."""
    written = load_source(folder)
    # A timm network may accept one size only; a ResNet takes any, and small images are quicker.
    size = DataConfig(**source.preprocessing).eval_size if str(source.arch["arch"]).startswith("timm:") else 64
    images = torch.randn(2, source.channels, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted, got = model(images), assemble(written, str(folder))(images)
    if not torch.isfinite(wanted).all():
        raise FastrexError("export: the encoder must give finite features, it does not; its training diverged")
    if written.arch != source.arch or not torch.equal(got, wanted):
        raise FastrexError(
            "export: the written weights must give the source's features, they do not; check disk and memory"
        )


def _facts(path: Path) -> dict[str, Any]:
    try:
        facts = untrusted.read_json(path, _MAX_JSON)
    except (OSError, ValueError) as error:
        raise FastrexError(
            f"load_source: {path} must be a model's JSON description, it cannot be read ({error})"
        ) from None
    return facts if isinstance(facts, dict) else {}


def _section(facts: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = facts.get(name)
    return section if isinstance(section, dict) else {}


def _write_file(path: Path, data: bytes) -> None:
    """Write through to the disk; opened by Python, so that its mode follows the umask."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
