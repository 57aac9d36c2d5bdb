"""The records as a table in a terminal and as a chart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import bars, measure
from .kernels import Group, Record
from .worker import OURS

HEADER = f"{'impl':<30}{'p50 ms':>11}{'p20 to p80':>22}{'ratio':>8}{'roofline':>10}{'MiB':>10}{'error/budget':>14}"


def table(group: Group) -> str:
    """One block per direction: a row per implementation, its time against the fastest rival's, and the bars."""
    settings = f"cpu, {group.threads} threads, {_allocator(group)}" if group.device == "cpu" else group.device
    lines = []
    for direction in group.directions():
        records = group.of(direction)
        rival = _best_rival(records)
        lines += [f"\n{group.op} {group.case} {direction} {group.dtype} ({settings})", HEADER]
        lines += [_row(record, rival) for record in sorted(records, key=_place)]
    lines += [text for _, text in bars.verdicts(group)]
    return "\n".join(lines)


def _allocator(group: Group) -> str:
    facts = group.records[0]["versions"]
    known = str(facts.get("allocator", group.allocator))
    return {"default": "the C library's default allocation", "pooled": "pooled allocation"}.get(known, known)


def _best_rival(records: Sequence[Record]) -> Record | None:
    return bars.best(records, [r["impl"] for r in records if r["impl"] not in OURS])


def _place(record: Record) -> tuple[bool, float]:
    return record["ms_p50"] is None, record["ms_p50"] or 0.0


def _row(record: Record, rival: Record | None) -> str:
    name = record["impl"]
    if isinstance(record["error"], str):
        return f"{name:<30} {record['error']}"
    judged = f"{record['error']:.1e}/{record['error_budget']:.1e}"
    if record["ms_p50"] is None:
        return f"{name:<30} no time: its error is beyond its budget, {judged}"
    ratio = "" if rival is None else f"{rival['ms_p50'] / record['ms_p50']:.2f}x"
    spread = f"{record['ms_p20']:.3f} to {record['ms_p80']:.3f}"
    extra = "" if record["peak_extra_mib"] is None else f"{record['peak_extra_mib']:.1f}"
    share = f"{record['roofline_share']:.0%}" if record["roofline_share"] >= 0.01 else "<1%"
    return f"{name:<30}{record['ms_p50']:>11.3f}{spread:>22}{ratio:>8}{share:>10}{extra:>10}  {judged:>17}".rstrip()


def summary(groups: Sequence[Group]) -> str:
    """How many bars are met, and the missed ones again."""
    judged = [(met, f"{g.op} {g.case} {g.dtype}: {text}") for g in groups for met, text in bars.verdicts(g)]
    if not judged:
        return "no bar applies to what was measured"
    missed = [text for met, text in judged if not met]
    return "\n".join([f"bars: {len(judged) - len(missed)} of {len(judged)} met", *missed])


def chart(groups: Sequence[Group], target: Path) -> str | None:
    """Write the picture: per case the speed of each implementation over the fastest rival's. Returns why it could not.

    Only what a training step runs, and only pooled allocation.
    """
    try:
        import matplotlib
    except ImportError:
        return "no chart: it needs matplotlib; pip install 'fastrex[plots]'"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown: list[tuple[str, list[tuple[Record, float]]]] = []
    for group in (g for g in groups if g.allocator != "default"):
        direction = measure.main_direction(group.directions())
        records = [r for r in group.of(direction) if r["ms_p50"] is not None]
        rival = _best_rival(records)
        if rival is not None:
            title = f"{group.op} {group.case} {direction} {group.dtype}"
            rows = [(r, rival["ms_p50"] / r["ms_p50"]) for r in sorted(records, key=_place)]
            shown.append((f"{title}, fastest rival {rival['ms_p50']:.3g} ms", rows))
    if not shown:
        return "no chart: nothing was measured beside a rival"
    # Two columns where one would be taller than a screen.
    columns = [shown] if len(shown) <= 6 else [shown[: -(-len(shown) // 2)], shown[-(-len(shown) // 2) :]]
    height = max(sum(len(rows) + 1.6 for _, rows in column) for column in columns)
    size = (9.5 * len(columns), 0.24 * height + 1.1)
    figure, axes = plt.subplots(1, len(columns), figsize=size, layout="constrained", squeeze=False)
    longest = max(ratio for _, rows in shown for _, ratio in rows)
    for axis, column in zip(axes[0], columns, strict=True):
        _draw(axis, column, height)
        axis.set_xlim(0, 1.12 * longest)
    first = groups[0]
    facts = first.records[0]["versions"]
    machine = facts.get("gpu") or facts.get("cpu") or first.device
    threads = f", {first.threads} threads" if first.device == "cpu" else ""
    figure.suptitle(f"{machine}{threads}, torch {facts.get('torch', '')}", fontsize=9)
    figure.savefig(target, dpi=120)
    plt.close(figure)
    return None


def _draw(axis: Any, column: Sequence[tuple[str, list[tuple[Record, float]]]], height: float) -> None:
    """The cases of one column, from top to bottom."""
    place, ticks, labels = 0.0, [], []
    for title, rows in column:
        axis.text(0, place - 0.15, title, fontsize=8.5, fontweight="bold", va="center")
        for record, ratio in rows:
            place += 1
            ours = record["impl"] in OURS
            axis.barh(place, ratio, height=0.78, color="#4269d0" if ours else "#b9bcc4")
            axis.text(ratio, place, f" {ratio:.2f}x", va="center", fontsize=7.5)
            ticks.append(place)
            labels.append(f"fastrex {record['impl']}" if ours else record["impl"])
        place += 1.6
    axis.axvline(1, color="#333333", linewidth=0.8, linestyle=":", zorder=0)
    axis.set_yticks(ticks, labels, fontsize=7.5)
    axis.set_ylim(height - 0.8, -0.9)
    axis.set_xlabel("speed over the fastest rival (1 = as fast)")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(left=False)
