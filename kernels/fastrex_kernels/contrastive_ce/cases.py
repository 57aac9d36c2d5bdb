"""Sizes at which the contrastive operators are tested and measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._op import Call, Case, Cost, Op, in_cpp
from . import Mixtures, contrastive_cross_entropy, nearest_keys
from .eager import eager, eager_nearest


def make(sizes: Mapping[str, Any], dtype: torch.dtype, device: str, seed: int) -> Call:
    """Queries, keys and their ids.

    ``sizes`` are rows, keys, dim, classes, and what a case is about: ``views`` (the keys are the queries, so many per
    image, and a query does not see itself), ``share`` (crops per id), ``frozen`` (no gradient of the keys), ``lonely``
    (queries of classes that no key has), ``ignored`` (queries), ``unfilled`` (share of the keys), ``images`` (instances
    shared with keys), ``zero`` (zero queries and keys), ``strided``, ``entries`` (mixtures per query), ``scale`` of the
    features, ``stats``; the rest are the function's own options.
    """
    options = dict(sizes)
    take = options.pop
    rows, count, dim, classes = take("rows"), take("keys"), take("dim"), take("classes", 7)
    views, share, unfilled, entries = take("views", 0), take("share", 1), take("unfilled", 0.0), take("entries", 0)
    lonely, ignored, images, zero = (take(word, False) for word in ("lonely", "ignored", "images", "zero"))
    frozen, strided, scale = take("frozen", False), take("strided", False), take("scale", 1.0)
    options["return_stats"] = take("stats", True)
    g = torch.Generator().manual_seed(seed)
    # Classes have a direction, so that the nearest keys are of either kind.
    centre = torch.randn(classes, dim, generator=g)

    def features(number: int, labels: Tensor) -> Tensor:
        values = torch.randn(number, dim, generator=g) + centre[labels] * 0.7
        if zero:
            values[::5] = 0
        values = (values * scale).to(dtype)
        return torch.nn.functional.pad(values, (1, 2)).to(device)[:, 1:-2] if strided else values.to(device)

    ids = torch.randint(classes, (rows // share,), generator=g)
    if views:
        ids = ids[: rows // views].repeat(views)
    key_ids = ids.clone() if views else torch.randint(classes, (count,), generator=g)
    private = options.get("private", 0)
    if private:
        # MoCo: the ids are images, the bank has none of them.
        ids, key_ids = torch.arange(rows), torch.cat((torch.arange(private), torch.full((count - private,), -1)))
        labels, key_labels = ids % classes, torch.randint(classes, (count,), generator=g)
    else:
        labels, key_labels = ids.repeat(share), key_ids
    x = features(rows, labels)
    tensors: dict[str, Any] = {"input": x, "keys": x.clone() if views else features(count, key_labels)}
    if views:
        tensors |= {name: torch.arange(rows, device=device) for name in ("instance", "key_instance")}
    elif images:
        tensors["instance"] = torch.arange(len(ids), device=device)
        tensors["key_instance"] = torch.randint(2 * len(ids), (count,), generator=g).to(device)
    unlabelled = options.get("ignore_index", -100)
    if lonely:
        ids = torch.where(torch.arange(len(ids)) % 4 == 1, classes + 5, ids)
    if ignored:
        ids = torch.where(torch.arange(len(ids)) % 3 == 0, unlabelled, ids)
    if unfilled:
        key_ids = torch.where(torch.rand(count, generator=g) < unfilled, unlabelled, key_ids)
    # Memory that nobody has written: it must show nowhere.
    for name, number in (("input", ids.repeat(share)), ("keys", key_ids)):
        tensors[name][(number == unlabelled).to(device)] = torch.nan
    tensors |= {"ids": ids.to(device), "key_ids": key_ids.to(device)}
    if entries:
        first = torch.randint(-2, count, (rows, entries), generator=g)
        first[:, : entries // 3] = -1
        second = torch.randint(count, (rows, entries), generator=g)
        # The query weighs less than the key, as in MoCHi.
        parts = torch.rand(rows, entries, generator=g) * torch.where(first == -1, 0.5, 1.0)
        tensors["mixtures"] = Mixtures(first.to(device), second.to(device), parts.to(device))
    return Call(tensors, options, grads=["input"] if frozen else ["input", "keys"])


def make_nearest(sizes: Mapping[str, Any], dtype: torch.dtype, device: str, seed: int) -> Call:
    """The same queries and keys; ``plain``: without ids."""
    words = dict(sizes)
    k, plain = words.pop("k"), words.pop("plain", False)
    call = make(words, dtype, device, seed)
    tensors = {n: t for n, t in call.tensors.items() if not plain or n in ("input", "keys")}
    tensors |= {n: call.tensors[n].repeat(sizes.get("share", 1)) for n in ("ids", "instance") if n in tensors}
    return Call(tensors, {"k": k, **{n: v for n, v in call.options.items() if n in ("private", "ignore_index")}})


def cost(sizes: Mapping[str, Any], dtype: torch.dtype, direction: str) -> Cost:
    """Queries and keys are read once, their gradients written once; the cosines and each gradient are a product. Only
    what is listed counts where the keys are: the search is the forward's product."""
    rows, keys, dim = sizes["rows"], sizes["keys"], sizes["dim"]
    gradients = 1 if sizes.get("frozen") else 2
    numbers = 0 if direction == "bwd" else rows + keys
    if direction != "fwd":
        numbers += rows if gradients == 1 else rows + keys
    listed, every = sizes.get("nearest", 0), rows * keys
    products = {"fwd": every, "bwd": gradients * (rows * listed or every)}
    products["fwd_bwd"] = products["fwd"] + products["bwd"]
    # Each mixture: its cosine in the forward, its pull in the backward.
    mixed = rows * sizes.get("entries", 0) * {"fwd": 1, "bwd": 1, "fwd_bwd": 2}[direction]
    return Cost(bytes=numbers * dim * dtype.itemsize, flops=2 * dim * (products[direction] + mixed))


