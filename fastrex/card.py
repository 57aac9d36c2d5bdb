"""The model card that goes with an exported encoder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def model_card(config: Mapping[str, Any], *, assumed: bool, torchvision: str | None, timm: str | None) -> str:
    """The model card of an exported encoder: what it is, how to load it, how it was made, what it is not for.

    Args:
        config: the content of the export's ``config.json``.
        assumed: the preprocessing is a default, because the source does not say.
        torchvision: name of the same network in torchvision, or None.
        timm: its name in timm, or None.
    """
    own, cfg = config["fastrex"], config["pretrained_cfg"]
    library = "timm" if timm else "fastrex"
    header = [
        "---",
        f"license: {_word(own['license'] or 'other')}",
        f"library_name: {library}",
        "pipeline_tag: image-feature-extraction",
    ]
    header += ["tags:", "- image-feature-extraction", "- fastrex", *(["- timm"] if timm else []), "---", ""]
    size = f"{cfg['input_size'][1]} x {cfg['input_size'][2]}"
    resize = math.floor(cfg["input_size"][1] / cfg["crop_pct"])
    grey = cfg["input_size"][0] == 1
    images = "grey (one channel, 0.299 R + 0.587 G + 0.114 B)" if grey else "RGB"
    mean, std = (f"{cfg[key][0]:.4g}" if grey else cfg[key] for key in ("mean", "std"))
    made = f", trained with the recipe `{_word(own['recipe'])}`" if own["recipe"] else ""
    lines = [
        *header,
        f"# {own['arch']} encoder",
        "",
        f"An image encoder without a classifier: {images} images give features of {config['num_features']} numbers"
        f"{made}. Written by fastrex, a trainer for the t-ReX method (Sariyildiz et al., ICLR 2023).",
        "",
        f"Images: shorter side to {resize} (bilinear), centre crop of {size}, values in [0, 1], "
        f"mean {mean}, standard deviation {std}"
        f"{' (assumed: the source does not say)' if assumed else ''}.",
        "",
        "## Use",
        "",
        *_snippet('import fastrex\n\nencoder = fastrex.load_encoder("path/to/this/folder")'),
    ]
    if torchvision:
        lines += _snippet(
            "import torch\nimport torchvision\nfrom safetensors.torch import load_file\n\n"
            f"model = torchvision.models.{torchvision}()\nmodel.fc = torch.nn.Identity()\n"
            'model.load_state_dict(load_file("model.safetensors"))\nmodel.eval()'
        )
    if timm:
        lines += _snippet(
            'import timm\n\nname = "local-dir:path/to/this/folder"\n'
            "model = timm.create_model(name, pretrained=True, num_classes=0).eval()"
        )
    figures = [f"| {_word(key)} | {_word(value)} |" for key, value in own["metrics"].items()]
    if figures:
        lines += ["## Figures", "", "| what | value |", "|---|---|", *figures, ""]
    shape = ", ".join(f"{key} {own[key]}" for key in ("arch", "stem", "width", "bn_eps", "channels") if key in own)
    lines += ["## Provenance", "", f"* network: {shape}", f"* fastrex: {own['version']}"]
    lines += [f"* {_word(key)}: {_word(value)}" for key, value in own["provenance"].items()]
    lines += [
        f"* sha256 of model.safetensors: {own['sha256']}",
        "",
        "## Limits",
        "",
        "The features carry the biases of the images and labels it was trained on. Nothing here says how it behaves on "
        "other data: measure it before you rely on it. Weights that were converted keep the licence of their source.",
        "",
    ]
    return "\n".join(lines)


def _snippet(code: str) -> list[str]:
    return ["```python", *code.split("\n"), "```", ""]


def _word(value: object) -> str:
    """A value that cannot break out of its line or its cell."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "/").replace("<", "(").replace(">", ")")[:300]
