"""``fastrex data show``: the page and the contact sheet say what the plan drew, and no name can break out of them."""

from __future__ import annotations

import base64
import dataclasses
import importlib
import io
import re
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SETTINGS, write_stripes
from PIL import Image

from fastrex import cli, standalone
from fastrex import config as c
from fastrex.config import AugmentConfig, Config, DataConfig
from fastrex.data import page, show
from fastrex.data import plan as planner
from fastrex.data.index import Index, build
from fastrex.data.plan import Plan
from fastrex.errors import FastrexError, UsageError

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed: pip install 'fastrex[train]'")

op = importlib.import_module("fastrex_kernels.augment")  # the package re-exports a function of the same name
DATA = DataConfig(threads=2, global_size=72, local_crops=2, local_size=16, local_scale=(0.1, 0.3))
HOSTILE = "<img src=x onerror=alert(1)> & \"quoted\" 'name'.jpg"
VOID = {"meta", "img"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Striped JPEGs, one with a name that is markup, one that is no UTF-8, and a 16-bit PNG."""
    root = tmp_path_factory.mktemp("images")
    write_stripes(root, 3, seed=0)
    (root / "class-0" / "00.jpg").rename(root / "class-0" / HOSTILE)
    (root / "class-1" / "00.jpg").rename(root / "class-1" / "caf\udce9\u202e.jpg")
    deep = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)
    Image.fromarray(deep).save(root / "class-2" / "deep.png")
    return root


@pytest.fixture(scope="module")
def index(folder: Path) -> Index:
    return build(folder)


def make_plan(index: Index, data: DataConfig = DATA, batch: int = 4) -> Plan:
    rows = index.rows("train", 0.0)
    return Plan(7, batch, rows, index.heights, index.widths, data, AugmentConfig(), labels=index.labels)


class Page(HTMLParser):
    """The elements of a page with their attributes, and the text inside; checks that every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def render(index: Index, samples: list[show.Sample], data: DataConfig = DATA) -> str:
    config = dataclasses.replace(Config(), data=dataclasses.replace(data, path=str(index.root)))
    return page.page(samples, config, "a title", "fastrex data show 'x & <y>'", ["a notice"])


def test_page_has_every_sample_with_its_boxes_crops_and_draws(index: Index) -> None:
    plan = make_plan(index)
    samples = show.of_batch(index, plan, DATA, 1, 1, 3)
    html = render(index, samples)
    parsed = Page(html)
    counts = Counter(tag for tag, _ in parsed.elements)
    assert (counts["article"], counts["svg"], counts["img"], counts["rect"]) == (3, 3, 9, 9)
    assert counts["script"] == counts["link"] == counts["iframe"] == 0
    assert {"html", "head", "body", "title", "style"} <= set(counts)
    sources = [e.get("src") for e in parsed.all("img")] + [e.get("href") for e in parsed.all("image")]
    assert len(sources) == 12
    assert all(source and source.startswith("data:image/") for source in sources)
    assert "http:" not in html.replace("http-equiv", "")
    assert "https:" not in html
    assert not [name for _, attributes in parsed.elements for name in attributes if name.startswith("on")]
    assert "prefers-color-scheme: dark" in html
    part = plan.batch(1, 1)
    text = " ".join(parsed.words)
    for line, row in enumerate(part.samples[:3].tolist()):
        assert index.classes[index.labels[row]] in text
        assert f"row {row}, place {line} of the batch" in text
        assert f"{index.widths[row]} × {index.heights[row]} pixels" in text
    boxes = [(float(r["x"] or -1), float(r["y"] or -1), float(r["width"] or 0)) for r in parsed.all("rect")]
    planned = [g.boxes[k, b] for b in range(3) for g in part.groups for k in range(g.group.crops)]
    assert boxes == [(left, top, width) for top, left, _, width in planned]
    for group in part.groups:
        for params in group.params[:, :3].reshape(-1, 9):
            assert f"BRIGHTNESS {params[planner.BRIGHTNESS]:.6g}, CONTRAST {params[planner.CONTRAST]:.6g}" in text
    for word in ("a title", "a notice", "fastrex data show 'x & <y>'", "augment.global_blur", "72 × 72", "25% to 100%"):
        assert word in text


def test_crops_of_the_page_are_those_of_the_training(index: Index) -> None:
    from fastrex.data.loader import TrainLoader

    plan = make_plan(index)
    with TrainLoader(index, plan, DATA, device="cpu", dtype=torch.float32, start=2, stop=3) as loader:
        (batch,) = loader
    samples = show.of_batch(index, plan, DATA, 0, 2, 4)
    images = [base64.b64decode((e["src"] or "").partition(",")[2]) for e in Page(render(index, samples)).all("img")]
    std, mean = torch.tensor(DATA.std).view(3, 1, 1), torch.tensor(DATA.mean).view(3, 1, 1)
    wanted = [
        (crops[k * 4 + b] * std + mean) * 255 for b in range(4) for crops in batch.crops for k in range(len(crops) // 4)
    ]
    assert len(images) == len(wanted) == 12
    for image, crop in zip(images, wanted, strict=True):
        with Image.open(io.BytesIO(image)) as picture:
            shown = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        assert (shown - crop).abs().max() <= 0.501


def test_names_cannot_become_markup(index: Index) -> None:
    hostile = next(row for row in range(len(index)) if "onerror" in index.name(row))
    strange = next(row for row in range(len(index)) if "caf" in index.name(row))
    samples = show.of_names(index, make_plan(index), DATA, 0, [index.name(hostile), str(strange)])
    html = render(index, samples)
    parsed = Page(html)
    assert "<img src=x" not in html
    assert not [e for e in parsed.all("img") if e.get("src") == "x"]
    assert not [name for _, attributes in parsed.elements for name in attributes if name.startswith("on")]
    text = " ".join(parsed.words)
    assert HOSTILE in text
    assert f"global 0 of class-0/{HOSTILE}" in {e["alt"] for e in parsed.all("img")}
    # A byte that is no UTF-8 and a mark that turns the direction of writing are spelt out.
    assert "caf\\xe9\\u202e.jpg" in text
    html.encode("utf-8")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a<b>&\"c'", "a&lt;b&gt;&amp;&quot;c&#x27;"),
        ("line\nbreak\x00\x7f", "line\\nbreak\\x00\\x7f"),
        ("\ud800\udcff", "\\ud800\\xff"),
        ("日本 é", "日本 é"),
    ],
)
def test_text_is_escaped_and_visible(value: str, shown: str) -> None:
    assert page.text(value) == shown


