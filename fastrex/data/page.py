"""Samples and their crops as one HTML page that needs nothing else: no script, no network, every image inside."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from PIL import Image

from .. import config as config_module
from ..config import Config
from ..markup import Raw, data_url, document, table, text
from ..settings import toml_value
from .plan import (
    BLUR,
    BRIGHTNESS,
    CONTRAST,
    FLIP,
    GRAY,
    HUE,
    ORDER,
    ORDERS,
    SATURATION,
    SOLARIZE,
    SOLARIZE_OFF,
    CropGroup,
)
from .show import COLOURS, Crop, Sample

COLUMNS = ("FLIP", "ORDER", "BRIGHTNESS", "CONTRAST", "SATURATION", "HUE", "GRAY", "BLUR", "SOLARIZE")
SMALL = 64  # pixels: below that a crop is shown with hard edges, so that its pixels show

STYLE = """
article { margin: 1.25rem 0; padding: .75rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; display: grid; gap: .75rem; grid-template-columns: minmax(0, 1fr); }
h2 { color: var(--text); }
svg { display: block; width: 100%; height: auto; max-height: 32rem; }
rect { fill: transparent; stroke-width: 2px; vector-effect: non-scaling-stroke; }
.crops { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 9.25rem), 1fr));
  align-content: start; }
.crops img { display: block; width: 100%; max-width: 14rem; height: auto; border-width: 3px; border-style: solid; }
.small { image-rendering: pixelated; }
figcaption ol { margin: 0; padding-left: 1.1rem; }
figcaption b { color: var(--text); }
@media (min-width: 50rem) { article { grid-template-columns: minmax(0, 22rem) minmax(0, 1fr); } }
"""


def page(samples: Sequence[Sample], config: Config, title: str, command: str, notices: Iterable[str]) -> str:
    """The page of ``samples``; ``config`` is what they were drawn with, ``command`` what makes the page again."""
    crops = samples[0].crops
    groups = {crop.group: crop.colour for crop in crops}
    # The crop under the pointer shows its box, without a script.
    pointed = "".join(
        f"article:has(.crop{i}:hover) .box{i} {{ stroke-width: 6px; fill: rgb(255 255 255 / .25); }}\n"
        for i in range(len(crops))
    )
    colours = "".join(
        f".colour{i} {{ stroke: {colour}; border-color: {colour}; }}\n" for i, colour in enumerate(COLOURS)
    )
    body = [
        f"<h1>{text(title)}</h1>",
        *(f'<p class="dim">{text(line)}</p>' for line in notices),
        *([f"<p><code>{text(command)}</code></p>"] if command else []),
        _groups(groups),
        _settings(config),
        *(_article(number, sample) for number, sample in enumerate(samples)),
    ]
    return document(title, "\n".join(body), f"{STYLE}{colours}{pointed}")


def words(crop: Crop) -> list[str]:
    """What is done to a crop, in order."""
    params = crop.params
    jitters = (
        (BRIGHTNESS, 1, f"brightness ×{params[BRIGHTNESS]:.2f}"),
        (CONTRAST, 1, f"contrast ×{params[CONTRAST]:.2f}"),
        (SATURATION, 1, f"saturation ×{params[SATURATION]:.2f}"),
        (HUE, 0, f"hue turned by {360 * params[HUE]:+.0f}°"),
    )
    done = ["flipped"] if params[FLIP] else []
    done += [name for column, off, name in (jitters[op] for op in ORDERS[int(params[ORDER])]) if params[column] != off]
    done += ["made grey"] if params[GRAY] else []
    done += [f"blurred by {params[BLUR]:.2f} px"] if params[BLUR] else []
    done += [f"solarised from {params[SOLARIZE]:.0f}"] if params[SOLARIZE] < SOLARIZE_OFF else []
    return done


def _groups(groups: dict[CropGroup, str]) -> str:
    rows = [
        (g.name, g.crops, f"{g.size} × {g.size}", f"{g.scale[0]:.0%} to {g.scale[1]:.0%}", f"{g.blur:.0%}",
         f"{g.solarize:.0%}")
        for g in groups
    ]  # fmt: skip
    return table(("crops", "number", "size", "area of the image", "blur", "solarise"), rows)


def _settings(config: Config) -> str:
    rows = [
        (Raw(f"<code>{text(section)}.{text(key)}</code>"), Raw(f"<code>{text(toml_value(value))}</code>"), help)
        for section, key, value, help in config_module.items(config)
        if section in ("data", "augment") or (section, key) in (("optim", "batch_size"), ("run", "seed"))
    ]
    return f"<details><summary>settings of recipe {text(config.recipe)}</summary>{table((), rows)}</details>"


def _article(number: int, sample: Sample) -> str:
    facts = f"{sample.width} × {sample.height} pixels, row {sample.row}, {sample.note}"
    return (
        f'<article id="sample{number}"><figure>{_source(sample)}<figcaption><h2>{text(sample.label)}</h2>'
        f"<p><b>{text(sample.name)}</b></p><p>{text(facts)}</p></figcaption></figure>"
        f'<div class="crops">{"".join(_crop(i, crop, sample) for i, crop in enumerate(sample.crops))}</div></article>'
    )


def _source(sample: Sample) -> str:
    width, height = sample.width, sample.height
    inside = [f"<title>{text(sample.name)} and its crops</title>"]
    if sample.source:
        data = _data(sample.source, "JPEG")
        inside.append(f'<image href="{data}" width="{width}" height="{height}" preserveAspectRatio="none"/>')
    for i, crop in enumerate(sample.crops):
        top, left, high, wide = crop.box
        inside.append(
            f'<rect class="{_colour(crop)} box{i}" x="{left}" y="{top}" width="{wide}" height="{high}">'
            f"<title>{text(_name(crop))}</title></rect>"
        )
    missing = "" if sample.source else '<p class="dim">Pillow cannot show this file; the training reads it.</p>'
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(inside)}</svg>{missing}'


def _crop(i: int, crop: Crop, sample: Sample) -> str:
    top, left, height, width = crop.box
    side = crop.group.size
    share = width * height / (sample.width * sample.height)
    done = "".join(f"<li>{text(word)}</li>" for word in words(crop)) or "<li>nothing</li>"
    numbers = ", ".join(f"{name} {value:.6g}" for name, value in zip(COLUMNS, crop.params.tolist(), strict=True))
    shape = f"{_colour(crop)} small" if side < SMALL else _colour(crop)
    alt = text(f"{_name(crop)} of {sample.name}")
    return (
        f'<figure class="crop{i}"><img class="{shape}" src="{_data(crop.picture, "PNG")}" width="{side}" '
        f'height="{side}" alt="{alt}"><figcaption><b>{text(_name(crop))}</b><p>{width} × {height} at x {left}, '
        f"y {top}, {share:.1%} of the image</p><ol>{done}</ol><details><summary>numbers</summary>"
        f"<code>{text(numbers)}</code></details></figcaption></figure>"
    )


def _name(crop: Crop) -> str:
    return f"{crop.group.name} {crop.number}"


def _colour(crop: Crop) -> str:
    return f"colour{COLOURS.index(crop.colour)}"


def _data(picture: Image.Image, kind: str) -> str:
    """As a data URL: PNG keeps every pixel of a crop, JPEG is enough for the image that it comes from."""
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **({"quality": 85} if kind == "JPEG" else {}))
    return data_url(buffer.getvalue(), kind.lower())
