"""``fastrex report``: a page about real runs, whatever is missing or hostile in them."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
from conftest import settings_for, write_stripes
from test_show import Page

from fastrex import cli, markup, metrics
from fastrex import config as c
from fastrex.analysis import analyze
from fastrex.errors import FastrexError
from fastrex.report import build, groups, record, tradeoff
from fastrex.trainer import train
from fastrex.transfer import results, scores, suite

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed: pip install 'fastrex[train]'")

HOSTILE = "<&script><img src=x onerror=alert(1)>\"'"  # no slash: it is the name of a folder
CLOSING = "</style></title></script><img src=x onerror=alert(2)>"
SHORT = ["optim.epochs=2", "optim.warmup_epochs=1"]


def silent(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stripes, one class with a name that is markup."""
    root = tmp_path_factory.mktemp("images")
    for part, count in (("train", 16), ("val", 4)):
        write_stripes(root / part, count, seed=count)
        (root / part / "class-2").rename(root / part / HOSTILE)
    return root


@pytest.fixture(scope="module")
def made(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of different length and objective, evaluated on a transfer set; one has a hostile name."""
    folder = tmp_path_factory.mktemp("runs")
    for name, objective, more in ((HOSTILE, "class_means", []), ("plain", "cosine_softmax", SHORT)):
        config = c.load("demo", [*settings_for(objective), *more, f"data.path={json.dumps(str(images))}"])
        train(config, out=folder / name)
        suite.run(
            str(folder / name), [f"mine={images}"], root=None, out=None, probes=("knn",), protocol="grid", seeds=(22,),
            shots=(), size=None, cache=folder / "cache", threads=1, batch_size=64, compare=(), device="cpu", say=silent,
        )  # fmt: skip
    analyze.run(
        [str(folder / HOSTILE)], [f"mine={images}"], root=None, out=None, images=None, size=None,
        cache=folder / "cache", threads=1, device="cpu", say=silent,
    )  # fmt: skip
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of the class_means run, to be spoilt."""
    return Path(shutil.copytree(made / HOSTILE, tmp_path / "run"))


@pytest.fixture(scope="module")
def alone(made: Path) -> str:
    return build.run([made / HOSTILE], out=None, images=True, say=silent).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def both(made: Path) -> Path:
    return build.run([made / HOSTILE, made / "plain"], out=made / "both.html", images=True, say=silent)


def sections(page: str) -> list[str]:
    return re.findall(r'<section id="(\w+)">', page)


def omitted(page: str) -> str:
    return page.partition('id="omitted"')[2].partition("</section>")[0]


def write(run: Path, *records: object) -> None:
    lines = [line if isinstance(line, str) else json.dumps(line) for line in records]
    (run / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")


def page_of(*runs: Path, images: bool = False) -> str:
    (runs[0] / "page.html").unlink(missing_ok=True)
    return build.run(runs, out=runs[0] / "page.html", images=images, say=silent).read_text(encoding="utf-8")


def test_a_lone_run_shows_everything(alone: str, made: Path) -> None:
    assert sections(alone) == [
        "curves", "bank", "crops", "neighbours", "spectrum", "transfer", "config", "environment", "events",
    ]  # fmt: skip
    parsed = Page(alone)
    words = " ".join(parsed.words)
    titles = [w for w in parsed.words if w in ("Loss", "Top-1 accuracy", "Learning rate", "Gradient norm", "Speed")]
    assert len(titles) == 5
    for word in ("Waiting for data", "Empty classes", "Mean age of an entry", "Drift: change of prototypes per step"):
        assert word in words
    status = json.loads((made / HOSTILE / "status.json").read_text())
    assert "completed" in words
    assert "16 of 16" in words
    best = max(r["eval/knn"] for _, r in metrics.records(made / HOSTILE / "metrics.jsonl") if "eval/knn" in r)
    assert f"{100 * best:.2f} %" in words
    assert status["step"] == 16
    assert "model.arch</code></td><td><code>&quot;resnet18&quot;" in alone
    assert "recipe demo" in words
    assert "NCM" in words
    spread = alone.partition('id="spectrum"')[2].partition("</section>")[0]
    for layer in ("encoder", "hidden 1", "output"):
        assert f">mine, {layer}<" in spread
        assert f"<td>mine</td><td>{layer}</td>" in spread
    assert re.search(r"torch.{0,20}\d\.\d+", words)
    # 4 images with 3 crops each, 8 queries with 5 neighbours each.
    assert len(parsed.all("img")) == 4 * 3 + 8 * 6
    assert len(parsed.all("image")) == 4
    assert alone.count('class="right"') + alone.count('class="wrong"') == 8 * 5
    assert not omitted(alone)
    assert len(alone) < 600_000


def test_the_page_needs_nothing_and_runs_nothing(alone: str, both: Path) -> None:
    for page in (alone, both.read_text(encoding="utf-8")):
        parsed = Page(page)
        used = [e.get("src") or e.get("href") or "" for e in (*parsed.all("img"), *parsed.all("image"))]
        assert used
        assert all(source.startswith("data:image/") for source in used)
        assert all((link.get("href") or "").startswith("#") for link in parsed.all("a"))
        assert not parsed.all("script") + parsed.all("link") + parsed.all("iframe") + parsed.all("object")
        assert not [name for _, attributes in parsed.elements for name in attributes if name.startswith("on")]
        assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'\"" in page
        assert "http:" not in page.replace("http-equiv", "")
        assert "https:" not in page
        assert HOSTILE in " ".join(parsed.words)  # the class, the file, the run


def test_several_runs_side_by_side(both: Path) -> None:
    page = both.read_text(encoding="utf-8")
    assert sections(page)[:2] == ["curves", "bank"]
    assert {"crops", "neighbours", "spectrum", "transfer", "tradeoff", "config", "environment"} <= set(sections(page))
    parsed = Page(page)
    words = " ".join(parsed.words)
    assert "2 runs" in words
    assert "Settings that differ between the runs." in words
    config = page.partition('id="config"')[2].partition("<details>")[0]
    assert "optim.epochs" in config
    assert "objective.name" in config
    assert "model.arch" not in config
    assert "training task: held-out top-1, own classifier" in words
    assert "Mean over 1 set: mine by k-NN." in words
    assert 'class="mark k1"' in page.partition('id="tradeoff"')[2]
    # One of the runs has an analysis, the other has none: the same images for both.
    assert page.count(", 16 held-out images ends at") == 2
    # The longer run gives the axis, the shorter one ends before.
    loss = next(chart for chart in page.split('<svg class="chart"') if ">Loss<" in chart)
    ends = [
        max(float(x) for x in re.findall(r"[ML]([\d.]+) ", path)) for path in re.findall(r' d="(M[^"]*L[^"]*)"', loss)
    ]
    assert len({round(end) for end in ends}) == 2


def test_hostile_words_of_every_file(run: Path, tmp_path: Path) -> None:
    write(run, *({"step": i, "train/loss": 1.0 / (i + 1), "eval/top1": 0.5, CLOSING: 1} for i in range(50)))
    status = {"state": CLOSING, "time": CLOSING, "error": CLOSING, "step": 3}
    (run / "status.json").write_text(json.dumps(status), encoding="utf-8")
    (run / "env.json").write_text(json.dumps({CLOSING: {CLOSING: CLOSING}, "gpus": [CLOSING]}), encoding="utf-8")
    (run / "train.log").write_text(f"2026-01-01T00:00:00 {CLOSING}\n\x1b[31m{CLOSING}\u202e\n", encoding="utf-8")
    layer = {"layer": "encoder", "coding_length": 1.5, "spectrum": [1.0, 0.5, "x", None, 0.1]}
    subject = {"name": CLOSING, "sets": [{"name": CLOSING, "layers": [layer, CLOSING, {"layer": CLOSING}]}]}
    (run / "analysis" / "analysis.json").write_text(json.dumps({"subjects": [subject, 3]}), encoding="utf-8")
    text = (run / "config.toml").read_text(encoding="utf-8")
    (run / "config.toml").write_text(re.sub(r"^recipe = .*", f"recipe = {json.dumps(CLOSING)}", text), encoding="utf-8")
    result = json.loads((run / "transfer" / "transfer.json").read_text())
    result["sets"][0]["name"] = result["sets"][0]["title"] = CLOSING
    result["skipped"] = [{"name": CLOSING, "reason": CLOSING, "get": CLOSING}]
    result["means"][CLOSING] = result["means"]["all"]
    (run / "transfer" / "transfer.json").write_text(json.dumps(result), encoding="utf-8")
    other = Path(shutil.copytree(run, tmp_path / CLOSING.replace("/", "|")))
    for page in (page_of(run), page_of(run, other)):
        parsed = Page(page)
        assert "<img src=x" not in page
        assert page.count("</style>") == page.count("</head>") == 1
        assert not parsed.all("script") + parsed.all("img")
        assert not [name for _, attributes in parsed.elements for name in attributes if name.startswith("on")]
        words = " ".join(parsed.words)
        assert words.count(CLOSING) >= 8
        assert "\\x1b[31m" in words
        assert "\\u202e" in words
        assert "coding length" in words


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        ("config.toml", "Configuration of run: it is not there"),
        ("env.json", "Environment of run: it is not there"),
        ("status.json", "State of run: it is not there"),
        ("metrics.jsonl", "Curves of run: it is not there"),
        ("train.log", "Events of run: it is not there"),
        ("transfer/transfer.json", "Transfer of run: there is none; fastrex transfer makes it"),
    ],
)
def test_what_is_missing_is_left_out_and_said(run: Path, spoil: str, why: str) -> None:
    (run / spoil).unlink()
    page = page_of(run)
    assert why in omitted(page)
    Page(page)
    if spoil == "config.toml":
        assert "config" not in sections(page)
        assert "curves" in sections(page)
    for hostile in (b"", b"\x00\xff[", b"[" * 100_000, b'{"sets": [], "version": 1}', b'{"version": 1e999}'):
        (run / spoil).write_bytes(hostile)
        Page(page_of(run))
    (run / spoil).unlink()
    (run / spoil).mkdir()
    Page(page_of(run))