def cost_nearest(sizes: Mapping[str, Any], dtype: torch.dtype, direction: str) -> Cost:
    """Queries and keys read once, the answer written; one product."""
    rows, keys, dim = sizes["rows"], sizes["keys"], sizes["dim"]
    return Cost(bytes=(rows + keys) * dim * dtype.itemsize + rows * sizes["k"] * 12, flops=2 * rows * keys * dim)


def case(name: str, why: str, rows: int, keys: int, dim: int, **more: Any) -> Case:
    return Case(name, why, {"rows": rows, "keys": keys, "dim": dim, **more})


def bench(name: str, why: str, rows: int, keys: int, **more: Any) -> Case:
    return Case(name, why, {"rows": rows, "keys": keys, "dim": 128, "stats": False, **more}, bench=True)


CASES: tuple[Case, ...] = (
    case("supcon", "a batch of two views against itself, without itself", 32, 32, 32, views=2),
    case("odd", "no size fits a vector or a tile", 37, 101, 33),
    case("tiny", "one query, two keys, three features", 1, 2, 3, classes=2),
    case("no_rows", "an empty batch: the sum is 0", 0, 5, 8, reduction="sum"),
    case("no_keys", "no key: every query has loss 0", 5, 0, 8),
    case("one_row", "fewer queries than a tile", 1, 300, 24),
    case("more_tiles", "several tiles of queries and of keys, the last ones short", 203, 330, 20, classes=19),
    case("many_keys", "few queries: the keys are split, and their sums added", 6, 4109, 16, frozen=True),
    case("wide", "more features than a block", 20, 40, 515),
    case("crops", "nine crops share an id and an image", 36, 50, 24, share=9, images=True),
    case("bank", "keys without a gradient", 40, 70, 32, frozen=True),
    case("both", "the batch's keys learn, the bank behind them does not", 40, 90, 32, learnt_keys=33),
    case("none", "queries with different upstream gradients", 50, 70, 33, reduction="none"),
    case("sum", "the gradient is not divided by the queries", 20, 30, 16, reduction="sum"),
    case("log_of_sum", "the log of the summed probability", 33, 61, 24, positives="sum", reduction="none"),
    case("hard", "negatives weighted by themselves (SCHaNe)", 33, 61, 24, hardness=1.0),
    case("hard_detached", "weights that are constants", 33, 61, 24, hardness=1.0, detach_hardness=True),
    case("half_hard", "a hardness that is no integer", 33, 61, 24, hardness=0.5, reduction="none"),
    case("half_hard_detached", "the same with constants", 33, 61, 24, hardness=0.5, detach_hardness=True,
         positives="sum"),
    case("lonely", "queries without a positive: loss 0 and no gradient", 30, 40, 16, lonely=True, hardness=0.5),
    case("no_negatives", "one class: there is nothing to be told from", 12, 17, 16, classes=1, hardness=1.0),
    case("ignored", "ignored queries count nowhere", 30, 40, 16, ignored=True),
    case("unfilled", "slots of a bank that hold nothing yet", 30, 70, 16, unfilled=0.6, ignore_index=-1),
    case("empty_bank", "no slot is filled", 12, 17, 8, unfilled=1.1, hardness=1.0),
    case("private", "MoCo: each query's own key, and a queue", 24, 90, 16, private=24, frozen=True),
    case("images", "keys of the query's own image are left out", 30, 80, 16, images=True, positives="sum"),
    case("cosface", "a margin of the cosines", 33, 61, 24, margin=0.2),
    case("arcface", "a margin of the angles", 33, 61, 24, margin=0.5, margin_kind="arcface", reduction="none"),
    case("arcface_wide", "some angles pass pi", 33, 61, 5, margin=2.5, margin_kind="arcface", positives="sum"),
    case("nearest", "LOOK: the nearest keys alone", 33, 90, 16, nearest=11, positives="sum", frozen=True, images=True),
    case("nearest_few", "fewer keys than are asked for", 20, 30, 16, nearest=25, frozen=True, unfilled=0.5),
    case("nearest_all", "the options of all keys over listed ones", 20, 30, 16, nearest=12, frozen=True, hardness=0.5,
         margin=0.3, margin_kind="arcface", lonely=True, ignored=True),
    case("mixtures", "MoCHi: mixes of keys and with the query", 24, 90, 16, private=24, entries=13, frozen=True),
    case("mixtures_learnt", "mixes are constants beside keys that learn", 30, 40, 16, entries=9, hardness=0.5,
         lonely=True, ignored=True),
    case("mixtures_nearest", "mixes beside the nearest keys", 20, 50, 16, entries=7, nearest=9, frozen=True),
    case("zero_rows", "a zero query or key has logit 0 and gradient 0", 31, 37, 16, zero=True, entries=5),
    case("cold", "exp(-2 / temperature) underflows", 40, 300, 16, temperature=0.01),
    case("cold_hard", "the same with weights", 40, 100, 16, temperature=0.05, hardness=1.0),
    case("strided", "queries and keys are slices", 30, 40, 17, strided=True),
    case("large", "the norm's square leaves the range of half precision", 12, 16, 16, scale=3e3),
    bench("n4096_m4096", "SupCon: two views of 2048 images", 4096, 4096, views=2, classes=1000),
    bench("n4096_m65536", "a batch against a full bank", 4096, 65_536, frozen=True, classes=1000),
    bench("look", "LOOK: 256 neighbours in a bank", 1024, 65_536, frozen=True, classes=1000, nearest=256,
          positives="sum"),
    bench("mochi", "MoCHi: 1536 mixtures per query beside the queue", 256, 65_792, frozen=True, private=256,
          entries=1536, temperature=0.2),
)  # fmt: skip

