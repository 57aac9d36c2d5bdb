"""The state digest notices every bit, place, name and shape, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastrex import digests
from fastrex.digests import state_digest

FACTS = {"step": 3, "seed": 0}


def of(tensor: Tensor, name: str = "w") -> str:
    return str(state_digest({"model": {name: tensor}}, FACTS))


def raw(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.float8_e4m3fn],
)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 3), (3, digests.ROW), (2 * digests.ROW + 3,)])
def test_one_flipped_bit_anywhere_changes_it(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randint(0, 100, shape).to(dtype)
    whole, size = of(tensor), raw(tensor).numel()
    places = {0, size - 1, size // 2, *torch.randint(0, size, (20,)).tolist()}
    seen = {whole}
    for place in places:
        for bit in (0, 3, 7):
            other = tensor.clone()
            raw(other)[place] ^= 1 << bit
            seen.add(of(other))
    assert len(seen) == 1 + 3 * len(places)
    assert of(tensor) == whole


def test_two_flipped_signs_change_it() -> None:
    # What a plain wrapping sum of products would not see.
    tensor = torch.randn(1000)
    other = tensor.clone()
    other[[3, 501]] *= -1
    assert of(other) != of(tensor)


@pytest.mark.parametrize("size", [6, digests.ROW * 4])
def test_swapped_values_rows_and_blocks_change_it(size: int) -> None:
    tensor = torch.randn(size)
    seen = {of(tensor), of(tensor.flip(0)), of(tensor.roll(1)), of(tensor.roll(size // 2))}
    pair = tensor.clone()
    pair[[0, 2]] = pair[[2, 0]]
    assert len(seen | {of(pair)}) == 5


def test_names_shapes_dtypes_and_facts_count() -> None:
    a, b = torch.zeros(4), torch.ones(4)
    base = str(state_digest({"model": {"a": a, "b": b}, "bank": {}}, FACTS))
    others = [
        state_digest({"model": {"a": b, "b": a}}, FACTS),
        state_digest({"model": {"a": a}, "ema": {"b": b}}, FACTS),
        state_digest({"model": {"a": a, "c": b}}, FACTS),
        state_digest({"model": {"a": a.reshape(2, 2), "b": b}}, FACTS),
        state_digest({"model": {"a": a.view(torch.int32), "b": b}}, FACTS),
        state_digest({"model": {"a": a, "b": b, "empty": torch.zeros(0)}}, FACTS),
        state_digest({"model": {"a": a, "b": b}}, {**FACTS, "step": 4}),
    ]
    assert len({base, *map(str, others)}) == 8
    assert str(state_digest({"model": {"b": b, "a": a}}, dict(reversed(FACTS.items())))) == base


def test_strides_and_alignment_do_not_count() -> None:
    image = torch.randn(8, 3, 5, 7)
    assert (
        of(image)
        == of(image.to(memory_format=torch.channels_last))
        == of(image.permute(3, 2, 1, 0).permute(3, 2, 1, 0))
    )
    odd = torch.randn(101)
    assert of(odd[1:]) == of(odd[1:].clone())
    half = torch.randn(101).bfloat16()
    assert of(half[3:]) == of(half[3:].clone())
    assert of(torch.tensor([True, False])) == of(torch.tensor([True, False, True])[:2])


def test_it_is_the_same_for_any_block(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(20 * digests.ROW + 5)
    whole = of(tensor)
    monkeypatch.setitem(digests.BLOCK, "cpu", digests.ROW)
    assert of(tensor) == whole


def test_it_is_defined_for_ever() -> None:
    # Stored in checkpoints: another definition would refuse those of before.
    assert (
        str(state_digest({"m": {"a": torch.arange(10_000), "b": torch.tensor(1.5)}}, {"step": 1})) == "a79aa66b880d111e"
    )