def test_lines_that_are_cut_or_hostile(run: Path) -> None:
    good = [{"step": i, "train/loss": 2.0 - i / 100, "train/lr": 0.1} for i in range(100)]
    bad = [
        "not json", '{"step": 1', '{"step": "7", "train/loss": 1}', '{"step": -5, "train/loss": 1}', "[]", "null",
        '{"step": 3, "train/loss": "x"}', '{"step": 3, "train/loss": 1e308}', '{"step": 3, "train/loss": [1, 2]}',
        '{"step": 9223372036854775807, "train/lr": 0.1}', '{"step": 101, "train/loss": NaN}', "x" * 200_000,
        '{"step": 102, "train/loss": null}', '{"step": 10000000000000000000000, "train/loss": 1}', '{"step": 103, "tr',
    ]  # fmt: skip
    write(run, *good[:50], *bad, *good[50:], '{"step": 500, "train/lo')
    page = page_of(run)
    parsed = Page(page)
    assert "curves" in sections(page)
    assert not re.search(r'(?:d|x|y|width|height)="[^"]*(nan|inf)', page)
    found = record.read(run, "run").curves["train/loss"]
    values = [value for _, value in found]
    assert values.count(None) == 4  # x, 1e308, a list, null; NaN is no JSON, so its line is none
    assert len(found.finite()) == 100
    assert "no number to show" in " ".join(parsed.words)


