"""A process of its own for test_check.py: ruin small JPEGs, index, check and train on what the check lets through.

python fuzz_jpegs.py FOLDER COUNT prints what happened as JSON; a crash, a hang or too much memory is for the caller.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from odd_files import PICTURE, encode, turned

from fastrex.config import AugmentConfig, DataConfig
from fastrex.data.check import check
from fastrex.data.index import build
from fastrex.data.loader import TrainLoader
from fastrex.data.plan import Plan

GIGABYTE = 1 << 30
SOUND = (
    encode("JPEG", quality=75),
    encode("JPEG", quality=90, subsampling=0),
    encode("JPEG", subsampling=1, optimize=True),
    encode("JPEG", PICTURE.convert("L")),
    encode("JPEG", PICTURE.convert("CMYK")),
    encode("JPEG", progressive=True),
    encode("JPEG", PICTURE.convert("L"), progressive=True),
    encode("JPEG", PICTURE.convert("CMYK"), progressive=True),
    encode("JPEG", exif=turned(6)),
    encode("JPEG", restart_marker_blocks=2),
)
SIZES = (0, 1, 2, 3, 16, 30, 49, 50, 64, 255, 256, 1000, 4000, 65500, 65535)
FACTORS = (0x11, 0x21, 0x12, 0x22, 0x41, 0x14, 0x44, 0x31, 0x13, 0x00, 0xFF)


def segments(data: bytes) -> list[tuple[int, int, int]]:
    """(marker, first byte, length with the marker) of the header's segments, the start of scan last."""
    found, place = [], 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        length = 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        found.append((data[place + 1], place, length))
        place += length
        if found[-1][0] == 0xDA:
            break
    return found


def mutate(sound: bytes, random: np.random.Generator) -> bytes:
    """One of eleven ways to ruin a JPEG."""
    data = bytearray(sound)
    header = segments(sound)
    frames = [place for marker, place, _ in header if marker in (0xC0, 0xC1, 0xC2)]
    body = header[-1][1] + header[-1][2]

    def number(low: int, high: int) -> int:
        return int(random.integers(low, high))

    def noise(length: int) -> bytes:
        return random.integers(0, 256, length, np.uint8).tobytes()

    def flip(low: int, high: int, count: int) -> None:
        for place in random.integers(low, high, count).tolist():
            data[place] = number(0, 256)

    match number(0, 11):
        case 0:
            flip(0, len(data), number(1, 20))
        case 1:
            flip(body, len(data) - 2, number(1, 40))
        case 2:
            flip(2, body, number(1, 6))
        case 3:
            del data[number(0, len(data)) :]
        case 4:
            place = number(0, len(data))
            del data[place : place + number(1, 60)]
        case 5:
            place = number(0, len(data))
            data[place:place] = noise(number(1, 60))
        case 6:
            (_, a, n), (_, b, m) = (header[i] for i in sorted(random.choice(len(header), 2, replace=False)))
            data = data[:a] + data[b : b + m] + data[a + n : b] + data[a : a + n] + data[b + m :]
        case 7:
            side = frames[0] + 5 + 2 * number(0, 2)
            data[side : side + 2] = SIZES[number(0, len(SIZES))].to_bytes(2, "big")
        case 8:
            component = frames[0] + 10 + 3 * number(0, data[frames[0] + 9])
            data[component + 1] = FACTORS[number(0, len(FACTORS))]
            if random.random() < 0.3:
                data[frames[0] + 9] = number(0, 6)
            if random.random() < 0.2:
                data[frames[0] + 4] = (2, 8, 12, 16)[number(0, 4)]
        case 9:
            for marker, place, length in header:
                if marker in (0xC4, 0xDB):
                    flip(place + 2, place + length, number(1, 6))
        case 10:
            _, place, length = header[number(0, len(header))]
            what = number(0, 4)
            if what == 0:
                data[place + 1] = number(0xC0, 0xFF)
            elif what == 1:
                data[place + 2 : place + 4] = number(0, 65536).to_bytes(2, "big")
            elif what == 2:
                data[place:place] = data[place : place + length]
            else:
                del data[place : place + length]
    # An end of image lets most of them past the index.
    return bytes(data) + (b"\xff\xd9" if random.random() < 0.5 else b"")


def write(root: Path, count: int) -> None:
    """``count`` ruined JPEGs and the sound ones, in two classes."""
    for name in ("a", "b"):
        (root / name).mkdir()
        for number, sound in enumerate(SOUND):
            (root / name / f"sound{number}.jpg").write_bytes(sound)
    for number in range(count):
        data = mutate(SOUND[number % len(SOUND)], np.random.default_rng(number))
        (root / "ab"[number % 2] / f"{number:05d}.jpg").write_bytes(data)


def main(root: Path, count: int) -> None:
    faulthandler.enable()
    # Not the address space: the libraries map far more than they use.
    resource.setrlimit(resource.RLIMIT_DATA, (6 * GIGABYTE, 6 * GIGABYTE))
    write(root, count)
    built = build(root)
    checked = check(built, threads=2)
    index = checked.index
    rows = index.rows("train", 0.0)
    data = DataConfig(
        threads=2, global_size=16, local_crops=1, local_size=8, last_batch="pad", on_bad_sample="stop", prefetch=1
    )
    plan = Plan(0, 32, rows, index.heights, index.widths, data, AugmentConfig())
    seen: set[int] = set()
    finite = True
    with TrainLoader(
        index, plan, data, device="cpu", dtype=torch.float32, start=0, stop=plan.steps_per_epoch
    ) as loader:
        for batch in loader:
            seen.update(batch.samples.tolist())
            finite = finite and all(bool(crops.isfinite().all()) for crops in batch.crops)
    result = {
        "files": len(index),
        "good": len(rows),
        "trained": len(seen),
        "finite": finite,
        "bad": Counter(bad.status.name for bad in checked.bad),
        "sound_refused": [bad.name for bad in checked.bad if "sound" in bad.name],
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    os.nice(5)
    main(Path(sys.argv[1]), int(sys.argv[2]))
