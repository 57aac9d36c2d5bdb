"""Evaluation of a model in training: the objective's own classifier and weighted k-NN, sharded over ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .config import Config
from .data.index import Index
from .data.loader import EvalLoader
from .data.shots import training_rows
from .distributed import World, gather_ragged, sum_
from .neighbours import knn_scores
from .verdict import Stopped

Autocast = Callable[[], AbstractContextManager[Any]]


def evaluate(
    encoder: nn.Module,
    index: Index,
    config: Config,
    world: World,
    autocast: Autocast,
    predict: Callable[[Tensor], Tensor | None] | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, float]:
    """Accuracies on the held-out images with running BatchNorm statistics and one centre crop.

    Args:
        encoder: images [B, 3, S, S] -> features [B, D], in eval mode.
        predict: features [B, D] -> class scores [B, C] or None; the objective's own classifier behind the projector.
        note: is told of files that went bad and were left out (``data.on_bad_sample=replace``).

    Returns:
        ``eval/top1`` (where ``predict`` gives scores), ``eval/knn`` and ``eval/images``; empty when nothing is held
        out.

    Raises:
        Stopped: the ranks were asked to stop, and all of them leave.
    """
    held_out = index.rows("val", config.data.held_out)
    if not len(held_out):
        return {}
    bank_rows = knn_rows(index, training_rows(index, config.data), config.eval.knn_per_class)
    with torch.inference_mode():
        bank, bank_labels, _, _ = _extract(encoder, index, bank_rows, config, world, autocast, None, note)
        bank, bank_labels = gather_ragged(bank, world), gather_ragged(bank_labels, world)
        features, labels, hits, scored = _extract(encoder, index, held_out, config, world, autocast, predict, note)
        votes = knn_scores(
            bank, bank_labels, features, len(index.classes), config.eval.knn_k, config.eval.knn_temperature
        )
        knn_hits = (votes.argmax(1) == labels).sum()
        counts = torch.stack([hits, scored, knn_hits, torch.full_like(hits, len(labels))])
        top1, scored_images, knn, count = sum_(counts, world).tolist()
    own = {"eval/top1": top1 / scored_images} if scored_images else {}
    return {**own, "eval/knn": knn / count, "eval/images": count}


def knn_rows(index: Index, rows: np.ndarray[Any, Any], per_class: int) -> np.ndarray[Any, Any]:
    """At most ``per_class`` rows of each class (0 = all), always the same ones whatever the number of ranks."""
    if not per_class:
        return rows
    order = np.lexsort((index.split_key[rows], index.labels[rows]))
    labels = index.labels[rows][order]
    first = np.searchsorted(labels, labels, side="left")
    return np.sort(rows[order[np.arange(len(labels)) - first < per_class]])


def _extract(
    encoder: nn.Module,
    index: Index,
    rows: np.ndarray[Any, Any],
    config: Config,
    world: World,
    autocast: Autocast,
    predict: Callable[[Tensor], Tensor | None] | None,
    note: Callable[[str], None],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """This rank's share of ``rows``: features [R, D], labels [R], and the numbers of hits and of scored images, 0-d.

    Ranks stop before the collective that follows, or not at all: until then each may leave at a batch of its own.
    """
    watch, seen = world.watch, 0
    mine = rows[world.rank :: world.size]
    features, labels = [], []
    hits = torch.zeros((), dtype=torch.int64, device=world.device)
    scored = torch.zeros_like(hits)
    with EvalLoader(
        index,
        mine,
        config.data,
        batch_size=config.eval.batch_size,
        device=world.device,
        dtype=torch.float32,
        threads=config.data.threads or world.threads,
    ) as loader:
        try:
            for images, target, _ in loader:
                if watch.leaving:
                    raise Stopped
                watch.again()
                seen += 1
                with autocast():
                    out = encoder(images)
                    scores = predict(out) if predict is not None else None
                if scores is not None:
                    hits += (scores.argmax(1) == target).sum()
                    scored += len(target)
                features.append(out.float())
                labels.append(target)
        finally:
            for line in loader.news:
                note(line)
    # Shares differ by an image, so by a batch: progress is counted equally on all ranks.
    for _ in range(seen, -(-len(rows) // (world.size * config.eval.batch_size))):
        watch.again()
    if watch.boundary():
        raise Stopped
    if not features:
        size = int(encoder.num_features)  # type: ignore[arg-type]
        return torch.zeros(0, size, device=world.device), scored.new_zeros(0), hits, scored
    return torch.cat(features), torch.cat(labels), hits, scored