def test_a_run_that_is_being_written(run: Path) -> None:
    lines = [json.dumps({"step": i, "train/loss": 1.0 / i, "train/lr": 0.1}) + "\n" for i in range(1, 4000)]
    (run / "metrics.jsonl").write_text(lines[0])

    def grow() -> None:
        with (run / "metrics.jsonl").open("a") as file:
            for line in lines[1:]:
                for part in (line[:17], line[17:]):
                    file.write(part)
                    file.flush()

    writer = threading.Thread(target=grow)
    writer.start()
    seen = []
    while writer.is_alive():
        found = record.read(run, "run").curves["train/loss"]
        assert [int(step) for step, _ in found] == list(range(1, len(found) + 1))
        seen.append(len(found))
    writer.join()
    assert seen == sorted(seen)
    assert len(record.read(run, "run").curves["train/loss"]) == 3999


def test_a_run_that_has_just_begun_and_one_without_checkpoint(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "export")
    page = page_of(run, images=True)
    assert "crops" in sections(page)
    assert "Neighbours and spectrum of run" in omitted(page)
    assert "must hold an export or a good checkpoint" in omitted(page)
    write(run)
    (run / "train.log").write_text("")
    (run / "status.json").write_text(json.dumps({"state": "running", "pid": 1, "host": "elsewhere"}))
    page = page_of(run, images=True)
    assert "curves" not in sections(page)
    assert "metrics.jsonl has no whole line yet" in omitted(page)
    assert "running" in " ".join(Page(page).words)


