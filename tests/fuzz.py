"""Seeded damage for the readers of files: random bytes, other numbers, other structure."""

from __future__ import annotations

import json
import random
import re
from typing import Any

# What a reader is least prepared for, as JSON.
ODD_JSON = (
    "null", "true", "-1", "0", "1.5", "1e999", "-0", "NaN", "Infinity", "9223372036854775807", "9223372036854775808",
    "18446744073709551616", "9" * 30, "9" * 5000, '""', '"x"', '"../x"', '"/etc/passwd"', '"a\\u0000b"', '"\\ud800"',
    '"timm:x"', "[]", "{}", "[[]]", '{"": 0}', "[" * 200 + "]" * 200, "[" * 100_000, '{"a":' * 2000, "[0, 0]",
    "[-1, 2]", "[4, 4]", "[1099511627776, 1099511627776]", '"F32"', '"F64"', '"BOOL"', "\"" + "y" * 5000 + "\"",
)  # fmt: skip
ODD_BYTES = (b"", b"\0", b"\xff", b"\n", b'"', b"..", b"/", b"-", b"9", b"[", b"{", b"}", b",", b"\x80", b"PK\x03\x04")
NUMBER = re.compile(rb"\d+")


def damaged(rng: random.Random, data: bytes) -> bytes:
    """``data`` with one to three accidents: flipped bits, cuts, insertions, repeats, other numbers."""
    result = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(result) or 1)
        kind = rng.randrange(7)
        if kind == 0 and result:
            result[place] ^= 1 << rng.randrange(8)
        elif kind == 1 and result:
            result[place] = rng.randrange(256)
        elif kind == 2:
            end = len(result) if rng.random() < 0.3 else place + rng.randrange(1, 9)
            del result[place:end]
        elif kind == 3:
            result[place:place] = rng.choice(ODD_BYTES) * rng.choice((1, 1, 2, 50))
        elif kind == 4:
            start = rng.randrange(len(result) or 1)
            result[place:place] = result[start : start + rng.randrange(1, 40)]
        elif kind == 5:
            numbers = list(NUMBER.finditer(result))
            if numbers:
                number = rng.choice(numbers)
                other = rng.choice((b"0", b"1", b"-1", b"7", b"4294967295", b"9223372036854775807", b"9" * 25))
                result[number.start() : number.end()] = other
        else:
            width = rng.choice((2, 4, 8))
            result[place : place + width] = rng.choice((0, 1, 2 ** (8 * width - 1), 2 ** (8 * width) - 1)).to_bytes(
                width, rng.choice(("little", "big"))
            )
    return bytes(result)


def damaged_json(rng: random.Random, content: Any) -> str:
    """``content`` as JSON with one or two values or names exchanged, dropped, or given twice."""
    text = json.dumps(content)
    for _ in range(rng.randint(1, 2)):
        try:
            places = _places(json.loads(text), ())
        except (ValueError, RecursionError):
            return text
        path = rng.choice(places)
        text = _edited(rng, json.loads(text), path)
    return text


def _places(value: Any, path: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in inside for place in _places(inner, (*path, key)))]


def _edited(rng: random.Random, content: Any, path: tuple[Any, ...]) -> str:
    mark = "\x01mark\x01"
    if not path:
        return rng.choice(ODD_JSON)
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    kind = rng.randrange(4)
    if kind == 0:
        del parent[path[-1]]
        return json.dumps(content)
    if kind == 1 and isinstance(parent, dict):
        other = rng.choice(("", "x", "..", "a\0b", "\ud800", "y" * 300, "optimizer.safetensors", "__metadata__"))
        parent[other] = parent.pop(path[-1])
        return json.dumps(content)
    if kind == 2 and isinstance(parent, dict):
        value = json.dumps(parent[path[-1]])
        parent[path[-1]] = mark
        name = json.dumps(path[-1])
        return json.dumps(content).replace(json.dumps(mark), f"{value}, {name}: {rng.choice((value, 'null'))}")
    parent[path[-1]] = mark
    return json.dumps(content).replace(json.dumps(mark), rng.choice(ODD_JSON))
