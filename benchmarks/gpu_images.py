"""Class folders of JPEG files for a machine that has no images: sizes and bytes like ImageNet's, content like none."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

CLASSES, PER_CLASS, DISTINCT = 16, 128, 128
# Height and width, in the proportion in which they are common.
SHAPES = ((375, 500), (375, 500), (500, 375), (333, 500), (500, 500))


def write(folder: Path, classes: int = CLASSES, per_class: int = PER_CLASS, distinct: int = DISTINCT) -> None:
    """Write the files, of which ``distinct`` differ: to decode one costs the same every time."""
    from PIL import Image

    random = np.random.default_rng(0)
    temporary = folder.with_name(f"{folder.name}.tmp")
    source = temporary / "source.jpg"
    contents = []
    temporary.mkdir(parents=True)
    for number in range(distinct):
        height, width = SHAPES[number % len(SHAPES)]
        # Coarse shapes and fine grain together cost a decoder what a photograph of that size costs, about 110 kB.
        coarse = Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        grain = random.integers(-28, 29, (height, width, 1), dtype=np.int16)
        Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(source, quality=88)
        contents.append(source.read_bytes())
    source.unlink()
    for number in range(classes * per_class):
        place = temporary / f"class-{number % classes:02d}" / f"{number:05d}.jpg"
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(contents[number % distinct])
    temporary.rename(folder)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