def test_a_sample_is_chosen_by_row_path_and_absolute_path(index: Index, folder: Path) -> None:
    name = "class-3/01.jpg"
    row = show.find(index, name)
    assert index.name(row) == name
    assert show.find(index, str(row)) == row
    assert show.find(index, str(folder / name)) == row
    plan = make_plan(index, batch=2)
    (sample,) = show.of_names(index, plan, DATA, 3, [name])
    assert (sample.row, sample.name, sample.label) == (row, name, "class-3")
    places, _ = plan.occurrences(row, 3)
    step, place = divmod(int(places[0]), 2)
    assert sample.note == f"place {place} of step {step} in epoch 3"
    part = plan.batch(3, step)
    drawn = [crop.params.tolist() for crop in sample.crops]
    assert drawn == [g.params[k, place].tolist() for g in part.groups for k in range(g.group.crops)]
    assert sample.crops[0].picture.size == (72, 72)


def test_members_of_a_tar_shard_are_shown(index: Index, tmp_path: Path) -> None:
    shard = tmp_path / "shard-0000.tar"
    with tarfile.open(shard, "w") as tar:
        for row in range(4):
            for ending, content in (("jpg", index.path(row).read_bytes()), ("cls", b"%d" % (row % 2))):
                info = tarfile.TarInfo(f"{row:04d}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    shards = build(shard)
    (sample,) = show.of_names(shards, make_plan(shards, batch=2), DATA, 0, ["shard-0000.tar/0002.jpg"])
    assert sample.source is not None
    assert (sample.name, sample.source.size) == ("shard-0000.tar/0002.jpg", (sample.width, sample.height))
    Page(render(shards, [sample]))


def test_notes_of_chosen_samples(index: Index) -> None:
    data = dataclasses.replace(DATA, repeats=2)
    plan = make_plan(index, data, batch=4)
    twice = show.of_names(index, plan, data, 0, ["class-3/01.jpg"])
    assert len(twice) == 2
    assert twice[1].note.endswith(", view 1")
    assert (twice[0].crops[0].params != twice[1].crops[0].params).any()
    seen = {row for step in range(plan.steps_per_epoch) for row in plan.batch(0, step).samples.tolist()}
    missing = next(row for row in range(len(index)) if row not in seen)
    assert show.of_names(index, plan, data, 0, [str(missing)])[0].note == "not drawn in epoch 0"
    some = Plan(7, 4, index.rows("train", 0.4), index.heights, index.widths, DATA, AugmentConfig())
    held = str(index.rows("val", 0.4)[0])
    assert show.of_names(index, some, DATA, 0, [held])[0].note == "held out: no image of the training"


def test_wrong_samples_are_named_with_the_way_out(folder: Path, index: Index, tmp_path: Path) -> None:
    with pytest.raises(
        FastrexError, match=rf"a row below {len(index)} or a path relative to .*got '01\.jpg'.*class-0/01"
    ):
        show.find(index, "01.jpg")
    with pytest.raises(FastrexError, match=r"got '9999'$"):
        show.find(index, "9999")
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "class-1" / "broken.jpg").write_bytes(b"\xff\xd8 no more")
    with pytest.raises(FastrexError, match=r"'class-1/broken\.jpg' was left out \(.*\); choose another image"):
        show.find(build(tmp_path / "copy"), "class-1/broken.jpg")


