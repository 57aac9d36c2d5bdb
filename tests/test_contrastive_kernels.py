"""The contrastive operators' Triton launchers beyond the contract: ranges of keys, chunks, rows that give nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastrex_kernels._op import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="no GPU, and Triton's interpreter is off (TRITON_INTERPRET=1)"
)
IGNORED = -100


def pairing(rows: int, keys: int, dim: int = 20, images: bool = True) -> tuple[Any, ...]:
    """What every launcher takes first."""
    g = torch.Generator().manual_seed(rows)
    ids, key_ids = torch.randint(4, (rows,), generator=g), torch.randint(4, (keys,), generator=g)
    ids[::6], key_ids[::7] = IGNORED, IGNORED
    instance, key_instance = torch.arange(rows), torch.randint(2 * rows, (keys,), generator=g)
    x, k = torch.randn(rows, dim, generator=g), torch.randn(keys, dim, generator=g)
    found = (x, k, ids, key_ids, *((instance, key_instance) if images else (None, None)))
    return *(None if t is None else t.to(DEVICE) for t in found), 5, IGNORED


def both(
    pairs: tuple[Any, ...], options: tuple[Any, ...], coefficients: Tensor, **more: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics, counts and gradients."""
    from fastrex_kernels.contrastive_ce.kernel import contrastive_ce, contrastive_ce_backward

    words = (*pairs, *options, torch.float32)
    stats, counts = contrastive_ce(*words, **more)
    return stats, counts, *contrastive_ce_backward(*words, stats, coefficients, True, len(pairs[1]) - 3, **more)


@pytest.mark.parametrize("options", [(0.1, 0.0, 0, 0.0), (0.05, 0.7, 1, 0.2), (0.2, 1.0, 2, 0.5)], ids=str)
def test_ranges_of_keys_and_of_rows_add_up(options: tuple[Any, ...]) -> None:
    pairs = pairing(130, 290)
    coefficients = torch.randn(4, 130, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    coefficients[3] *= options[1] > 0
    whole = both(pairs, options, coefficients, _splits=1)
    parts = both(pairs, options, coefficients, _splits=3)
    assert torch.equal(parts[1], whole[1])
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6)


def test_a_range_without_a_pair_adds_nothing() -> None:
    x, k, ids, key_ids, *_ = pairing(9, 512, images=False)
    for positive_at, negative_at in ((3, 500), (500, 3)):
        key_ids[:] = IGNORED
        ids[:], key_ids[positive_at], key_ids[negative_at] = 1, 1, 2
        stats, counts, dx, _ = both(
            (x, k, ids, key_ids, None, None, 0, IGNORED), (0.001, 1.0, 0, 0.0), torch.ones(4, 9, device=DEVICE),
            _splits=4,
        )  # fmt: skip
        s = torch.nn.functional.cosine_similarity(x[:, None], k[None, [positive_at, negative_at]], dim=2) / 0.001
        expected = torch.stack((s[:, 0], s[:, 0], 2 * s[:, 1], s[:, 1], s[:, 0], s[:, 1]))
        torch.testing.assert_close(stats, expected, rtol=1e-5, atol=1e-3)
        assert (counts == 1).all()
        assert dx.isfinite().all()


@pytest.mark.parametrize("hardness", [0.0, 2.0])
def test_rows_without_weight_get_exactly_nothing(hardness: float) -> None:
    pairs = pairing(40, 70)
    x, k, ids, key_ids = pairs[:4]
    x[3], k[5] = 0.0, 0.0
    coefficients = torch.randn(4, 40, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    ids[1::5] = 77  # a class that no key has
    coefficients[:, 1::5] = 0
    coefficients[:, 2::5] = 0
    coefficients[3] *= hardness > 0
    # So cold that a wrong exponent is infinite.
    stats, _, dx, dk = both(pairs, (0.002, hardness, 0, 0.0), coefficients)
    assert (stats[0, 1::5] == -torch.inf).all()
    silent = (coefficients == 0).all(0) | (ids == IGNORED)
    silent[3] = True
    assert not dx[silent].any()
    assert not dk[key_ids[:-3] == IGNORED].any()
    assert not dk[5].any()
    assert dx.isfinite().all()
    assert dk.isfinite().all()
    assert dx.any()
    assert dk.any()


# The interpreter's numpy says so of what is overwritten afterwards.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("dim", [20, 300])
@pytest.mark.parametrize("options", [(0.1, 0.0, 0, 0.0), (0.05, 1.0, 1, 0.2)], ids=str)
def test_a_nan_is_seen_and_stays_in_its_row(options: tuple[Any, ...], dim: int) -> None:
    from fastrex_kernels.contrastive_ce.kernel import nearest_keys

    pairs = pairing(50, 200, dim)
    x, k, ids, key_ids = pairs[:4]
    coefficients = torch.ones(4, 50, device=DEVICE)
    coefficients[3] *= options[1] > 0
    clean = both(pairs, options, coefficients)
    x[ids == IGNORED], k[key_ids == IGNORED] = torch.nan, torch.inf  # nobody looks at these
    for splits in (1, 3):
        for one, other in zip(
            both(pairs, options, coefficients, _splits=splits), both(pairs, options, coefficients), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6)
    for one, other in zip(both(pairs, options, coefficients), clean, strict=True):
        assert torch.equal(one, other)
    assert ids[3] != IGNORED
    x[3, 5] = torch.nan
    stats, _, dx, _ = both(pairs, options, coefficients)
    seen = torch.tensor([0, 1, 2, 4, 5], device=DEVICE)
    assert stats[seen, 3].isnan().all()
    assert dx[3].isnan().all()
    others = torch.arange(50, device=DEVICE) != 3
    assert torch.equal(stats[:, others], clean[0][:, others])
    assert dx[others].isfinite().all()
    value, index = nearest_keys(*pairs, 6, torch.float32)
    assert value[3].isnan().all()
    assert (index[3] >= 0).all()
    assert not value[others].isnan().any()


@pytest.mark.parametrize(("rows", "cosines"), [(1024, 2**22), (30, 1000), (7, 70)])
def test_chunks_find_the_nearest_keys_of_all(rows: int, cosines: int) -> None:
    from fastrex_kernels.contrastive_ce.kernel import nearest_keys

    pairs = pairing(50, 160)
    x, k, ids, key_ids, instance, key_instance, private, _ = pairs
    cosine = torch.nn.functional.normalize(x.double()) @ torch.nn.functional.normalize(k.double()).T
    out = (ids == IGNORED)[:, None] | (key_ids == IGNORED) | (instance[:, None] == key_instance)
    out |= (torch.arange(160, device=DEVICE) < private) & (ids[:, None] != key_ids)
    best, index = cosine.masked_fill(out, -torch.inf).topk(25)
    found, at = nearest_keys(*pairs, 25, torch.float32, _rows=rows, _cosines=cosines)
    assert torch.equal(at, torch.where(best == -torch.inf, -1, index))
    torch.testing.assert_close(found, best.float(), rtol=0, atol=1e-6)
