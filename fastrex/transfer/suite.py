"""The transfer suite: sets in, features, probes, tables out.

Each result is stored as soon as it is there, and so are the features: the same command goes on where it was
interrupted.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .. import distributed, files
from ..data.dataset import Looking, check_same_images
from ..data.index import Index
from ..distributed import World, from_main, main_first, own_cores, text_from_main
from ..errors import FastrexError, explain, one_line
from . import catalog, contents, features, folder, probes, request, results, scores, splits, table
from .agree import agree, numbers_from_main, shortage
from .catalog import MissingSet, Task
from .features import Extracted
from .request import MARKDOWN, PAGE, Request

Say = Callable[[str], None]


def run(
    source: str,
    sets: Sequence[str],
    *,
    root: Path | None,
    out: Path | None,
    probes: Sequence[str],
    protocol: str,
    seeds: Sequence[int],
    shots: Sequence[int],
    size: int | None,
    cache: Path | None,
    keep: bool = True,
    threads: int,
    batch_size: int,
    compare: Sequence[Path],
    device: str,
    say: Say,
) -> int:
    """Evaluate the encoder of ``source`` on ``sets``; see ``fastrex transfer``. Every rank of a torchrun calls this:
    all extract features, the first one probes them.

    Returns:
        0 where every set that is there has its result by every probe, else 1.

    Raises:
        UsageError: words that mean nothing.
        FastrexError: an unusable source, folder or result, or no set that gives one.
    """
    asked = request.check(
        source,
        sets,
        root=root,
        out=out,
        probes=probes,
        protocol=protocol,
        seeds=seeds,
        shots=shots,
        size=size,
        cache=cache,
        keep=keep,
        compare=compare,
    )
    with distributed.world(device) as world:
        world.watch.command, world.watch.way_out = "transfer", "run the same command again: it goes on"
        if distributed.any_true(text_from_main(asked.identity, world) != asked.identity, world):
            raise FastrexError(f"transfer: all ranks must read the same encoder, {source} changed meanwhile; try again")
        suite = _Suite(asked, world, say, threads, batch_size)
        suite.run()
        if world.main and suite.done:
            suite.write()
        state = from_main(0 if not suite.failed else 1, world) if from_main(suite.done, world) else 2
    if state == 2 and world.main:
        reasons = list(dict.fromkeys(suite.reasons))
        said = "" if len(suite.skipped) == 1 else f" and {len(reasons) - 1} more, see above" if len(reasons) > 1 else ""
        raise FastrexError(f"transfer: no set gave a result: {reasons[0]}{said}")
    return min(state, 1)


class _Suite:
    """One rank's work on a request."""

    def __init__(self, asked: Request, world: World, say: Say, threads: int, batch_size: int) -> None:
        self.asked, self.world, self.threads, self.batch_size = asked, world, threads, batch_size
        self.say: Say = say if world.main else _nothing
        self.encoder: nn.Module = asked.encoder.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.result = asked.result
        self.own: list[dict[str, Any]] = []
        self.skipped: list[dict[str, Any]] = []
        self.reasons, self.untold = list[str](), list[str]()
        self.failed = 0

    @property
    def done(self) -> int:
        """How many of the sets asked for have a result."""
        return len({entry["name"] for entry in self.result["sets"]} & {task.name for task in self.asked.tasks})

    def run(self) -> None:
        """All sets, opened before the first one is evaluated."""
        opened = [(task, index) for task in self.asked.tasks if (index := self._opened(task)) is not None]
        for task, index in opened:
            try:
                self._evaluate(task, index)
            except FastrexError as error:
                self._fail(task, error)

    def _fail(self, task: Task, error: FastrexError, shots: int | None = None, wanted: Sequence[str] = ()) -> None:
        """Note what of a set cannot be done: all of it, or some probes with so many shots."""
        reason = str(error).removeprefix("transfer: ").removeprefix(f"{task.name}: ")
        self.failed += 1
        what = [*([f"{shots} shots"] if shots else []), *wanted]
        facts = {"shots": shots, "probes": list(wanted)} if what else {}
        self.skipped.append({"name": task.name, "reason": f"error: {reason}", "get": "", **facts})
        name = "" if reason.startswith(f"{task.name} ") and not what else ", ".join([task.name, *what]) + ": "
        self._told("error: ", f"{name}{reason}")

    def _told(self, kind: str, reason: str, more: str = "") -> None:
        """A lone set's reason is told once, by the error that ends the command."""
        self.reasons.append(f"{reason}{more}")
        line = one_line(f"{kind}{reason}{more}")
        if len(self.asked.tasks) > 1 or self.done:
            self.say(line)
        else:
            self.untold.append(line)

    def _opened(self, task: Task) -> Index | None:
        """The images of a set; None, and said, where it has none to offer."""
        index: Index | None = None
        error: FastrexError | None = None
        stamp = ""
        for turn in (True, False) if self.world.size > 1 else (True,):
            with main_first(self.world):
                if self.world.main == turn:
                    try:
                        progress = Looking(f"{task.name}: looking at")
                        index = catalog.open_task(task, threads=self.threads, progress=progress, stamp=stamp)
                    except FastrexError as problem:
                        error = problem
            # What the first rank has listed the others of its machine need not: the paths of ImageNet-CoG take minutes.
            stamp = text_from_main(index.stamp if index is not None else "", self.world)
        try:
            agree(error, self.world)
            assert index is not None
            check_same_images(index, self.world)
        except MissingSet as missing:
            reason = str(missing).removeprefix("transfer: ").partition("; ")[0]
            self.skipped.append({"name": task.name, "reason": reason, "get": missing.get})
            self._told("skipped: ", reason, f"; {missing.get}" if missing.get else "")
            return None
        except FastrexError as problem:
            self._fail(task, problem)
            return None
        for notice in index.notices:
            self.say(one_line(f"{task.name}: {notice}"))
        if bad := index.bad():
            names = ", ".join(f"{name!r} ({reason})" for name, reason in bad[:5])
            more = ", ..." if len(bad) > 5 else ""
            self.say(one_line(f"{task.name}: {len(bad)} unreadable images are left out: {names}{more}"))
        return index

    def _evaluate(self, task: Task, index: Index) -> None:
        """Features and probes of one set; each result is stored at once."""
        usual = self._usual(task, index)
        wanted = self.asked.probes or (usual, "knn", "ncm")
        left = self._left(task, index, wanted)
        if not left:
            self.say(f"{task.name}: its result is already in {self.asked.out / results.FILE}")
        work = [pair for shots in left for pair in self._possible(task, index, wanted, shots)]
        if not work:
            return
        # Before the images are read: what is changed from here on is noticed next time.
        files = contents.stat(index, _rows(index)).hex()
        train, test = (self._features(task, index, split) for split in ("train", "val"))
        if not self.world.main:
            self._wait()
            return
        data = probes.Features(train.features, train.labels, test.features, test.labels, len(index.classes))
        images = contents.together([bytes.fromhex(part.images) for part in (train, test)])
        entry = self._entry(task, index, data, usual, images, files)
        with self._alone():
            for probe, shots in work:
                if probe in self._before(task.name, shots, images):
                    continue
                try:  # the other ranks wait: no error must leave this block
                    with shortage(task.name):
                        figures = self._probe(task.name, probe, data, shots)
                    self.own.append({**entry, "shots": shots, "headline": probe, "probes": {probe: figures}})
                    self._save()
                except FastrexError as error:
                    self._fail(task, error, shots, [probe])

    def _usual(self, task: Task, index: Index) -> str:
        """The protocol's probe."""
        train = len(index.rows("train", 0.0))
        return results.usual({"name": task.name, "official": task.official is not None, "train": train})

    def _possible(
        self, task: Task, index: Index, wanted: Sequence[str], shots: int | None
    ) -> Iterator[tuple[str, int | None]]:
        """Those probes that the classes have images enough for, known before one of them is decoded."""
        labels, seed = index.labels[index.rows("train", 0.0)], self.asked.seeds[0]
        for chosen in (True, False):  # with a validation split, and without
            group = [probe for probe in wanted if (probe in ("logistic", "sgd")) == chosen]
            try:
                if chosen and group:
                    learn, _ = splits.validation(labels, seed)
                    if shots is not None:
                        splits.few(labels, learn, shots, seed)
                if shots is not None:
                    splits.few(labels, np.arange(len(labels)), shots, seed)
            except FastrexError as error:
                if group:
                    self._fail(task, error, shots, group)
                continue
            yield from ((probe, shots) for probe in group)

    def _left(self, task: Task, index: Index, wanted: Sequence[str]) -> list[int | None]:
        """The shots for which some of the probes ``wanted`` have no result of the images as they are now."""
        left = [None, *self.asked.shots]
        with main_first(self.world):  # images may have to be read
            asked = {(task.name, shots) for shots in left} if self.world.main else set()
            stored = [entry for entry in self.result["sets"] if results.key(entry) in asked]
            if stored:
                images = self._images(stored, index)
                left = [shots for shots in left if not self._before(task.name, shots, images).keys() >= {*wanted}]
                if any(entry.get("images") != images for entry in stored):
                    self.say(f"{task.name}: its images are not those of the stored result, which is replaced")
        # Only the first rank has results; no shots at all travel as 0.
        return [shots or None for shots in numbers_from_main([shots or 0 for shots in left], self.world)]

    def _images(self, stored: Sequence[Mapping[str, Any]], index: Index) -> str:
        """The digest of a set's images: what the file system says of them is that of a stored result, or they are
        read."""
        files = contents.stat(index, _rows(index)).hex()
        for entry in stored:
            if entry["fingerprint"] == index.fingerprint and entry.get("files") == files and entry.get("images"):
                return str(entry["images"])
        if not any(entry["fingerprint"] == index.fingerprint for entry in stored):
            return ""
        threads = self.threads or self.world.threads
        parts = [features.images_of(index, index.rows(split, 0.0), threads) for split in ("train", "val")]
        return contents.together([bytes.fromhex(part) for part in parts])

    def _before(self, name: str, shots: int | None, images: str) -> dict[str, Any]:
        """The figures that there are of these images, by probe."""
        for entry in self.result["sets"]:
            if images and results.key(entry) == (name, shots) and entry.get("images") == images:
                found: dict[str, Any] = entry["probes"]
                return found
        return {}

    def _features(self, task: Task, index: Index, split: str) -> Extracted:
        what = {"train": "training images", "val": "test images"}[split]
        found = features.extract(
            self.encoder,
            self.asked.identity,
            index,
            index.rows(split, 0.0),
            self.asked.transform,
            self.world,
            cache=self.asked.cache,
            batch_size=self.batch_size,
            threads=self.threads,
            note=self._note,
            name=f"{task.name}, {what}",
        )
        if not from_main(len(found.rows), self.world):
            raise FastrexError(f"transfer: {task.name} must have {what} that can be read, all have gone bad; check it")
        return found

    def _note(self, line: str) -> None:
        """From any rank."""
        if self.world.main:
            self.say(one_line(line))
        else:
            print(one_line(f"[rank {self.world.rank}] {line}"), file=sys.stderr, flush=True)

    def _probe(self, name: str, probe: str, data: probes.Features, shots: int | None) -> dict[str, Any]:
        """The figures of one probe over all seeds."""
        start = time.monotonic()
        with features.exact():
            outcomes = probes.run(
                probe,
                data,
                seeds=self.asked.seeds,
                protocol=self.asked.protocol,
                shots=shots,
                device=self.world.device,
                note=lambda line: self.say(one_line(f"{name}: {line}")),
            )
        labels, predictions = data.test_labels.numpy(), [outcome.predictions.numpy() for outcome in outcomes]
        figures = scores.scored(predictions, labels, data.num_classes, name)
        few = "" if shots is None else f", {shots} shots"
        self.say(f"{name}{few}: {probe} {100 * figures['top1']['mean']:.2f}")
        return {
            **figures,
            "chosen": [outcome.chosen for outcome in outcomes],
            "validation": [outcome.validation for outcome in outcomes],
            "facts": [outcome.facts for outcome in outcomes],
            "seconds": round(time.monotonic() - start, 3),
        }

    def _entry(
        self, task: Task, index: Index, data: probes.Features, usual: str, images: str, files: str
    ) -> dict[str, Any]:
        """What is said of a set, whatever its probes find."""
        named = np.bincount(index.labels[index.split == 1], minlength=len(index.classes)) > 0
        there = np.bincount(data.test_labels.numpy(), minlength=len(index.classes)) > 0
        return {
            "name": task.name,
            "title": task.official.title if task.official is not None else task.name,
            "official": task.official is not None,
            "classes": len(index.classes),
            "train": len(data.train_labels),
            "test": len(data.test_labels),
            "notices": list(index.notices),
            "left_out": len(index) - len(data.train_labels) - len(data.test_labels),
            "untested": [index.classes[label] for label in np.flatnonzero(named & ~there)],
            "usual": usual,
            "fingerprint": index.fingerprint,
            "images": images,
            "files": files,
        }

    def _save(self) -> None:
        """With what other processes have written into the same folder meanwhile."""
        out = self.asked.out
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FastrexError(f"transfer: --out {out}: {explain(error)}") from None
        with folder.locked("transfer", out):
            for name in request.FILES:
                files.sweep(out / name)
            found = request.continued(out, self.result)
            found["sets"] = results.merged(found["sets"], self.own)
            found["means"] = results.means(found["sets"])
            asked = {task.name for task in self.asked.tasks}
            found["skipped"] = [*(entry for entry in found["skipped"] if entry["name"] not in asked), *self.skipped]
            results.write(out / results.FILE, found)
            self.result = found

    def write(self) -> None:
        """The tables, in files and for the reader."""
        for line in self.untold:
            self.say(line)
        self._save()
        with folder.locked("transfer", self.asked.out):
            for name, text in (
                (MARKDOWN, table.markdown(self.result, self.asked.others)),
                (PAGE, table.page(self.result, self.asked.others)),
            ):
                try:
                    files.write_text(self.asked.out / name, text)
                except OSError as error:
                    raise FastrexError(f"transfer: --out {self.asked.out}: {explain(error)}") from None
        width = shutil.get_terminal_size((120, 24)).columns
        self.say("\n" + table.plain(self.result, self.asked.others, width))
        self.say(f"transfer: {self.asked.out / PAGE}")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """The first rank's time, which the others wait out however long it takes; on a CPU it has their cores."""
        threads = torch.get_num_threads()
        if self.world.size > 1 and self.world.device.type == "cpu":
            torch.set_num_threads(own_cores(1))
        try:
            with main_first(self.world):
                yield
        finally:
            torch.set_num_threads(threads)

    def _wait(self) -> None:
        with main_first(self.world):
            pass


def _rows(index: Index) -> NDArray[np.int64]:
    """The images that a result is of."""
    return np.concatenate([index.rows(split, 0.0) for split in ("train", "val")])


def _nothing(line: str) -> None:
    """Only the first rank speaks."""
