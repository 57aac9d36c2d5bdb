"""Measures of features against plain double loops and closed forms; filters; the command on real runs."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
import torch
from command import fastrex
from conftest import SETTINGS, write_stripes
from torch import Tensor, nn

import fastrex as package
from fastrex import checkpoint, resume, trainer
from fastrex import config as c
from fastrex.analysis import analyze, filters, measures, outcome, projected
from fastrex.data.dataset import open_dataset
from fastrex.data.index import build
from fastrex.distributed import World
from fastrex.errors import FastrexError, UsageError
from fastrex.step import Trainer
from fastrex.transfer import catalog, features

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
OF_CLASSES = (measures.intra_class_distance, measures.class_separation, measures.alignment)
OF_ALL = (measures.coding_length, measures.effective_rank, measures.uniformity)


def cloud(rows: int = 70, dim: int = 12, classes: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of other norms around other centres; the classes have other sizes, and the last has one row."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes - 1, (rows,), generator=g) * 7  # numbers need not follow one another
    labels[rows // 2] = 99
    centres = torch.randn(100, dim, generator=g)
    x = (centres[labels] + torch.randn(rows, dim, generator=g)) * torch.rand(rows, 1, generator=g).add(0.1) * 30
    return x, labels


def unit(x: Tensor) -> list[list[float]]:
    return [[float(v) / math.sqrt(sum(float(w) ** 2 for w in row)) for v in row] for row in x]


def distance(a: list[float], b: list[float]) -> float:
    return math.sqrt(sum((p - q) ** 2 for p, q in zip(a, b, strict=True)))


def cosine(a: list[float], b: list[float]) -> float:
    return sum(p * q for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_distances_are_those_of_double_loops(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "_CHUNK", 16)
    monkeypatch.setattr(measures, "_ACROSS", 9)
    x, labels = cloud()
    rows, classes = unit(x), sorted(set(labels.tolist()))
    members = {c: [r for r, own in zip(rows, labels.tolist(), strict=True) if own == c] for c in classes}
    on = x.to(device), labels.to(device)

    per_class = [
        sum(distance(a, b) for a, b in itertools.permutations(own, 2)) / (len(own) * (len(own) - 1))
        for own in members.values()
        if len(own) > 1
    ]
    assert len(per_class) == len(classes) - 1
    assert measures.intra_class_distance(*on) == pytest.approx(sum(per_class) / len(per_class), rel=1e-12)

    same = [distance(a, b) ** 2 for own in members.values() for a, b in itertools.combinations(own, 2)]
    assert measures.alignment(*on) == pytest.approx(sum(same) / len(same), rel=1e-12)

    pairs = [math.exp(-2 * distance(a, b) ** 2) for a, b in itertools.combinations(rows, 2)]
    assert measures.uniformity(on[0]) == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-12)

    def apart(one: int, other: int) -> float:
        values = [1 - cosine(a, b) for a in members[one] for b in members[other]]
        return sum(values) / len(values)

    within = sum(apart(c, c) for c in classes) / len(classes)
    total = sum(apart(c, d) for c in classes for d in classes) / len(classes) ** 2
    assert measures.class_separation(*on) == pytest.approx(1 - within / total, rel=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(70, 12), (9, 40), (8, 8)])
def test_spectrum_and_coding_length_are_those_of_the_matrix(
    device: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "_CHUNK", 16)
    x, _ = cloud(*shape)
    unit_rows = torch.tensor(unit(x), dtype=torch.float64)
    rows, dim = shape
    for eps_squared in (0.5, 0.01):
        full = torch.eye(dim, dtype=torch.float64) + dim / (rows * eps_squared) * unit_rows.T @ unit_rows
        got = measures.coding_length(x.to(device), eps_squared)
        assert got == pytest.approx(float(torch.logdet(full)) / 2, rel=1e-10)
    singular = torch.linalg.svdvals(unit_rows)
    spectrum = measures.spectrum(x.to(device))
    assert (spectrum.dtype, spectrum.shape, spectrum.device.type) == (torch.float64, (min(shape),), device)
    torch.testing.assert_close(spectrum.cpu(), singular / singular[0], rtol=0, atol=1e-7)
    share = singular / singular.sum()
    entropy = -sum(float(p) * math.log(float(p)) for p in share if p > 1e-12)
    assert measures.effective_rank(x.to(device)) == pytest.approx(math.exp(entropy), rel=1e-6)


def test_orthonormal_rows_have_the_flattest_spectrum() -> None:
    dim = 8
    x = torch.eye(dim) * torch.arange(1, dim + 1)
    assert measures.spectrum(x).tolist() == pytest.approx([1.0] * dim)
    assert measures.effective_rank(x) == pytest.approx(dim)
    # det(I + d/(d eps^2) I) = (1 + 1/eps^2)^d
    assert measures.coding_length(x) == pytest.approx(dim / 2 * math.log(3))
    assert measures.sparsity(x) == 1 - 1 / dim
    assert measures.non_zeros(x) == 1
    assert measures.uniformity(x) == pytest.approx(-4)
    labels = torch.arange(dim) // 2
    assert measures.intra_class_distance(x, labels) == pytest.approx(math.sqrt(2))
    assert measures.alignment(x, labels) == pytest.approx(2)
    # Class means have length 1/sqrt(2), their mean 1/sqrt(d).
    assert measures.class_separation(x, labels) == pytest.approx(1 - (1 - 1 / 2) / (1 - 1 / dim))
    assert measures.class_separation(x, torch.arange(dim)) == pytest.approx(1)


def test_equal_rows_are_one_direction() -> None:
    rows, dim = 20, 7
    x = torch.tensor([3.0, -1, 0, 2, 2, 1, 1]).repeat(rows, 1) * torch.arange(1, rows + 1)[:, None]
    labels = torch.arange(rows) % 2
    assert measures.effective_rank(x) == pytest.approx(1)
    assert measures.spectrum(x).tolist() == pytest.approx([1.0, *[0.0] * (dim - 1)])
    assert measures.coding_length(x) == pytest.approx(math.log(1 + dim / 0.5) / 2)
    assert measures.intra_class_distance(x, labels) == pytest.approx(0, abs=1e-7)
    assert measures.alignment(x, labels) == pytest.approx(0, abs=1e-12)
    assert measures.uniformity(x) == pytest.approx(0, abs=1e-12)
    assert math.isnan(measures.class_separation(x, labels))


def test_rotations_scales_and_orders_change_nothing() -> None:
    x, labels = cloud(seed=3)
    turn = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    turned = (x.double() @ turn * 0.01)[order]
    for measure in OF_ALL:
        assert measure(turned) == pytest.approx(measure(x), rel=1e-6), measure.__name__
    for measure in OF_CLASSES:
        assert measure(turned, labels[order]) == pytest.approx(measure(x, labels), rel=1e-6), measure.__name__


def test_spread_is_more_and_collapse_is_less() -> None:
    """The directions that the words promise."""
    wide, labels = cloud(seed=4)
    narrow = torch.nn.functional.normalize(wide) + 3 * torch.nn.functional.normalize(torch.ones(12), dim=0)
    assert measures.coding_length(narrow) < measures.coding_length(wide)
    assert measures.effective_rank(narrow) < measures.effective_rank(wide)
    assert measures.uniformity(narrow) > measures.uniformity(wide)
    assert measures.alignment(narrow, labels) < measures.alignment(wide, labels)
    tight = torch.randn(100, 12, generator=torch.Generator().manual_seed(0))[labels] + 0.1 * wide
    assert measures.class_separation(tight, labels) > measures.class_separation(wide, labels)
    assert measures.sparsity(wide.relu() + 1e-9) > measures.sparsity(wide)


def test_half_precision_is_added_up_in_float64() -> None:
    x, labels = cloud(rows=3000, dim=16)
    half = x.half()
    exact = measures.describe(half.double(), labels)
    for name, value in measures.describe(half, labels).items():
        assert value == pytest.approx(exact[name], rel=1e-12), name


def test_describe_has_all_of_them() -> None:
    x, labels = cloud()
    got = measures.describe(x, labels)
    assert got == {
        **{measure.__name__: measure(x) for measure in (*OF_ALL, measures.sparsity, measures.non_zeros)},
        **{measure.__name__: measure(x, labels) for measure in OF_CLASSES},
        "spectrum": measures.spectrum(x).tolist(),
    }


def test_uniformity_of_a_sample_is_near_that_of_all() -> None:
    x, _ = cloud(rows=900)
    sampled = measures.uniformity(x, rows=600)
    assert sampled == measures.uniformity(x, rows=600) != measures.uniformity(x)
    assert sampled == pytest.approx(measures.uniformity(x), abs=0.1)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_row_without_direction_is_named(value: float) -> None:
    x, labels = cloud()
    x[41] = value
    for measure in (*OF_ALL, measures.spectrum, measures.sparsity, measures.non_zeros):
        with pytest.raises(FastrexError, match=rf"^{measure.__name__}: .* in row 41; "):
            measure(x)
    for measure in OF_CLASSES:
        with pytest.raises(FastrexError, match=rf"^{measure.__name__}: .* in row 41; "):
            measure(x, labels)


def test_features_and_labels_that_do_not_fit() -> None:
    x, labels = cloud()
    for bad in (x[0], x[:0], x.long()):
        with pytest.raises(FastrexError, match=r"^coding_length: features must be numbers \[N, D\]"):
            measures.coding_length(bad)
    for wrong in (labels[1:], labels.float(), labels[:, None]):
        with pytest.raises(FastrexError, match=r"labels must be one whole number for each of the 70 rows, got torch"):
            measures.alignment(x, wrong)
    alone = torch.arange(len(x))
    for measure in (measures.intra_class_distance, measures.alignment):
        with pytest.raises(FastrexError, match="two rows that make a pair, got none"):
            measure(x, alone)
    with pytest.raises(FastrexError, match=r"^uniformity: .* got none"):
        measures.uniformity(x[:1])


def test_clusters_of_filters_by_hand() -> None:
    apart = torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0], [0, 5, 0], [-1, 0, 0], [0, 0, 2]])
    # The second is within cosine 0.8 of the first; the third is not, and its 0.6 to the second does not count.
    assert filters.clusterability(apart, 0.75) == 4 / 5
    assert filters.clusterability(apart, 0.85) == 1
    assert filters.clusterability(torch.ones(4, 3, 3, 3), 0.5) == 1 / 4
    assert filters.clusterability(torch.cat([torch.eye(6), -torch.eye(6)])) == 1
    assert filters.rank_share(torch.eye(6)[:4] * 3) == pytest.approx(1)
    assert filters.rank_share(torch.ones(5, 6)) == pytest.approx(1 / 5)


def test_diversity_of_an_encoder() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 4, 1), nn.Conv2d(4, 1, 1)), nn.Linear(1, 5))
    net[0].weight.data[5:] = 0
    net[1][0].weight.data = torch.eye(8)[[0, 0, 1, 2]][:, :, None, None]
    found = filters.diversity(net)
    first, second = found["by_layer"]
    assert (found["layers"], found["zero_filters"], first["layer"], first["filters"]) == (2, 3, "0", 5)
    assert (second["layer"], second["filters"], second["clusters_per_filter"]) == ("1.0", 4, 3 / 4)
    assert found["rank_share"] == pytest.approx((first["rank_share"] + second["rank_share"]) / 2)
    assert filters.diversity(nn.Linear(2, 2))["rank_share"] is None
    net[0].weight.data[0, 0, 0, 0] = math.nan
    with pytest.raises(FastrexError, match="filters must be finite, got NaN or inf in 0; "):
        filters.diversity(net)


ALONE = World(0, 1, 0, 1, torch.device("cpu"))
LAYERS = {2: ["encoder", "hidden 1", "hidden 2", "output"], 0: ["encoder", "output"], None: ["encoder"]}


@pytest.fixture(scope="module")
def runs(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int | None, Path]:
    """By number of the projector's hidden layers; None without a projector."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for depth in LAYERS:
        kept = [s for s in SETTINGS if not s.startswith("projector.hidden_layers")]
        words = [*kept, f"data.path={json.dumps(str(stripes))}", "checkpoint.every_steps=1", "objective.bank_size=32"]
        words.append("projector.enabled=false" if depth is None else f"projector.hidden_layers={depth}")
        found[depth] = folder / f"<b>{depth}"
        trainer.train(c.load("demo", words), out=found[depth], max_steps=2, device="cpu")
    return found


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second set, with a test folder."""
    root = tmp_path_factory.mktemp("other")
    write_stripes(root / "train", 3, seed=5)
    write_stripes(root / "test", 6, seed=6)
    return root


def restored(run: Path) -> Trainer:
    config = c.read(run / "config.toml")
    data = open_dataset(config, ALONE)
    trained = Trainer(config, len(data.classes), ALONE)
    resume.restore(trained, data, run)
    return trained


def test_layers_of_the_projector_are_those_that_trained(runs: dict[int | None, Path]) -> None:
    for depth, run in runs.items():
        trained = restored(run)
        own = trained.model.projector.eval()
        x = torch.randn(50, int(trained.model.encoder.num_features), generator=torch.Generator().manual_seed(0))
        place, projector = projected.find(str(run))
        assert place == checkpoint.folder(run, 2)
        assert (projector is None) is (depth is None)
        found = list(projected.layers(x, projector))
        assert [name for name, _ in found] == LAYERS[depth]
        assert torch.equal(found[0][1], x)
        with torch.inference_mode():
            torch.testing.assert_close(found[-1][1], own(x))
        if depth == 2:
            hidden = own.layers[2](own.layers[1](own.layers[0](nn.functional.normalize(x))))
            torch.testing.assert_close(found[1][1], hidden)


def test_several_runs_on_several_sets(runs: dict[int | None, Path], stripes: Path, other: Path, tmp_path: Path) -> None:
    sources = [str(runs[depth]) for depth in (2, None, 0)]
    said: list[str] = []
    out = analyze.run(
        sources,
        [f"a={stripes}", f"b={other}", "dtd"],
        root=tmp_path / "nowhere",
        out=tmp_path / "out",
        cache=tmp_path / "cache",
        device="cpu",
        say=said.append,
    )
    result = json.loads((out / "analysis.json").read_text(encoding="utf-8"))
    assert (out, result["version"], result["images"]) == (tmp_path / "out", 1, None)
    assert [entry["name"] for entry in result["skipped"]] == ["dtd"]
    assert any(line.startswith("dtd: left out: ") for line in said)
    assert [subject["projector_layers"] for subject in result["subjects"]] == [None, 0, 2]
    for subject in result["subjects"]:
        depth = subject["projector_layers"]
        assert [(one["name"], one["images"]) for one in subject["sets"]] == [("a", 16), ("b", 24), ("pooled", 40)]
        assert all([layer["layer"] for layer in one["layers"]] == LAYERS[depth] for one in subject["sets"])
        assert subject["source"] == str(runs[depth])
        assert subject["filters"] == filters.diversity(package.load_encoder(runs[depth]))
        first, second, _ = (one["layers"][-1] for one in subject["sets"])
        mean = subject["mean"]["layers"][-1]
        assert mean["coding_length"] == pytest.approx((first["coding_length"] + second["coding_length"]) / 2)
        assert mean["width"] == first["width"] == {None: 32, 0: 16, 2: 16}[depth]

    # The same figures from features of the export and of the projector as it was trained.
    x, labels = own_features(runs[2], catalog.tasks([f"a={stripes}", f"b={other}"], None))
    with torch.inference_mode():
        behind = restored(runs[2]).model.projector.eval()(x)
    for place, values in ((0, x), (-1, behind)):
        got = result["subjects"][-1]["sets"][-1]["layers"][place]
        for name, value in measures.describe(values, labels).items():
            assert got[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name

    text, page = ((out / f"analysis.{ending}").read_text(encoding="utf-8") for ending in ("md", "html"))
    assert text.count("output − encoder") == 2 * 4  # pooled, mean, a, b
    assert "| \\<b\\>2 | 2 | hidden 2 | 32 |" in text
    assert "no projector" in text
    assert "<b>2" not in page
    assert "&lt;b&gt;2" in page
    assert page.count('<svg class="chart"') == 1 + len(outcome.BY_DEPTH)
    assert "this project&#x27;s reading" in page
    assert "http:" not in page
    assert "https:" not in page


def own_features(run: Path, tasks: list[catalog.Task]) -> tuple[Tensor, Tensor]:
    """Features and labels of the test images of all sets; the classes of each set are others."""
    source, encoder = package.export.load_source(run), package.load_encoder(run)
    found = []
    for task in tasks:
        index = catalog.open_task(task)
        how = features.Transform.of(source)
        found.append(features.extract(encoder, "", index, index.rows("val", 0.0), how, ALONE, cache=None))
    labels = [one.labels + 100 * number for number, one in enumerate(found)]
    return torch.cat([one.features for one in found]), torch.cat(labels)


def test_spectra_are_left_out_where_there_are_too_many() -> None:
    def subjects() -> list[dict[str, Any]]:
        def sets(*names: str) -> list[dict[str, Any]]:
            return [{"name": name, "layers": [{"spectrum": [1.0] * 10}] * 2} for name in names]

        return [{"sets": json.loads(json.dumps(sets("a", "b", "pooled"))), "mean": {}} for _ in range(3)]

    for most, kept, emptied in ((180, [10, 10, 10], False), (179, [0, 0, 10], True), (59, [0, 0, 0], True)):
        found = subjects()
        assert outcome.shorten(found, most) is emptied
        for subject in found:
            lengths = [[len(layer["spectrum"]) for layer in one["layers"]] for one in subject["sets"]]
            assert lengths == [[count] * 2 for count in kept]


def test_the_command_writes_into_a_lone_run(runs: dict[int | None, Path], stripes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[2], run)
    done = fastrex("analyze", run, "--sets", f"a={stripes}", "--images", "6", "--size", "24", "--device", "cpu")
    assert done.code == 0, done.err
    assert "run (2 hidden layers) on a: coding length " in done.out
    result = json.loads((run / "analysis" / "analysis.json").read_text(encoding="utf-8"))
    (subject,) = result["subjects"]
    assert "mean" not in subject
    assert [(one["name"], one["images"]) for one in subject["sets"]] == [("a", 6)]
    assert subject["transform"]["size"] == 24
    assert "at most 6 of each set" in (run / "analysis" / "analysis.md").read_text(encoding="utf-8")


def test_the_page_in_a_browser(
    runs: dict[int | None, Path], stripes: Path, other: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if browser.find() is None:
        pytest.skip(f"no browser is installed: one of {', '.join(browser.NAMES)}")
    sources, sets = [str(run) for run in runs.values()], [f"a={stripes}", f"b={other}"]
    out = analyze.run(sources, sets, out=tmp_path / "out", device="cpu", say=lambda _: None)
    # Not below tmp_path: its name is too long for the browser's sockets.
    with browser.chromium(tmp_path_factory.mktemp("browser") / "files") as opened:
        window = opened.page()
        for width in (1280, 400):
            window.open(out / "analysis.html", width)
            assert window.complaints == []
            assert len(window.requests) == 1
            assert window.evaluate("document.documentElement.scrollWidth") <= width
            assert window.evaluate("document.querySelectorAll('svg.chart .mark').length") > 20
            assert window.evaluate("document.querySelectorAll('table').length") == 5
            assert window.evaluate("document.querySelectorAll('table b').length") == 0


def test_a_damaged_checkpoint_is_passed_over(runs: dict[int | None, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    newest = checkpoint.folder(run, 2) / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    place, projector = projected.find(str(run))
    assert place == checkpoint.folder(run, 1)
    assert projector is not None
    shutil.rmtree(run / "checkpoints")
    assert projected.find(str(run)) == (run, None)
    assert projected.find(str(run / "export")) == (run / "export", None)


def test_a_projector_that_its_configuration_does_not_describe(runs: dict[int | None, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[2], run)
    text = (run / "config.toml").read_text(encoding="utf-8")
    for wrong in ("hidden_layers = 1", "hidden_layers = 1000000000"):
        (run / "config.toml").write_text(text.replace("hidden_layers = 2", wrong), encoding="utf-8")
        with pytest.raises(FastrexError, match=r"the projector in .* must be the one of .*config\.toml, it is not: "):
            projected.find(str(run))


def test_images_are_chosen_evenly_and_in_pairs(stripes: Path, tmp_path: Path) -> None:
    write_stripes(tmp_path / "train", 2, seed=1)
    write_stripes(tmp_path / "val", 7, seed=2)
    for number in range(5):
        (tmp_path / "val" / "class-3" / f"{number:02d}.jpg").unlink()
    index = build(tmp_path)
    rows = index.rows("val", 0.0)
    for most, counts in (
        (4, [0, 0, 2, 2]),
        (8, [2, 2, 2, 2]),
        (14, [4, 4, 4, 2]),
        (15, [4, 4, 5, 2]),
        (99, [7, 7, 7, 2]),
    ):
        chosen = analyze.chosen(index, most)
        assert sorted(np.bincount(index.labels[chosen], minlength=4).tolist()) == sorted(counts), most
        assert np.array_equal(chosen, np.unique(chosen))
        assert set(chosen) <= set(rows)
        assert np.array_equal(chosen, analyze.chosen(index, most))
    assert np.array_equal(analyze.chosen(index, None), rows)
    assert set(analyze.chosen(index, 8)) <= set(analyze.chosen(index, 14))


def test_classes_of_one_image_have_no_distance(
    runs: dict[int | None, Path], imagenet_sample: Path, tmp_path: Path
) -> None:
    files = sorted(path for path in imagenet_sample.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))[:4]
    for number, path in enumerate(files):
        for split in ("train", "val"):
            (tmp_path / "set" / split / f"class-{number}").mkdir(parents=True)
            shutil.copy(path, tmp_path / "set" / split / f"class-{number}" / "one.jpg")
    out = analyze.run([str(runs[0])], [f"a={tmp_path / 'set'}"], out=tmp_path / "out", device="cpu", say=lambda _: None)
    layer = json.loads((out / "analysis.json").read_text(encoding="utf-8"))["subjects"][0]["sets"][0]["layers"][0]
    assert [layer[key] for key in ("intra_class_distance", "class_separation", "alignment")] == [None] * 3
    assert layer["coding_length"] > 0
    assert layer["uniformity"] < 0
    assert " | – | " in (out / "analysis.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        ({"sets": ["pooled={stripes}"]}, UsageError, "'pooled' is what all sets together are called"),
        (
            {"sets": ["a={stripes}/none"]},
            FastrexError,
            r"^analyze: one of --sets must be there, got none; a must be there, got no '",
        ),
        ({"sources": ["{run}", "{run}/."]}, UsageError, "every SOURCE must be named once, got one of them twice"),
        (
            {"out": "{run}/config.toml"},
            FastrexError,
            r"--out must be a folder, got the file",
        ),
        ({"sources": ["{run}/none"]}, FastrexError, "none does not exist"),
    ],
    ids=["pooled", "missing", "twice", "out", "source"],
)
def test_bad_input_is_one_line(
    words: dict[str, Any],
    kind: type[Exception],
    message: str,
    runs: dict[int | None, Path],
    stripes: Path,
    tmp_path: Path,
) -> None:
    given = {"sources": ["{run}"], "sets": ["a={stripes}"], "out": str(tmp_path / "out"), **words}

    def filled(value: Any) -> Any:
        return [filled(v) for v in value] if isinstance(value, list) else value.format(run=runs[0], stripes=stripes)

    ready = {name: filled(value) for name, value in given.items()}
    with pytest.raises(kind, match=message) as caught:
        analyze.run(ready["sources"], ready["sets"], out=Path(ready["out"]), device="cpu", say=lambda _: None)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "analysis.json").exists()


@pytest.mark.parametrize("name", ["analysis.md", "analysis.html", "analysis.json", "thesis.txt"])
def test_a_folder_of_somebody_else_is_left_alone(
    name: str, runs: dict[int | None, Path], stripes: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(FastrexError, match=r"^analyze: --out .* must be new or hold"):
        analyze.run([str(runs[0])], [f"a={stripes}"], out=tmp_path, device="cpu", say=lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == '{"mine": 1}'


def test_features_without_a_direction_say_whose(
    runs: dict[int | None, Path], stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = projected.layers

    def dead(x: Tensor, projector: Any) -> Any:
        for name, values in real(x, projector):
            yield name, values.index_fill(0, torch.tensor([3]), 0.0) if name == "output" else values

    monkeypatch.setattr(projected, "layers", dead)
    with pytest.raises(FastrexError, match=r"^analyze: <b>0 on a, output: .*got zeros alone in row 3; "):
        analyze.run([str(runs[0])], [f"a={stripes}"], out=tmp_path, device="cpu", say=lambda _: None)
