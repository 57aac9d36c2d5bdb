"""The contrastive objectives: worked examples, their queue, MoCHi's draws, exact resume, and two ranks equal to one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import launch
import objective_ranks
import pytest
import safetensors.torch
import torch
from conftest import ROOT, settings_for
from torch import Tensor

import fastrex
from fastrex import checkpoint, objectives
from fastrex import config as c
from fastrex.errors import FastrexError, UsageError
from fastrex.objectives import hard_negatives
from fastrex.objectives.queue import Queue

# The options of every form in a training of seconds.
FORMS = {
    "supcon": ["objective.name=supcon"],
    "supcon_queue": ["objective.name=supcon", "objective.queue_size=40"],
    "schane": ["objective.name=schane"],
    "look": ["objective.name=look", "objective.queue_size=40", "objective.neighbours=8"],
    "moco": ["objective.name=moco", "objective.queue_size=40"],
    "mochi": [
        "objective.name=mochi", "objective.queue_size=40", "objective.hardest=8", "objective.synthetic=6",
        "objective.harder=4", "objective.mix_after=2",
    ],
}  # fmt: skip


def make(name: str, classes: int = 2, dim: int = 2, seed: int = 0, **options: object) -> Any:
    table = {"objective": {"name": name, **options}, "run": {"seed": seed}}
    return objectives.make(objectives.resolve(c.from_table(table)), dim, classes)


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values)


def ints(*values: int) -> Tensor:
    return torch.tensor(values)


def logs(*terms: float) -> float:
    """Log of a sum of exponentials."""
    return math.log(sum(math.exp(term) for term in terms))


def test_supcon_by_hand() -> None:
    x = rows([2.0, 0], [0, 3], [5, 0])
    # Row 0: its positive at cosine 0, the negative at 1; row 1: both at 0; row 2 is alone of its class.
    wanted = [logs(0, 2), math.log(2), 0.0]
    for base, factor in ((0.0, 1.0), (0.25, 2.0)):
        loss, metrics = make("supcon", temperature=0.5, base_temperature=base)(x, ints(0, 0, 1))
        assert loss.tolist() == pytest.approx([factor * value for value in wanted])
    assert metrics["without_positive"].item() == pytest.approx(1 / 3)
    assert metrics["top1"].item() == 0
    # Two positives at cosines 0 and 1 and no negative.
    for positives, value in (("mean", logs(0, 2) - 1), ("sum", 0.0)):
        objective = make("supcon", temperature=0.5, base_temperature=0.0, positives=positives)
        assert objective(x, ints(0, 0, 0))[0][0].item() == pytest.approx(value, abs=1e-6)


def test_supcon_sets_all_crops_against_one_another() -> None:
    # Two images in two crops each: rows 0 and 2 show image 0, rows 1 and 3 image 1.
    x = rows([1.0, 0], [0, 1], [1, 0], [0, 1])
    loss, _ = make("supcon", temperature=0.5, base_temperature=0.0)(x, ints(0, 1))
    assert loss.tolist() == pytest.approx([logs(2, 0, 0) - 2] * 4)


def test_supcon_with_a_queue_by_hand() -> None:
    objective = make("supcon", temperature=0.5, base_temperature=0.0, queue_size=3)
    momentum = rows([4.0, 0])
    query = rows([1.0, 0]).requires_grad_()
    # Its own image's momentum feature is a positive, and an empty queue holds nothing.
    loss, metrics = objective(query, ints(0), objectives.Context(ints(5), momentum))
    assert loss.item() == pytest.approx(0.0)
    assert metrics["filled"].item() == 0
    objective.update_(rows([0.0, 2], [3, 4]), ints(1, 0), images=ints(6, 7))
    loss, metrics = objective(query, ints(0), objectives.Context(ints(5), momentum))
    assert loss.item() == pytest.approx(logs(2, 0, 1.2) - 1.6)
    assert metrics["filled"].item() == pytest.approx(2 / 3)
    assert (objective.needs_ema, objective.keys_first, objective.separate_view, objective.feeds) == (
        *(True,) * 3, "momentum",
    )  # fmt: skip


def test_supcon_with_a_queue_is_scaled_by_its_temperatures() -> None:
    words: dict[str, Any] = {"temperature": 0.5, "queue_size": 3}
    for base, factor in ((0.0, 1.0), (0.25, 2.0), (2.0, 0.25)):
        objective = make("supcon", base_temperature=base, **words)
        objective.update_(rows([0.0, 2]), ints(1), images=ints(6))
        loss, _ = objective(rows([1.0, 0]), ints(0), objectives.Context(ints(5), rows([3.0, 4])))
        # The positive at cosine 0.6, the negative at 0.
        assert loss.item() == pytest.approx(factor * (logs(1.2, 0) - 1.2))


def test_a_row_without_a_negative_is_no_hit() -> None:
    # Its key is the nearest because it is the only one.
    for name in ("moco", "supcon", "mochi"):
        options = {"hardest": 2} if name == "mochi" else {}
        objective = make(name, queue_size=4, **options)
        x, context = rows([1.0, 0]), objectives.Context(ints(3), rows([1.0, 0]))
        assert objective(x, ints(0), context)[1]["top1"].item() == 0
        objective.update_(rows([0.0, 1]), ints(1), images=ints(8))
        assert objective(x, ints(0), context)[1]["top1"].item() == 1
    for name in ("supcon", "schane"):
        key = "nearest" if name == "schane" else "top1"
        assert make(name)(rows([1.0, 0], [1, 0]), ints(0, 0))[1][key].item() == 0
        assert make(name)(rows([1.0, 0], [1, 0], [0, 1]), ints(0, 0, 1))[1][key].item() == pytest.approx(2 / 3)
    # LOOK's aim is that all neighbours are of the class.
    assert bank_of_look(neighbours=1)(rows([1.0, 0]), ints(0), objectives.Context(ints(9)))[1]["top1"].item() == 1


def test_schane_by_hand() -> None:
    x = rows([1.0, 0], [0, 2], [3, 0], [-4, 0])
    y = ints(0, 0, 1, 1)
    e = math.exp
    # Row 0: positive at 0, negatives at 1 and -1, whose weights are 2 e^s / (e + 1/e).
    weighted = 2 * (e(2) + e(-2)) / (e(1) + e(-1))
    for hardness, negatives in ((1.0, weighted), (0.0, e(1) + e(-1))):
        objective = make("schane", temperature=1.0, weight=0.75, hardness=hardness)
        with torch.no_grad():
            for p in objective.parameters():
                p.zero_()
        loss, metrics = objective(x, y)
        assert loss[0].item() == pytest.approx(0.25 * math.log(2) + 0.75 * math.log(1 + negatives))
        assert metrics["cross_entropy"].item() == pytest.approx(math.log(2))


def test_schane_smooths_the_targets_of_its_cross_entropy_alone() -> None:
    x, y = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 2
    plain, smooth = make("schane", weight=0.0), make("schane", weight=0.0, label_smoothing=0.2)
    logits = plain.predict(x)
    assert torch.equal(smooth.predict(x), logits)
    wanted = torch.nn.functional.cross_entropy(logits, y, label_smoothing=0.2, reduction="none")
    torch.testing.assert_close(smooth(x, y)[0], wanted)
    contrastive = [make("schane", weight=1.0, label_smoothing=s)(x, y)[0] for s in (0.0, 0.2)]
    assert torch.equal(*contrastive)


def test_whether_the_weights_of_negatives_are_constants_decides_the_gradient() -> None:
    x, y = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 2
    found = []
    for detached in (False, True):
        z = x.clone().requires_grad_()
        loss = make("schane", weight=1.0, detach_hardness=detached)(z, y)[0]
        loss.mean().backward()
        found.append((loss, z.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.allclose(found[0][1], found[1][1])


def bank_of_look(**options: object) -> Any:
    objective = make("look", temperature=0.5, queue_size=4, **options)
    objective.update_(rows([2.0, 0], [6, 8], [0, 1]), ints(0, 1, 0), images=ints(5, 6, 7))
    return objective


def test_look_by_hand() -> None:
    query = rows([1.0, 0]).requires_grad_()
    objective = bank_of_look(neighbours=2)
    # Another image's two nearest: class 0 at cosine 1, class 1 at 0.6. Image 5 itself leaves the first one out.
    for image, wanted in ((9, logs(2, 1.2) - 2), (5, logs(1.2, 0))):
        loss, _ = objective(query, ints(0), objectives.Context(ints(image)))
        assert loss.item() == pytest.approx(wanted)
    # One neighbour of another class: nothing to learn from.
    loss, metrics = bank_of_look(neighbours=1)(query, ints(0), objectives.Context(ints(5)))
    loss.sum().backward()
    assert loss.item() == 0
    assert metrics["without_positive"].item() == 1
    assert query.grad is not None
    assert not query.grad.any()


def test_look_with_fewer_entries_than_neighbours_takes_those_that_there_are() -> None:
    query = rows([1.0, 0])
    loss, _ = bank_of_look(neighbours=4)(query, ints(0), objectives.Context(ints(9)))
    assert loss.item() == pytest.approx(logs(2, 1.2, 0) - logs(2, 0))
    empty = make("look", queue_size=4, neighbours=4)
    loss, metrics = empty(query, ints(0), objectives.Context(ints(9)))
    assert (loss.item(), metrics["without_positive"].item(), metrics["filled"].item()) == (0, 1, 0)
    assert empty.predict(query).tolist() == [[0, 0]]


def test_look_predicts_by_votes() -> None:
    votes = bank_of_look(neighbours=3).predict(rows([1.0, 0], [0, 1]))
    # Relative to the nearest: cosines 1, 0.6, 0 and 0, 0.8, 1.
    wanted = [[1 + math.exp(-2), math.exp(-0.8)], [1 + math.exp(-2), math.exp(-0.4)]]
    assert torch.allclose(votes, torch.tensor(wanted))
    assert torch.equal(bank_of_look(neighbours=1).predict(rows([3.0, 4])), rows([0.0, 1]))


def test_moco_by_hand() -> None:
    objective = make("moco", temperature=0.5, queue_size=3)
    objective.update_(rows([0.0, 7], [1, 0]), ints(0, 0), images=ints(8, 3))
    context = objectives.Context(ints(3, 4), rows([2.0, 0], [0, 2]))
    x = rows([1.0, 0], [0, 1], [0, 1], [1, 0])  # two crops of each image
    # Image 3: its own key, and the entry of image 8; its own old entry is no negative. Image 4: both entries are.
    wanted = [logs(2, 0) - 2, logs(2, 2, 0) - 2, logs(0, 2), logs(0, 0, 2)]
    for target in (ints(0, 1), ints(1, 1), ints(-100, -100)):
        loss, metrics = objective(x, target, context)
        assert loss.tolist() == pytest.approx(wanted)
    assert metrics["top1"].item() == pytest.approx(1 / 4)
    assert objective.predict(x) is None


def test_moco_knows_no_labels() -> None:
    objective = make("moco", queue_size=4, classes=1)
    objective.update_(rows([1.0, 0]), ints(-100), images=ints(3))
    assert objective.queue.filled().item() == 0.25


def test_mochi_by_hand() -> None:
    words = {"temperature": 0.5, "queue_size": 2, "hardest": 1, "synthetic": 1, "harder": 1}
    context = objectives.Context(ints(3), rows([2.0, 0]))
    x = rows([1.0, 0])
    found = []
    for mix_after in (0, 1, 2):
        objective = make("mochi", mix_after=mix_after, **words)
        objective.update_(rows([0.0, 7]), ints(0), images=ints(8))
        assert objective.steps.item() == 1
        found.append(objective(x, ints(0), context)[0].item())
    # The only negative n at cosine 0; n mixed with itself; n mixed with the query.
    draws = hard_negatives.mixtures(ints(0)[None], ints(3), ints(0), ints(1), synthetic=1, harder=1, seed=0)
    share = float(draws.share[0, 1])
    assert 0 < share < 0.5
    mixed = share / math.hypot(share, 1 - share)
    assert found[:2] == pytest.approx([logs(2, 0, 0, 2 * mixed) - 2] * 2)
    assert found[2] == pytest.approx(logs(2, 0) - 2)


def test_a_queue_with_fewer_entries_than_mochi_wants_mixes_those_that_there_are() -> None:
    objective = make("mochi", queue_size=50, hardest=10, synthetic=200, harder=100)
    objective.update_(
        torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), ints(*[0] * 4), images=ints(*range(4))
    )
    ids = torch.where(objective.queue.labels == -100, -100, -1)
    found = objective.mixtures(rows([1.0, 0]), ints(9), ids)
    there = found.first[0] != hard_negatives.ABSENT
    # Behind the batch's one key; 4 of 10 candidates are there, so 4/10 of the singles and 16/100 of the pairs.
    assert set(found.second[0][there].tolist()) == {1, 2, 3, 4}
    assert 0.05 < there[:200].float().mean() < 0.3
    assert 0.25 < there[200:].float().mean() < 0.55
    assert torch.isfinite(objective(rows([1.0, 0]), ints(0), objectives.Context(ints(9), rows([1.0, 0])))[0]).all()


def mochi_with(entries: int, **options: int) -> Any:
    """Of a queue with the images 0, 1, ... as random vectors."""
    objective = make("mochi", dim=8, queue_size=entries, **options)
    features = torch.randn(entries, 8, generator=torch.Generator().manual_seed(0))
    objective.update_(features, torch.zeros(entries, dtype=torch.int64), images=torch.arange(entries))
    return objective


def test_each_crop_of_an_image_has_draws_of_its_own() -> None:
    objective = mochi_with(30, hardest=20, synthetic=12, harder=10)
    ids = torch.full((30,), -1)
    # Two images in two crops each, and the two crops are equal: only their place tells them apart.
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(1)).repeat(2, 1)
    found = objective.mixtures(x, ints(40, 41), ids)
    for name in ("share", "second"):
        values = getattr(found, name)
        assert len({tuple(row.tolist()) for row in values}) == 4
    again = objective.mixtures(x, ints(40, 41), ids)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_a_query_never_mixes_old_entries_of_its_own_image() -> None:
    objective = mochi_with(6, hardest=5, synthetic=300, harder=200)
    x, ids = objective.queue.features[:2], torch.full((6,), -1)
    # Queries that are equal to entries 0 and 1: the nearest by far. Behind the batch's two keys.
    found = objective.mixtures(x, ints(0, 1), ids)
    for row, image in enumerate((0, 1)):
        others = {2 + entry for entry in range(6) if entry != image}
        assert set(found.second[row].tolist()) == others
        assert set(found.first[row, :300].tolist()) == others
    strangers = objective.mixtures(x, ints(7, 8), ids)
    for row in (0, 1):
        assert 2 + row in strangers.second[row].tolist()


def test_random_words_are_those_of_splitmix() -> None:
    gamma = hard_negatives._GAMMA
    words = hard_negatives._finalise(1234567 + gamma * torch.arange(1, 6))
    published = [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip
    assert [word % 2**64 for word in words.tolist()] == published


def draws(first: int, last: int, step: int = 3, seed: int = 5) -> hard_negatives.Mixtures:
    """Of crops 0 and 1 of the images from ``first`` to ``last``; the candidates of image i are 100 i to 100 i + 9."""
    images = torch.arange(first, last).repeat(2)
    nearest = 100 * images[:, None] + torch.arange(10)
    crops = torch.arange(2).repeat_interleave(last - first)
    return hard_negatives.mixtures(nearest, images, crops, ints(step), synthetic=400, harder=300, seed=seed)


def test_mixtures_come_from_each_querys_own_candidates_and_do_not_depend_on_the_ranks() -> None:
    whole = draws(0, 8)
    image = torch.arange(8).repeat(2)[:, None]
    assert (whole.second // 100 == image).all()
    assert (whole.first[:, :400] // 100 == image).all()
    assert (whole.first[:, 400:] == hard_negatives.QUERY).all()
    for row in (*whole.second, *whole.first[:, :400]):
        assert set((row % 100).tolist()) == set(range(10))
    parts = [draws(0, 4), draws(4, 8)]
    for name in whole._fields:
        one, two = (getattr(part, name).unflatten(0, (2, 4)) for part in parts)
        assert torch.equal(getattr(whole, name).unflatten(0, (2, 8)), torch.cat([one, two], 1))


def test_mixtures_are_drawn_anew_for_each_image_crop_step_and_seed() -> None:
    whole, later, other = draws(0, 8), draws(0, 8, step=4), draws(0, 8, seed=6)
    shares = torch.cat([whole.share, later.share, other.share])
    assert len({tuple(row.tolist()) for row in shares}) == 3 * 16
    pair, query = shares[:, :400], shares[:, 400:]
    assert torch.aminmax(pair).min >= 0
    assert torch.aminmax(pair).max < 1
    assert torch.aminmax(query).min >= 0
    assert torch.aminmax(query).max < 0.5
    # Standard errors are 0.002 and 0.0012.
    assert pair.mean().item() == pytest.approx(0.5, abs=0.01)
    assert query.mean().item() == pytest.approx(0.25, abs=0.006)
    assert pair.std().item() == pytest.approx(12**-0.5, abs=0.005)
    # The two of a pair and their share have nothing to do with one another.
    triple = torch.stack([whole.first[:, :400] % 10, whole.second[:, :400] % 10, 10 * whole.share[:, :400]]).flatten(1)
    assert (torch.corrcoef(triple).fill_diagonal_(0).abs() < 0.05).all()


def test_the_queue_is_a_ring() -> None:
    queue = Queue(5, 2, "look")
    assert queue.filled().item() == 0
    keep = torch.tensor(True)
    for start in (0, 3):
        images = torch.arange(start, start + 3)
        queue.write_(images[:, None] * torch.ones(2), images % 2, images, keep)
    # The third of the second batch did not fit; the next one starts at the front.
    assert queue.images.tolist() == [0, 1, 2, 3, 4]
    assert queue.pointer.tolist() == [0]
    queue.write_(torch.full((1, 2), 9.0), ints(1), ints(9), None)
    assert queue.images.tolist() == [9, 1, 2, 3, 4]
    assert queue.labels.tolist() == [1, 1, 0, 1, 0]
    assert queue.features[:, 0].tolist() == [9, 1, 2, 3, 4]
    before = {name: t.clone() for name, t in queue.state_dict().items()}
    queue.write_(torch.zeros(7, 2), torch.zeros(7, dtype=torch.int64), torch.arange(7), torch.tensor(False))
    assert all(torch.equal(t, before[name]) for name, t in queue.state_dict().items())


@pytest.mark.parametrize(
    ("name", "value", "bound"),
    [
        ("queue.pointer", -1, r"in \[0, 30\)"),
        ("queue.pointer", 30, r"in \[0, 30\)"),
        ("queue.labels", 3, r"in \[0, 3\) or -100"),
        ("queue.labels", -1, r"in \[0, 3\) or -100"),
        ("queue.images", -2, "at least -1"),
        ("steps", -1, "at least 0"),
    ],
)
@pytest.mark.parametrize("form", ["supcon_queue", "look", "moco", "mochi"])
def test_a_queue_of_a_hostile_checkpoint_is_refused_by_name(form: str, name: str, value: int, bound: str) -> None:
    if name == "steps" and form != "mochi":
        return
    objective = objective_ranks.make(form)
    state = objective.state_dict()
    objective.check(state)
    state[name][-1] = value
    if "labels" in name and form.startswith("mo"):
        bound = r"in \[0, 1\) or -100"  # where one class stands for all
    with pytest.raises(FastrexError, match=rf"bank tensor '{name}' must be {bound}, got {value};"):
        objective.check(state)


@pytest.mark.parametrize("form", ["supcon_queue", "look", "moco", "mochi"])
def test_a_queue_that_no_run_has_written_is_refused(form: str) -> None:
    objective = objective_ranks.make(form)
    objective.update_(torch.randn(3, 4), ints(0, 1, 2), images=ints(4, 5, 6))
    good = objective.state_dict()
    objective.check(good)
    for name, place, value, message in (
        ("features", (1, 2), math.nan, "'queue.features' must be finite, got NaN or inf"),
        ("features", (29, 0), math.inf, "'queue.features' must be finite, got NaN or inf"),
        ("images", (2,), -1, "'queue.images' must be -1 where 'queue.labels' is -100 and nowhere else, got -1 beside"),
        ("images", (9,), 7, "nowhere else, got 7 beside -100 in slot 9;"),
        ("labels", (0,), -100, "nowhere else, got 4 beside -100 in slot 0;"),
    ):
        state = {key: tensor.clone() for key, tensor in good.items()}
        state[f"queue.{name}"][place] = value
        with pytest.raises(FastrexError, match=message):
            objective.check(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"name": "look", "queue_size": 100, "neighbours": 101},
            "objective.neighbours must be at most objective.queue_size=100, got 101; set objective.queue_size=101",
        ),
        (
            {"name": "mochi", "queue_size": 100, "hardest": 101},
            "objective.hardest must be at most objective.queue_size=100, got 101; set objective.queue_size=101",
        ),
        ({"name": "moco", "queue_size": 0}, "objective.queue_size must be at least 1, got 0"),
        ({"name": "schane", "weight": 1.5}, "objective.weight must be between 0 and 1, got 1.5"),
    ],
)
def test_options_that_cannot_be_are_refused_at_the_start(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        objectives.resolve(c.from_table({"objective": options}))


@pytest.mark.parametrize("name", ["supcon", "schane", "look"])
def test_data_without_labels_is_refused_where_they_are_needed(name: str) -> None:
    with pytest.raises(
        FastrexError, match=f"objective.name={name} must have labels of at least two classes, got 1; .*=moco"
    ):
        make(name, classes=1)


def test_what_the_loop_must_give_is_asked_for_by_name() -> None:
    x = rows([1.0, 0])
    with pytest.raises(ValueError, match="look: forward must get a context with the images, got none"):
        make("look")(x, ints(0))
    for objective in (make("moco"), make("supcon", queue_size=4)):
        with pytest.raises(ValueError, match=f"{objective.name}: forward must get a context with momentum features"):
            objective(x, ints(0), objectives.Context(ints(0)))
        with pytest.raises(
            ValueError, match=f"{objective.name}: update_ must get the images of the features, got none"
        ):
            objective.update_(x, ints(0))


@pytest.mark.parametrize("name", ["supcon", "schane"])
def test_a_batch_without_positives_has_no_contrastive_loss(name: str) -> None:
    options = {"weight": 1.0} if name == "schane" else {}
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss, metrics = make(name, classes=3, **options)(x, ints(0, 1, 2))
    loss.sum().backward()
    assert loss.tolist() == [0, 0, 0]
    assert x.grad is not None
    assert not x.grad.any()
    assert metrics["without_positive"].item() == 1


def test_notices() -> None:
    (line,) = make("look", classes=1000, dim=8, queue_size=300).notices([13] * 1000)
    assert "74.1% of the classes" in line
    assert "objective.queue_size=4610" in line
    assert "MoCHi(512, 1024, 512)" in make("mochi", mix_after=7).notices([5, 5])[0]


def test_two_ranks_take_the_same_steps_as_one(tmp_path: Path) -> None:
    words = [str(ROOT / "tests" / "objective_ranks.py"), str(tmp_path)]
    with launch.ranks(tmp_path / "log", 2, words) as job:
        assert job.wait(120) == [0, 0], job.output
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        wanted = {form: objective_ranks.steps(form, 0, 1, None) for form in objective_ranks.FORMS}
    finally:
        torch.set_default_dtype(before)
    for form, one in wanted.items():
        a, b = (safetensors.torch.load_file(tmp_path / f"{form}.{rank}.safetensors") for rank in (0, 1))
        assert a.keys() == one.keys()
        assert all(torch.equal(a[name], b[name]) for name in a), form
        for name, tensor in one.items():
            if tensor.is_floating_point():
                torch.testing.assert_close(a[name], tensor, rtol=1e-12, atol=1e-12, msg=f"{form} {name}")
            else:
                assert torch.equal(a[name], tensor), (form, name)


def settings(form: str) -> list[str]:
    return [*settings_for(FORMS[form][0].partition("=")[2]), *FORMS[form], "data.global_crops=2", "optim.epochs=2"]


def final_hash(run: Path) -> str:
    return checkpoint.state_hash(checkpoint.load(checkpoint.folder(run, checkpoint.steps(run)[-1]))[0])


@pytest.mark.parametrize("form", FORMS)
def test_a_stopped_and_resumed_training_gives_the_same_bits(form: str, stripes: Path, tmp_path: Path) -> None:
    config = c.load("demo", [*settings(form), f"data.path={json.dumps(str(stripes))}"])
    whole = fastrex.train(config, out=tmp_path / "whole", device="cpu")
    fastrex.train(config, out=tmp_path / "parts", device="cpu", max_steps=5)
    fastrex.train(out=tmp_path / "parts", device="cpu", resume="must")
    assert final_hash(tmp_path / "parts") == final_hash(tmp_path / "whole")
    names = {"eval/knn", *(["eval/top1"] if form in ("schane", "look") else [])}
    assert names <= whole.metrics.keys()
    assert ("eval/top1" in whole.metrics) == (form in ("schane", "look"))
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if "train/loss" in record]
    assert all(math.isfinite(record["train/loss"]) for record in records)
    if form in ("supcon", "schane"):
        return
    # Batches of 16 into 40 places: 16, 32, then 8 of the third, which is where a ring starts again.
    filled = [record["bank/filled"] for record in records]
    assert filled[:4] == pytest.approx([0, 0.4, 0.8, 1])


@pytest.mark.parametrize(("form", "micros"), [("supcon", 1), ("mochi", 1), ("supcon_queue", 2)])
def test_two_ranks_train_as_one(form: str, micros: int, stripes: Path, tmp_path: Path) -> None:
    found = []
    for count in (1, 2):
        out = tmp_path / str(count)
        out.mkdir()
        words = [str(ROOT / "tests" / "two_ranks.py"), str(out), "float64", "8", "0.0", *settings(form)]
        words += ["optim.lr=0.1", f"optim.accumulate={micros}", f"data.path={json.dumps(str(stripes))}"]
        with launch.ranks(out / "log", count, words) as job:
            assert job.wait(120) == [0] * count, job.output
        found.append([safetensors.torch.load_file(out / f"rank{r}.safetensors") for r in range(count)])
    (one,), two = found
    assert all(torch.equal(tensor, two[1][name]) for name, tensor in two[0].items())
    assert one.keys() == two[0].keys()
    for name, tensor in one.items():
        if not tensor.is_floating_point():
            assert torch.equal(tensor, two[0][name]), name
        elif tensor.abs().max() > 1e-6:  # a bias in front of a BatchNorm has no gradient but noise
            assert (tensor - two[0][name]).abs().max() <= 1e-8 * tensor.abs().max(), name