NEAREST_CASES: tuple[Case, ...] = (
    case("plain", "every key counts", 33, 70, 16, k=9, plain=True),
    case("odd", "no size fits a vector or a tile", 37, 101, 33, k=13, images=True),
    case("all", "every key in its order", 5, 23, 16, k=23),
    case("one", "the nearest alone", 40, 300, 24, k=1),
    case("no_rows", "an empty batch", 0, 9, 8, k=3),
    case("more_tiles", "several tiles of queries and of keys", 130, 1111, 20, k=50),
    case("many_keys", "few queries: the keys are split", 3, 9001, 16, k=100),
    case("few", "fewer keys than are asked for", 20, 30, 16, k=25, unfilled=0.6, ignored=True),
    case("crops", "nine crops of an image", 36, 50, 24, k=5, share=9, images=True),
    case("private", "the queue and one's own key", 24, 90, 16, k=20, private=24),
    case("wide", "more features than a block", 20, 40, 515, k=4),
    case("strided", "queries and keys are slices", 30, 40, 17, k=4, strided=True),
    bench("look", "LOOK's search", 1024, 65_536, k=256, classes=1000),
    bench("mochi", "MoCHi's search", 256, 65_536, k=1024, classes=1000),
)


def implementations(operator: str) -> tuple[str, ...]:
    """C++ where its library has the raw operator."""
    return ("cpp", "triton") if in_cpp(operator) else ("triton",)


OP = Op(
    name="contrastive_cross_entropy",
    function=contrastive_cross_entropy,
    eager=eager,
    make=make,
    cases=CASES,
    cost=cost,
    kernels=lambda: implementations("contrastive_ce"),
)
NEAREST_OP = Op(
    name="nearest_keys",
    function=nearest_keys,
    eager=eager_nearest,
    make=make_nearest,
    cases=NEAREST_CASES,
    cost=cost_nearest,
    kernels=lambda: implementations("nearest_keys"),
)