def test_images_that_are_gone_or_broken(run: Path, images: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(images, tmp_path / "images"))
    text = (run / "config.toml").read_text(encoding="utf-8")
    (run / "config.toml").write_text(text.replace(str(images), str(copied)), encoding="utf-8")
    for path in sorted(copied.rglob("*.jpg"))[::7]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    page = page_of(run, images=True)
    Page(page)
    assert "neighbours" in sections(page)
    shutil.rmtree(copied)
    page = page_of(run, images=True)
    assert "crops" not in sections(page)
    assert "Crops and neighbours of run" in omitted(page)
    assert str(copied) in omitted(page)


def test_training_against_transfer_takes_what_all_have(made: Path, tmp_path: Path) -> None:
    runs = [Path(shutil.copytree(made / name, tmp_path / short)) for name, short in ((HOSTILE, "a"), ("plain", "b"))]
    for number, run in enumerate(runs):
        path = run / "transfer" / "transfer.json"
        result = json.loads(path.read_text())
        (first,) = result["sets"]
        right = {"pets": [10, 30 + 10 * number], "train": [40 - number, 60 + number], f"own{number}": [1, 9]}
        result["sets"] = [
            {**first, "name": name, "probes": {"knn": {**first["probes"]["knn"], "right": tally, "top1": {
                "mean": tally[1] / sum(tally), "std": 0.0, "low": 0.5, "high": 0.7, "seeds": [0.6]}}}}
            for name, tally in right.items()
        ]  # fmt: skip
        result["means"] = results.means(result["sets"])
        path.write_text(json.dumps(result))
    found = [record.read(run, run.name) for run in runs]
    section = tradeoff.tradeoff(found)
    # The official probe is logistic regression; what both have is k-NN.
    assert "Mean over 1 set: pets by k-NN." in section.note
    assert "training task: train, top-1 of the probe (k-NN) (%)" in section.body
    expected = scores.mean({"pets": [10, 30]}, ["pets"])
    assert expected is not None
    assert expected["log_odds"]["value"] == pytest.approx(math.log(3))
    said = "a: training task: train, top-1 of the probe (k-NN) 60.00 % (50.00 % to 70.00 %); mean log-odds"
    assert f"{said} {math.log(3):.4g}" in " ".join(Page(section.body).words)
    found[1].transfer = None
    assert "at least two runs need results" in tradeoff.tradeoff(found).omitted[0]
    assert tradeoff.tradeoff(found[:1]).omitted == ()


def test_folders_that_are_no_runs_and_pages_that_are_no_reports(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FastrexError, match=r"report: RUN must be a run directory, got .*nothing"):
        build.run([tmp_path / "nothing"], out=None, images=False, say=silent)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FastrexError, match=r"report: RUN must be a run directory, got .*empty; give what --out"):
        build.run([run, tmp_path / "empty"], out=None, images=False, say=silent)
    with pytest.raises(FastrexError, match="report: RUN must name each run once"):
        build.run([run, run.parent / "." / run.name], out=None, images=False, say=silent)
    for content in ("mine", markup.document("t", "", generator="fastrex data show"), ""):
        (run / "report.html").write_text(content, encoding="utf-8")
        with pytest.raises(FastrexError, match=r"report: --out must be a new file or a report of fastrex, got .*html"):
            build.run([run], out=None, images=False, say=silent)
        assert (run / "report.html").read_text() == content
    (run / "report.html").unlink()
    target = tmp_path / "elsewhere"
    (run / "report.html").symlink_to(target)
    assert build.run([run], out=None, images=False, say=silent) == run / "report.html"
    assert not target.exists()
    first = (run / "report.html").read_text(encoding="utf-8")
    write(run, {"step": 1, "train/loss": 1.0})
    build.run([run], out=None, images=False, say=silent)
    assert (run / "report.html").read_text(encoding="utf-8") != first
    with pytest.raises(FastrexError, match=r"report: .*cannot be written \(.*; choose another --out"):
        build.run([run], out=tmp_path / "no" / "page.html", images=False, say=silent)
    with pytest.raises(FastrexError, match="--out must be a new file"):
        build.run([run], out=tmp_path, images=False, say=silent)