def test_grey_images_and_what_was_done_in_words(index: Index) -> None:
    data = dataclasses.replace(DATA, channels=1)
    samples = show.of_batch(index, make_plan(index, data), data, 0, 0, 2)
    assert {crop.picture.mode for sample in samples for crop in sample.crops} == {"L"}
    words = {word.partition(" ")[0] for sample in samples for crop in sample.crops for word in page.words(crop)}
    assert words <= {"flipped", "brightness", "contrast", "blurred", "solarised"}
    order = planner.ORDERS.index((3, 1, 0, 2))
    params = np.array([1, order, 1.25, 0.5, 1, -0.1, 1, 1.5, 128], np.float32)
    crop = dataclasses.replace(samples[0].crops[0], params=params)
    assert page.words(crop) == [
        "flipped", "hue turned by -36°", "contrast ×0.50", "brightness ×1.25", "made grey", "blurred by 1.50 px",
        "solarised from 128",
    ]  # fmt: skip
    assert page.words(dataclasses.replace(crop, params=np.array(op.OFF, np.float32))) == []
    assert show.describe(params) == "h-0.10 c0.50 b1.25\nflip grey blur1.5 sol128"
    assert show.describe(np.array(op.OFF, np.float32)) == "\n"


def test_sixteen_bits_are_shown_and_a_file_that_pillow_cannot_show_is_said(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sample,) = show.of_names(index, make_plan(index), DATA, 0, ["class-2/deep.png"])
    assert sample.source is not None
    assert 100 < np.asarray(sample.source).mean() < 150
    unseen = dataclasses.replace(sample, source=None)
    assert "Pillow cannot show this file" in render(index, [unseen])
    monkeypatch.setattr(Image, "open", lambda *_: 1 / 0)
    assert show._source(index, 0) is None


