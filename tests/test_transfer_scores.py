"""Scores against worked examples and against a plain bootstrap; tables, and results that somebody else has written."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastrex.errors import FastrexError
from fastrex.transfer import catalog, cells, comparison, results, scores, table
from fastrex.transfer.published import PUBLISHED

SMALL_AND_COG, WITH_INAT = results.MEANS["13"], results.MEANS["15"]


def guesses(classes: int, images: int, seeds: int, right: float, seed: int = 0) -> tuple[list[Any], Any]:
    """Predictions of which a share is right, and labels of uneven classes, the last of them without an image."""
    random = np.random.default_rng(seed)
    labels = np.minimum(random.integers(0, classes - 1, images), random.integers(0, classes - 1, images))
    predictions = [np.where(random.random(images) < right, labels, (labels + 1) % classes) for _ in range(seeds)]
    return predictions, labels


def test_worked_example() -> None:
    labels = np.array([0, 0, 0, 1])
    predictions = [np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])]
    found = scores.scored(predictions, labels, 3, "mine")
    assert found["right"] == [1, 1, 2]
    assert found["top1"]["seeds"] == [0.75, 0.5]
    assert found["top1"]["mean"] == 0.625
    assert found["top1"]["std"] == pytest.approx(0.25 / math.sqrt(2))
    # Class 2 has no test image and does not count.
    assert found["mean_per_class"]["seeds"] == pytest.approx([(2 / 3 + 1) / 2, (1 / 3 + 1) / 2])
    # Top-1 is averaged over seeds before the logarithm.
    assert found["log_odds"]["value"] == pytest.approx(math.log(0.625 / 0.375))
    assert "moved" not in found["log_odds"]


def test_one_seed_has_no_deviation() -> None:
    assert scores.scored([np.array([0, 1])], np.array([0, 0]), 2, "mine")["top1"]["std"] == 0.0


@pytest.mark.parametrize(("guess", "value"), [(0, math.log(0.9 / 0.1)), (1, math.log(0.1 / 0.9))])
def test_all_or_nothing_right_is_moved_by_half_an_image_and_said(guess: int, value: float) -> None:
    found = scores.scored([np.full(5, guess)], np.zeros(5, np.int64), 2, "mine")
    assert found["log_odds"]["value"] == pytest.approx(value)
    assert found["log_odds"]["moved"] is True
    assert found["log_odds"]["low"] == found["log_odds"]["high"] == pytest.approx(value)


def test_intervals_are_those_of_a_plain_bootstrap() -> None:
    predictions, labels = guesses(7, 400, 3, 0.7)
    found = scores.scored(predictions, labels, 7, "mine")
    rate = np.mean([p == labels for p in predictions], axis=0)
    random = np.random.default_rng(1)
    drawn = np.array([rate[random.integers(0, 400, 400)].mean() for _ in range(4000)])
    low, high = np.percentile(drawn, (2.5, 97.5))
    assert (found["top1"]["low"], found["top1"]["high"]) == pytest.approx((low, high), abs=0.008)
    odds = np.percentile(np.log(drawn / (1 - drawn)), (2.5, 97.5))
    assert (found["log_odds"]["low"], found["log_odds"]["high"]) == pytest.approx(odds, abs=0.04)
    within = [rate[labels == c] for c in range(6)]
    stratified = [np.mean([random.choice(r, len(r)).mean() for r in within]) for _ in range(2000)]
    wanted = np.percentile(stratified, (2.5, 97.5))
    assert (found["mean_per_class"]["low"], found["mean_per_class"]["high"]) == pytest.approx(wanted, abs=0.015)


def test_intervals_repeat_and_belong_to_the_set() -> None:
    predictions, labels = guesses(5, 100, 2, 0.5)
    one, again, other = (scores.scored(predictions, labels, 5, name) for name in ("a", "a", "b"))
    assert one == again
    assert one["top1"]["low"] != other["top1"]["low"] or one["top1"]["high"] != other["top1"]["high"]


def test_blocks_of_classes_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    predictions, labels = guesses(40, 500, 2, 0.5)
    whole = scores.scored(predictions, labels, 40, "a")["mean_per_class"]
    monkeypatch.setattr(scores, "BLOCK", 20_000)
    parts = scores.scored(predictions, labels, 40, "a")["mean_per_class"]
    assert parts["mean"] == whole["mean"]
    assert (parts["low"], parts["high"]) == pytest.approx((whole["low"], whole["high"]), abs=0.01)


def test_mean_log_odds_over_sets() -> None:
    rights = {"a": [10, 30], "b": [5, 5, 30]}
    found = scores.mean(rights, ("a", "b", "c"))
    assert found is not None
    share_b = (5 / 2 + 30) / 40
    assert found["log_odds"]["value"] == pytest.approx((math.log(3) + math.log(share_b / (1 - share_b))) / 2)
    assert found["top1"] == pytest.approx((0.75 + share_b) / 2)
    assert found["sets"] == ["a", "b"]
    assert not found["complete"]
    alone = [scores.log_odds(scores.resampled(np.array(rights[n]), n), 40) for n in "ab"]
    low, high = np.percentile((alone[0] + alone[1]) / 2, (2.5, 97.5))
    assert (found["log_odds"]["low"], found["log_odds"]["high"]) == pytest.approx((low, high))
    # The sets are drawn independently: their mean varies less than either.
    assert np.std((alone[0] + alone[1]) / 2) < min(np.std(alone[0]), np.std(alone[1]))
    assert abs(np.corrcoef(alone)[0, 1]) < 0.15
    complete = scores.mean(rights, ("a", "b"))
    assert complete is not None
    assert complete["complete"]
    assert scores.mean(rights, ("c",)) is None


def entry(name: str, right: list[int], headline: str = "", shots: int | None = None) -> dict[str, Any]:
    seeds, images = len(right) - 1, sum(right)
    generator = np.random.default_rng(len(name))
    order = generator.permutation(np.repeat(np.arange(seeds + 1), right))
    predictions = [(order <= seed).astype(np.int64) for seed in range(seeds)]
    figures = scores.scored(predictions, np.zeros(images, np.int64), 2, name)
    assert figures["right"] == right
    probe = {**figures, "chosen": [{"C": 1.0}] * seeds, "seconds": 1.5}
    known = catalog.BY_NAME.get(name)
    headline = headline or ("sgd" if known is not None and known.large else "logistic")
    return {
        "name": name,
        "title": known.title if known else name,
        "official": known is not None,
        "classes": known.classes if known else 2,
        "train": known.trainval if known else 1200,
        "test": known.test if known else images,
        "shots": shots,
        "headline": headline,
        "fingerprint": "ab" * 32,
        "probes": {headline: probe, "knn": copy.deepcopy(probe)},
    }


def made(source: str, sets: list[dict[str, Any]], **more: Any) -> results.Result:
    return {
        "version": 1,
        "source": source,
        "encoder": {"identity": "cd" * 32, "arch": "resnet50", "features": 2048},
        "transform": {"resize": 224, "size": 224, "channels": 3, "interpolation": "bicubic"},
        "protocol": "grid",
        "seeds": [22, 37],
        "shots": [],
        "environment": {},
        "sets": sets,
        "skipped": [],
        "means": results.means(sets),
        **more,
    }


def test_which_sets_are_in_which_mean() -> None:
    assert len(SMALL_AND_COG) == 13
    assert len(WITH_INAT) == 15
    assert "in1k" not in WITH_INAT
    assert {*WITH_INAT} - {*SMALL_AND_COG} == {"inat2018", "inat2019"}
    sets = [entry(name, [10, 10, 20 + i]) for i, name in enumerate((*WITH_INAT, "in1k", "mine"))]
    sets.append(entry("mine", [30, 5, 5], shots=2))
    means = results.means(sets)
    assert {name: (len(mean["sets"]), mean["complete"]) for name, mean in means.items()} == {
        "13": (13, True),
        "15": (15, True),
        "all": (16, True),
        "all@2": (1, True),
    }
    assert "mine" in means["all"]["sets"]
    some = results.means(sets[:3])
    assert (some["13"]["sets"], some["13"]["complete"]) == (list(WITH_INAT[:3]), False)
    assert results.means([entry("in1k", [5, 5, 5])]) == {}


def test_a_table_of_one_result() -> None:
    skipped = [{"name": "pets", "reason": "pets must be there, got no folder", "get": "get the Pets page"}]
    sets = [entry("aircraft", [10, 10, 20]), entry("mine|<b>", [0, 0, 40]), entry("mine|<b>", [20, 10, 10], shots=4)]
    result = made("runs/a", sets, skipped=skipped)
    text = table.markdown(result)
    assert "| Aircraft | 62.5 ± 17.7 \\[" in text
    assert "| Logistic | 100 | 6,667 | 3,333 |" in text
    assert "| Logistic | 2 | 1,200 | 40 |" in text
    assert "†" not in text
    assert "mine\\|\\<b\\>, 4 shots" in text
    assert "moved by half an image" in text
    assert " ‡ \\[" in text
    assert "Mean of the 13: only 1" in text
    assert "Mean of the 13 is not complete, it is the mean of aircraft." in text
    assert "| pets | pets must be there, got no folder | get the Pets page |" in text
    assert "Comparison" not in text
    page = table.page(result)
    assert "mine|&lt;b&gt;" in page
    assert "<b>, 4" not in page
    wide, narrow = table.plain(result, width=220), table.plain(result, width=60)
    assert "62.5 ± 17.7 [" in wide
    assert max(map(len, narrow.split("Sets\n")[1].split("\n")[:4])) <= 60
    assert "Top-1" in narrow.split("(no room for")[0]
    assert "(no room for Mean per class, k-NN, Probe, Classes, Train, Test)" in narrow


def test_copies_with_other_numbers_than_published_are_marked(tmp_path: Path) -> None:
    sets = [entry(name, [10, 10, 20]) for name in (*WITH_INAT, "in1k", "mine")]
    sets.append(entry("dtd", [10, 10, 20], shots=2))
    for name, what in (("pets", "test"), ("inat2018", "classes"), ("in1k", "train"), ("mine", "train")):
        next(e for e in sets if e["name"] == name)[what] -= 1
    result = made("a", sets)
    assert results.partial(result) == {"pets", "inat2018", "in1k"}
    assert [result["means"][name]["complete"] for name in ("13", "15", "all")] == [False] * 3
    assert len(result["means"]["15"]["sets"]) == 15
    text, page, plain = table.markdown(result), table.page(result), table.plain(result, width=200)
    for title in ("Pets", "iNat 2018", "IN1K", "Mean of the 13", "Mean of the 15", "Mean of all"):
        assert f"| {title} †" in text, title
        assert f"{title} †" in page, title
        assert f"{title} †" in plain, title
    for title in ("Aircraft", "mine", "DTD, 2 shots"):
        assert f"{title} †" not in text, title
    assert "Pets (3,668 instead of 3,669 test images); iNat 2018 (8,141 instead of 8,142 classes); IN1K (1" in text
    # No mean over other images stands beside the published one, and none is the best.
    results.write(tmp_path / results.FILE, made("b", [entry(name, [0, 0, 40]) for name in WITH_INAT]))
    rows = table.markdown(result, comparison.compare([tmp_path])).split("## Comparison")[1].split("\n")
    own = next(row for row in rows if row.startswith("| a "))
    other = next(row for row in rows if row.startswith("| b "))
    assert "13 of 13" in own
    assert "15 of 15" in own
    assert own.count("†") == 6
    assert "†" not in other


def test_a_comparison_marks_the_best_measured_one(tmp_path: Path) -> None:
    first = made("first", [entry("aircraft", [10, 10, 20]), entry("in1k", [5, 0, 35]), entry("dtd", [9, 9, 9])])
    second = made("second", [entry("aircraft", [5, 10, 25]), entry("in1k", [15, 0, 25])])
    (tmp_path / "second").mkdir()
    results.write(tmp_path / "second" / results.FILE, second)
    others = comparison.compare([tmp_path / "second"])
    text = table.markdown(first, others)
    lines = {line.split()[1]: line for line in text.split("## Comparison")[1].split("\n") if line[:1] == "|"}
    assert "**75.0 ± " in lines["second"]
    assert "62.5 ± " in lines["first"]
    assert "**62.5" not in lines["first"]
    assert "**87.5" in lines["first"]
    # Alone in its column: nothing to be better than. Means over other sets are not compared.
    assert lines["first"].count("**") == lines["second"].count("**") == 2
    assert "1 of 13" in lines["second"]
    assert "2 of 13" in lines["first"]
    assert "Not of the same files" not in text
    second["sets"][0]["fingerprint"] = "00"
    results.write(tmp_path / "second" / results.FILE, second)
    assert "Not of the same files for all encoders: Aircraft." in table.markdown(
        first, comparison.compare([tmp_path / "second"])
    )
    for figure in PUBLISHED:
        row = next(
            line for line in text.split("\n") if cells.md(figure.source) in line and f"{100 * figure.top1:.1f}" in line
        )
        assert " (published) " in row
        assert "**" not in row


def test_published_figures_stand_only_beside_what_they_are_of() -> None:
    assert "published" not in table.markdown(made("a", [entry("aircraft", [1, 2, 3])]), comparison.compare([]))
    assert {f.name for f in PUBLISHED if f.log_odds is not None} == {
        "t-ReX, paper",
        "t-ReX*, paper",
        "t-ReX, authors' re-run",
        "t-ReX*, authors' re-run",
    }
    full = made("a", [entry(name, [10, 10, 20]) for name in WITH_INAT])
    text = table.markdown(full)
    assert "1.1704" in text
    assert "0.8829" in text
    assert "DINO" not in text
    assert "DINO" in table.markdown(made("a", [entry("in1k", [10, 10, 20])]))


def test_means_are_of_the_protocols_probes() -> None:
    good, other = entry("aircraft", [10, 10, 20]), entry("dtd", [5, 5, 30], headline="knn")
    assert "13" not in results.means([other])
    only = results.means([other])["all"]
    assert (only["sets"], only["probe"]) == (["dtd"], "knn")
    both = results.means([good, other])
    assert both["13"]["sets"] == ["aircraft"]
    assert not both["13"]["complete"]
    # What all of them have, and not k-NN of the one beside logistic regression of the other.
    assert both["all"]["probe"] == "knn"
    assert both["all"]["top1"] == pytest.approx((0.625 + 0.8125) / 2)
    whole = results.means([entry(name, [10, 10, 20], "logistic") for name in WITH_INAT])
    assert len(whole["13"]["sets"]) == len(whole["15"]["sets"]) == 8
    text = table.markdown(made("a", [good, other]))
    assert "| Mean of all, k-NN |" in text
    assert "Mean of the 13: only 1" in text


def test_means_of_few_shots() -> None:
    sets = [entry(name, [10, 10, 20], shots=8) for name in SMALL_AND_COG]
    sets += [entry(name, [10, 10, 20], shots=1) for name in SMALL_AND_COG[:3]]
    means = results.means(sets)
    assert {name: (len(mean["sets"]), mean["complete"]) for name, mean in means.items()} == {
        "13@1": (3, False),
        "15@1": (3, False),
        "all@1": (3, True),
        "13@8": (13, True),
        "15@8": (13, False),
        "all@8": (13, True),
    }
    text = table.markdown(made("a", sets))
    assert "| Mean of the 13, 8 shots | 13 |" in text
    assert "| Mean of the 13, 1 shot: only 3 | 3 |" in text
    # Few shots are not what the published means are of.
    assert "1.1704" not in text


def test_a_value_that_was_moved_is_marked_wherever_it_goes(tmp_path: Path) -> None:
    result = made("a", [entry("aircraft", [0, 0, 40]), entry("dtd", [10, 10, 20])])
    assert result["means"]["13"]["moved"] == ["aircraft"]
    assert "moved" not in results.means([entry("dtd", [10, 10, 20])])["13"]
    results.write(tmp_path / results.FILE, made("b", [entry("dtd", [10, 10, 20])]))
    text = table.markdown(result, comparison.compare([tmp_path]))
    for grid in ("Sets", "Means over sets", "Comparison"):
        part = text.split(f"## {grid}\n")[1].split("## ")[0]
        assert " ‡ " in part
        assert "has no finite log-odds" in part


def test_what_was_measured_in_another_way_is_not_compared(tmp_path: Path) -> None:
    first = made("first", [entry("in1k", [10, 10, 20]), entry("mine", [10, 10, 20])])
    knn = made("second", [entry("in1k", [5, 5, 30], headline="knn"), entry("mine", [10, 20, 10])])
    small = made("third", [entry("in1k", [5, 5, 30])])
    small["transform"] = {**small["transform"], "resize": 32, "size": 32}
    for other, reason in ((knn, "by k-NN"), (small, "images of 32 px")):
        results.write(tmp_path / results.FILE, other)
        text = table.markdown(first, comparison.compare([tmp_path]))
        lines = {line.split()[1]: line for line in text.split("## Comparison")[1].split("\n") if line[:1] == "|"}
        assert "**75.0" not in lines[other["source"]]
        assert "No best where probes or sizes of the images differ: IN1K" in text
        assert "Published figures are their authors'" in text
        assert f"Not comparable with the published figures: IN1K of {other['source']} ({reason})" in text
        assert "comparable with the published figures: IN1K" in table.page(first, comparison.compare([tmp_path]))
    assert "k-NN instead of the protocol's probe for IN1K" in _how(first, knn, tmp_path)
    assert "Not comparable" not in table.markdown(first)
    left = made("left", [{**entry("in1k", [5, 5, 30]), "left_out": 3, "untested": ["a|b"]}])
    text = table.markdown(left)
    assert "IN1K of left (other images than published)" in text
    assert "left out: 3 of IN1K, so that a\\|b have no test image." in text


def _how(first: results.Result, other: results.Result, place: Path) -> str:
    results.write(place / results.FILE, other)
    return table.markdown(first, comparison.compare([place]))


def test_rows_of_a_comparison_can_be_told_apart(tmp_path: Path) -> None:
    sets = [entry("mine", [10, 10, 20])]
    places = [tmp_path / name for name in ("a", "b", "c")]
    for number, place in enumerate(places):
        place.mkdir()
        encoder = {"identity": f"{min(number, 1)}" * 64, "arch": "resnet50", "features": 2048}
        results.write(place / results.FILE, made("run", sets, encoder=encoder))
    (tmp_path / "link").symlink_to(places[0])
    rows = comparison.compare([places[0], places[0] / results.FILE, tmp_path / "link", *places[1:]], places[2])
    assert len(rows) == 2
    text = table.markdown(made("run", sets), comparison.compare(places)).replace("\\", "")
    assert "| run (cdcdcdcd) " in text
    assert "| run (00000000) " in text
    assert f"| run (11111111) ({places[1]}) " in text
    assert f"| run (11111111) ({places[2]}) " in text
    assert "1 set |" in text
    assert "1 sets" not in text


def test_probes_of_two_runs_are_put_together() -> None:
    one, two = entry("dtd", [5, 5, 30], headline="knn"), entry("dtd", [10, 10, 20])
    two["probes"] = {"logistic": two["probes"]["logistic"]}
    for kind in (one, two):
        kind["images"] = "ab"
    (found,) = results.merged([one], [two])
    assert (sorted(found["probes"]), found["headline"]) == (["knn", "logistic"], "logistic")
    assert found["as_published"]
    (found,) = results.merged([two], [one])
    assert (sorted(found["probes"]), found["headline"]) == (["knn", "logistic"], "logistic")
    (found,) = results.merged([two], [{**one, "images": "cd"}])
    assert (sorted(found["probes"]), found["headline"], found["as_published"]) == (["knn"], "knn", False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 2}, "its version must be 1, got 2"),
        ({"version": True}, "its version must be 1, got True"),
        ({"sets": {}}, "it.sets must be a list"),
        ({"sets": [{"name": "a"}]}, "it.sets[0] must be an object with name, title"),
        ({"seeds": ["1"]}, "it.seeds[0] must be a whole number"),
        ({"source": 3}, "it.source must be text"),
        ({"encoder": {"identity": "a", "arch": "b", "features": -1}}, "it.encoder.features must be a whole number"),
        ({"means": {"13": {"log_odds": {}, "top1": 0, "sets": [], "complete": True}}}, "it.means.13.log_odds must be"),
    ],
)
def test_a_result_of_somebody_else_is_checked(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    path = tmp_path / results.FILE
    path.write_text(json.dumps({**made("a", [entry("aircraft", [1, 2, 3])]), **change}))
    with pytest.raises(FastrexError, match=r"must be a result of fastrex transfer") as caught:
        comparison.compare([tmp_path])
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (("top1", "mean"), 62.5, "logistic.top1.mean must be a share from 0 to 1"),
        (("top1", "seeds"), [0.5, None], "logistic.top1.seeds[1] must be a share"),
        (("right",), [4], "logistic.right must be the numbers of test images"),
        (("right",), [0, 0], "logistic.right must be the numbers of test images"),
        (("log_odds", "value"), "1", "logistic.log_odds.value must be a number"),
    ],
)
def test_figures_of_somebody_else_are_checked(tmp_path: Path, place: tuple[str, ...], value: Any, reason: str) -> None:
    result = made("a", [entry("aircraft", [1, 2, 3])])
    target = result["sets"][0]["probes"]["logistic"]
    for name in place[:-1]:
        target = target[name]
    target[place[-1]] = value
    (tmp_path / results.FILE).write_text(json.dumps(result))
    with pytest.raises(FastrexError, match=r"must be a result of fastrex transfer") as caught:
        comparison.compare([tmp_path])
    assert reason in str(caught.value)


def test_a_result_that_is_not_there_or_no_json(tmp_path: Path) -> None:
    with pytest.raises(FastrexError, match=r"No such file or directory.*--out of a fastrex transfer"):
        comparison.compare([tmp_path / "nowhere"])
    with pytest.raises(FastrexError, match=r"Is a directory"):
        comparison.compare([tmp_path])
    (tmp_path / results.FILE).write_text('{"version": 1, "top1": NaN}')
    with pytest.raises(FastrexError, match=r"NaN is no number"):
        comparison.compare([tmp_path])
    doubled = made("a", [entry("aircraft", [1, 2, 3])] * 2)
    (tmp_path / results.FILE).write_text(json.dumps(doubled))
    with pytest.raises(FastrexError, match=r"two results"):
        comparison.compare([tmp_path])


def test_the_result_of_a_run_is_found(tmp_path: Path) -> None:
    (tmp_path / "transfer").mkdir()
    results.write(tmp_path / "transfer" / results.FILE, made("run", [entry("aircraft", [1, 2, 3])]))
    assert [row.name for row in comparison.compare([tmp_path, tmp_path / "transfer"])] == ["run"]