def test_command_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    other = shutil.copytree(run, tmp_path / "other")

    def call(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["fastrex", "report", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0)

    assert call(str(run), "--no-images") == 0
    assert capsys.readouterr().out.strip() == f"report: {run / 'report.html'}"
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "--no-images" in omitted(page)
    assert not {"crops", "neighbours"} & set(sections(page))
    assert "spectrum" in sections(page)  # of fastrex analyze
    shutil.rmtree(run / "analysis")
    assert call(str(run), "--no-images") == 0
    assert "spectrum" not in sections((run / "report.html").read_text(encoding="utf-8"))
    assert call(str(run), str(other), "--no-images") == 0
    assert (tmp_path / "report.html").is_file()
    assert call(str(run), "--no-images", "--out", str(tmp_path / "named.html")) == 0
    assert (tmp_path / "named.html").is_file()
    capsys.readouterr()
    assert call(str(tmp_path)) == 1
    assert "report: RUN must be a run directory" in capsys.readouterr().err


def test_the_longest_run_makes_a_small_page(run: Path) -> None:
    names = ("train/loss", "train/top1", "train/grad_norm", "perf/images_per_s", "perf/data_wait", "bank/age")
    with (run / "metrics.jsonl").open("w") as file:
        for i in range(20_000):
            values = dict.fromkeys(names, (i * 7919 % 1000) / 1000)
            file.write(json.dumps({"step": 25 * i, "train/epoch": i / 200, **values}) + "\n")
    page = page_of(run)
    assert len(page) < 400_000
    assert "499,975" in " ".join(Page(page).words)


def test_names_of_runs() -> None:
    assert record.names([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert record.names([Path("/a/x"), Path("/b/x")]) == ["a/x", "b/x"]
    assert record.names([Path("/")]) == ["/"]


ARMS = ("base", "mc", "ocm1", "ocm3", "pr0", "pr1", "pr2", "pr3", "all-of-them")
SETS = ("train", "in1k", "letters", "faces", "own")  # the last one only some runs have


def entry(name: str, right: list[int], number: int) -> dict[str, Any]:
    """A set of transfer.json with what its own writer makes of predictions: ``right`` [wrong, right] test images."""
    labels = np.arange(sum(right)) % 2
    predictions = [np.where(np.arange(len(labels)) < right[1], labels, 1 - labels)]
    probe = {**scores.scored(predictions, labels, 2, name), "chosen": [{}], "seconds": 0.1}
    return {
        "name": name, "title": name, "official": False, "classes": 2, "train": 100, "test": len(labels), "shots": None,
        "headline": "logistic", "fingerprint": "0" * 64, "images": "1" * 64, "notices": [], "as_published": False,
        "probes": {"logistic": probe, **({"knn": probe} if number % 2 else {})},
    }  # fmt: skip


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """27 runs in 9 groups, half of them with a bank, evaluated by probes alone."""
    folder = tmp_path_factory.mktemp("arms")
    runs = []
    for number, (arm, seed) in enumerate((arm, seed) for arm in ARMS for seed in range(3)):
        place, banked = number // 3, arm.startswith("ocm")
        config = c.load("demo", [
            *settings_for("class_means" if banked else "cosine_softmax"), *SHORT, f"run.seed={seed}",
            "eval.every_epochs=0", f"model.ema_momentum={0.9 + place / 100:g}", "data.path='images'",
            *(["projector.enabled=false"] if arm == "base" else []),
        ])  # fmt: skip
        run = folder / f"{arm}-seed{seed}"
        run.mkdir()
        (run / "config.toml").write_text(c.to_toml(config), encoding="utf-8")
        (run / "status.json").write_text(
            json.dumps({"state": "completed", "time": "2026-01-01T00:00:00Z", "step": 900})
        )
        names = ["train/loss", "train/top1", "train/grad_norm", "train/class_change", "perf/images_per_s", "train/lr"]
        names += ["bank/age", "bank/empty_classes"] if banked else []
        write(run, *(
            {"step": 3 * i, "train/epoch": i / 150, **{n: 1 + math.sin(i / 9 + place) / 9 + seed / 50 for n in names}}
            for i in range(1, 301)
        ))  # fmt: skip
        right = {"train": 400 + 9 * place + seed, "in1k": 900 - 7 * place - seed, "letters": 500 + 10 * place + seed,
                 "faces": 600 - 12 * place + 20 * seed, "own": 10}  # fmt: skip
        sets = [entry(name, [1000 - right[name], right[name]], number) for name in SETS if name != "own" or place]
        (run / "transfer").mkdir()
        results.write(run / "transfer" / "transfer.json", {
            "version": 1, "source": run.name, "encoder": {"identity": "2" * 64, "arch": "resnet18", "features": 512},
            "transform": {"resize": 32, "size": 32, "channels": 3, "interpolation": "bicubic"}, "protocol": "grid",
            "seeds": [0], "shots": [], "environment": {}, "sets": sets, "skipped": [], "means": results.means(sets),
        })  # fmt: skip
        runs.append(run)
    return runs


@pytest.fixture(scope="module")
def crowd(arms: list[Path]) -> Path:
    return build.run(arms, out=arms[0].parent / "crowd.html", images=False, say=silent)


def part(page: str, key: str) -> str:
    return page.partition(f'<section id="{key}">')[2].partition("</section>")[0]


def test_the_training_task_is_across_and_never_up(arms: list[Path]) -> None:
    for left_out, task in (("", "in1k"), ("in1k", "train")):
        found = [record.read(run, run.name) for run in arms]
        for one in found:
            assert one.transfer is not None
            one.transfer["sets"] = [e for e in one.transfer["sets"] if e["name"] != left_out]
        section = tradeoff.tradeoff(found)
        assert "Mean over 2 sets: letters, faces." in section.note
        assert f"training task: {task}, top-1 of the probe (%)" in section.body
        for number in (0, 13, 26):
            place, seed = divmod(number, 3)
            odds = [
                math.log(p / (1 - p)) for p in ((500 + 10 * place + seed) / 1000, (600 - 12 * place + 20 * seed) / 1000)
            ]
            across = (400 + 9 * place + seed if task == "train" else 900 - 7 * place - seed) / 10
            said = f"{found[number].name}: training task: {task}, top-1 of the probe {across:.2f} %; mean log-odds "
            (up,) = re.findall(re.escape(said) + r"([−\d.]+)", section.body)
            assert float(up.replace("−", "-")) == pytest.approx(sum(odds) / 2, rel=1e-3)
    # Without the probe on the training task nothing says what is across: these runs were not evaluated either.
    for one in found:
        assert one.transfer is not None
        one.transfer["sets"] = [e for e in one.transfer["sets"] if e["name"] not in tradeoff.TRAINING]
    assert "no accuracy on the training task is known for all" in tradeoff.tradeoff(found).omitted[0]
    assert found[4].transfer is not None
    found[4].transfer["sets"][0]["images"] = "3" * 64
    assert "letters is left out, the runs were measured on different images" in tradeoff.tradeoff(found).omitted[0]


def test_many_runs_have_a_name_and_a_colour_for_each_group(crowd: Path) -> None:
    page = crowd.read_text(encoding="utf-8")
    assert len(page) < 1_000_000
    scatter = part(page, "tradeoff")
    chart = Page("<svg" + scatter.partition("<svg")[2].partition("</svg>")[0] + "</svg>")
    points = [a["class"] for name, a in chart.elements if name == "path" and (a.get("class") or "").startswith("mark")]
    assert len(points) == 27 + 9
    assert [points.count(f"mark k{i}") for i in range(7)] == [8, 8, 4, 4, 4, 4, 4]
    key = re.findall(r"<tr><td>(.*?)</td><td[^>]*>(\d)</td><td[^>]*>([^<]*)</td>", scatter.partition("<tbody>")[2])
    assert [(Page(name).words[-1], runs) for name, runs, _ in key] == [(arm, "3") for arm in ARMS]
    signs = [name.partition("</svg>")[0] for name, _, _ in key]
    assert len(set(signs)) == 9
    assert key[0][2] == "89.90 ± 0.10"
    loss = next(drawn for drawn in part(page, "curves").split('<svg class="chart"') if ">Loss<" in drawn)
    assert re.findall(r'<text class="name"[^>]*>([^<]*)', loss) == list(ARMS)
    assert loss.count('opacity="0.3"') == 27
    assert loss.count('class="line') == 27 + 9 + 9  # legend
    drift = next(drawn for drawn in part(page, "bank").split('<svg class="chart"') if ">Drift" in drawn)
    assert ">Drift: change of class vectors per step<" in drift
    assert ">ocm1 (prototypes)<" in drift
    assert ">pr3 (weights)<" in drift
    config = part(page, "config").partition("<details>")[0]
    assert config.count("<th>") == 1 + 9
    assert re.search(r"run\.seed</code></td>(<td><code>0, 1, 2</code></td>){9}", config)
    overview = page.partition("<main>")[0]
    assert overview.count("no projector") == 3
    assert overview.count("hidden layer") == 24


def test_runs_that_were_measured_once_are_bars(arms: list[Path], tmp_path: Path) -> None:
    copied = [Path(shutil.copytree(run, tmp_path / run.name)) for run in arms]
    for number, run in enumerate(copied):
        with (run / "metrics.jsonl").open("a") as file:
            file.write(
                "\n" + json.dumps({"step": 900, "eval/top1": 0.3 + number // 3 / 100 + number % 3 / 1000}) + "\n"
            )
    section = build.curves.training([record.read(run, run.name) for run in copied])
    (chart,) = [drawn for drawn in section.body.split('<svg class="chart"') if ">Top-1, held out, own" in drawn]
    assert chart.count('class="bar ') == 9
    assert "mc: 31.10 % (31.00 % to 31.20 %)" in chart
    with (copied[0] / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 950, "eval/top1": 0.4}) + "\n")
    again = build.curves.training([record.read(run, run.name) for run in copied])
    assert 'class="bar ' not in again.body


def test_what_the_change_of_class_vectors_is_called(arms: list[Path]) -> None:
    found = {run.name: record.read(run, run.name) for run in arms}
    for name, title in (("ocm3-seed1", "Drift: change of prototypes"), ("pr3-seed0", "Change of class weights")):
        assert f">{title} per step<" in build.curves.bank([found[name]]).body


def test_the_mean_of_curves_where_all_go_on() -> None:
    curves = [record.Curve(), record.Curve()]
    for step, value in ((1, 1.0), (3, 3.0), (3, 5.0), (5, None), (9, 9.0)):
        curves[0].add(step, value)
    for step, value in ((2, 10.0), (4, 20.0), (7, 30.0)):
        curves[1].add(step, value)
    mean = build.curves._mean(curves)
    assert [step for step, _ in mean] == [2, 3, 4, 5, 7]
    assert [value for _, value in mean][:3] == [5.5, 7.5, 12.5]
    assert all(value is not None and math.isnan(value) for _, value in mean[3:])


def test_groups_are_of_runs_that_differ_in_the_seed() -> None:
    def of(*names: str) -> list[tuple[str, int]]:
        return [(g.name, len(g.records)) for g in groups.groups([record.Record(Path(n), n) for n in names])]

    assert of("a-seed0", "a-seed1") == [("a-seed0", 1), ("a-seed1", 1)]  # few: one by one
    names = ["a-seed0", "b", "a-seed11", "x/c_seed_1", "y/c_seed_1", "a", "seed3", "y/c_seed_2", "a-seed1-more"]
    assert of(*names) == [
        ("a, seeds", 2), ("b", 1), ("x/c_seed_1", 1), ("y/c", 2), ("a", 1), ("seed3", 1), ("a-seed1-more", 1),
    ]  # fmt: skip


# What a page has to keep to in a window of any width.
LAYOUT = """(() => {
  const box = e => e.getBoundingClientRect();
  const small = [], over = [], cut = [];
  for (const chart of document.querySelectorAll('svg.chart')) {
    const scale = box(chart).width / chart.viewBox.baseVal.width;
    const texts = [...chart.querySelectorAll('text')];
    for (const text of texts) {
      const size = parseFloat(getComputedStyle(text).fontSize) * scale;
      if (size < 10) small.push([text.textContent, size]);
      if (box(text).left < box(chart).left - 1 || box(text).right > box(chart).right + 1) cut.push(text.textContent);
    }
    for (let i = 0; i < texts.length; i++) for (let j = 0; j < i; j++) {
      const a = box(texts[i]), b = box(texts[j]);
      if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3)
        over.push([texts[i].textContent, texts[j].textContent]);
    }
  }
  const pictures = [...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).length;
  const tiny = [...document.querySelectorAll('body *')].filter(e => !e.closest('svg') && e.childElementCount === 0
    && e.textContent.trim() && parseFloat(getComputedStyle(e).fontSize) < 10).length;
  const root = document.documentElement;
  return {charts: document.querySelectorAll('svg.chart').length, images: document.images.length, small, over, cut,
    pictures, tiny, wide: root.scrollWidth - innerWidth, back: getComputedStyle(document.body).backgroundColor};
})()"""


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    if browser.find() is None:
        pytest.skip(f"no browser is installed: one of {', '.join(browser.NAMES)}")
    with browser.chromium(tmp_path_factory.mktemp("browser") / "files") as opened:
        yield opened.page()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 800, 400])
@pytest.mark.parametrize("which", ["alone", "both"])
def test_in_a_browser(
    window: browser.Page, made: Path, alone: str, both: Path, which: str, width: int, dark: bool
) -> None:
    page = both if which == "both" else made / HOSTILE / "report.html"
    window.open(page, width, dark=dark)
    found = window.evaluate(LAYOUT)
    assert window.complaints == []
    assert [url for url in window.requests if not url.startswith("data:")] == [page.resolve().as_uri()]
    assert found["charts"] >= 11
    assert found["images"] >= 40
    for fault in ("small", "over", "cut"):
        assert found[fault] == [], fault
    assert (found["pictures"], found["tiny"]) == (0, 0)
    assert found["wide"] <= 0
    assert (found["back"] == "rgb(255, 255, 255)") != dark


@pytest.mark.parametrize("width", [1280, 400])
def test_many_runs_in_a_browser(window: browser.Page, crowd: Path, arms: list[Path], width: int) -> None:
    renamed = [Path(shutil.copytree(run, crowd.parent / f"{width}" / f"run {i:02}")) for i, run in enumerate(arms)]
    alone = build.run(renamed, out=crowd.parent / f"alone{width}.html", images=False, say=silent)
    for page, named in ((crowd, list(ARMS)), (alone, [str(i + 1) for i in range(27)])):
        window.open(page, width)
        found = window.evaluate(LAYOUT)
        assert window.complaints == []
        for fault in ("small", "over", "cut"):
            assert found[fault] == [], fault
        assert found["wide"] <= 0
        assert found["tiny"] == 0
        script = "[...document.querySelectorAll('#tradeoff svg.chart text.name')].map(e => e.textContent)"
        assert sorted(window.evaluate(script)) == sorted(named)
    script = (
        "[...document.querySelectorAll('#tradeoff table.key tbody tr')].map(r => r.innerText.split('\\t').slice(0, 2))"
    )
    assert window.evaluate(script) == [[str(i + 1), f"run {i:02}"] for i in range(27)]


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", ["transfer/transfer.html", "analysis/analysis.html"])
def test_the_other_pages_in_a_browser(window: browser.Page, made: Path, name: str, width: int) -> None:
    page = made / HOSTILE / name
    window.open(page, width)
    found = window.evaluate(LAYOUT)
    assert window.complaints == []
    assert window.requests == [page.resolve().as_uri()]
    for fault in ("small", "over", "cut"):
        assert found[fault] == [], fault
    assert found["wide"] <= 0
    assert found["tiny"] == 0


def test_the_browser_test_sees_what_it_looks_for(window: browser.Page, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    chart = '<svg class="chart" viewBox="0 0 {} 100" width="300"><text x="0" y="50">a</text><text x="2" y="50">b</text>'
    charts = f"{chart.format(4000)}</svg>{chart.format(300)}<text x='290' y='90'>wide</text></svg>"
    wide = '<div style="width: 3000px">x</div><p style="font-size: 5px">x</p>'
    body = f'{charts}{wide}<img src="data:image/png;base64,AAAA">'
    page.write_text(markup.document("t", f"{body}<script>alert(1)</script><img src='https://example.invalid/x.png'>"))
    window.open(page, 400)
    found = window.evaluate(LAYOUT)
    assert found["small"]
    assert found["over"] == [["b", "a"]]
    assert found["cut"] == ["wide"]
    assert found["pictures"] == 2
    assert found["tiny"] == 1
    assert found["wide"] > 2000
    assert any("script" in complaint for complaint in window.complaints)
    assert any("img-src" in complaint or "example.invalid" in complaint for complaint in window.complaints)