def test_contact_sheet_shows_the_crops(index: Index, tmp_path: Path) -> None:
    samples = show.of_batch(index, make_plan(index), DATA, 0, 1, 2)
    show.contact_sheet([samples[0], dataclasses.replace(samples[1], source=None)], tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(1 << 24) or []}
    assert {(0xE6, 0x19, 0x4B), (0x3C, 0xB4, 0xFF)} <= colours  # frames of both groups
    with pytest.raises(FastrexError, match="cannot write"):
        show.contact_sheet(samples, tmp_path / "no folder" / "sheet.png")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fastrex", "data", "show", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_command_line(
    stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["demo", *SETTINGS, "--data", str(stripes)]
    assert run(monkeypatch, *given, "--rows", "2", "--step", "1", "data.sampling=balanced", "data.repeats=2") == 0
    assert capsys.readouterr().out.strip() == "batch.html"
    html = Path("batch.html").read_text(encoding="utf-8")
    text = " ".join(Page(html).words)
    assert "Step 1 of epoch 0: 2 of 16 places" in text
    assert f"fastrex data show demo {SETTINGS[0]}" in text
    assert "data.repeats=2: an epoch draws 32 of 64 images, 2 views each" in text
    assert run(monkeypatch, *given, "--sample", "3", "--sample", "train/class-1/02.jpg", "--out", "one.PNG") == 0
    assert Path("one.PNG").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    for arguments, code, message in (
        (["--sample", "3", "--step", "1"], 2, "--sample chooses the images; leave out --step and --rows"),
        (["--out", "batch.pdf"], 2, "--out must end in .html or .png, got 'batch.pdf'"),
        (["--step", "4"], 1, "--step must be below the 4 steps of an epoch, got 4"),
        (["--sample", "nothing.jpg"], 1, "--sample must be a row below 80 or a path relative to"),
        (["--out", "no/folder.html"], 1, "cannot write 'no/folder.html'"),
    ):
        assert run(monkeypatch, *given, *arguments) == code
        assert message in capsys.readouterr().err


def test_from_python_without_a_command(stripes: Path, tmp_path: Path) -> None:
    config = c.load("demo", [*SETTINGS, f"data.path={stripes}"])
    standalone.show_batch(config, 0, 0, 1, tmp_path / "page.html")
    assert "<p><code>" not in (tmp_path / "page.html").read_text(encoding="utf-8")
    with pytest.raises(UsageError, match=r"must end in \.html or \.png"):
        standalone.show_batch(config, 0, 0, 1, tmp_path / "page")


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")


@pytest.mark.parametrize("width", [400, 1280])
def test_page_fits_a_browser_window(index: Index, tmp_path: Path, width: int) -> None:
    """In an iframe of ``width`` pixels nothing is wider than the window, and every image is drawn."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser to draw the page with: none of {', '.join(BROWSERS)} is installed")
    names = [index.name(row) for row in range(len(index))]
    html = render(index, show.of_names(index, make_plan(index), DATA, 0, names[:5]))
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    measure = (
        "const d = document.querySelector('iframe').contentDocument; const images = [...d.images];"
        "document.body.append(`width ${d.documentElement.scrollWidth} images ${images.length} drawn "
        "${images.filter(i => i.naturalWidth > 0 && i.getBoundingClientRect().width > 40).length} articles "
        "${new Set([...d.querySelectorAll('article')].map(a => Math.round(a.getBoundingClientRect().width))).size}`)"
    )
    frame = f'<iframe src="page.html" style="width:{width}px;height:900px;border:0" onload="{measure}"></iframe>'
    (tmp_path / "frame.html").write_text(f"<!DOCTYPE html><body>{frame}</body>", encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --allow-file-access-from-files --virtual-time-budget=5000 --dump-dom"
    command = [browser, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"width (\d+) images (\d+) drawn (\d+) articles (\d+)", done.stdout.rpartition("</iframe>")[2])
    assert found, done.stderr[-2000:]
    wide, images, drawn, articles = map(int, found.groups())
    assert width - 20 <= wide <= width  # without a scroll bar or with one
    assert (images, drawn, articles) == (15, 15, 1)
