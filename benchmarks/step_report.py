"""The records of the training step as a table in a terminal and as a chart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .step import Record
from .step_parts import OTHER
from .step_subjects import FASTREX

HEADER = (
    f"{'impl':<15}{'precision':>9}{'images/s':>11}{'p20 to p80':>20}{'ours':>8}{'of L0':>7}{'of L1':>7}{'of L3':>7}"
    f"{'MiB':>9}{'kernels':>9}"
)
COLOURS = ("#4269d0", "#6cc5b0", "#a463f2", "#efb118", "#ff725c", "#9c6b4e", "#ff8ab7", "#97bbf5")
REST = "#b9bcc4"
CROPS, MODEL = "1x224 + 8x96", "resnet50"
# On two threads of a CPU, batches of 8, pooled allocation: the least ratio over each rival.
CPU_BARS = {"eager": 3.0, "eager_cl": 1.3}
# On an H200, batches of 256: images/s by model.bn, and the least ratio over each rival.
GPU_BARS = {"fused": 2800.0, "torch": 2000.0}
GPU_RATIOS = {"eager": 2.0}


def name(record: Record, records: Sequence[Record]) -> str:
    """As in ratios: an implementation that is there under a second allocator has that in its name."""
    first = records[0]["allocator"]
    return str(record["impl"]) if record["allocator"] == first else f"{record['impl']}_{record['allocator']}"


def table(records: Sequence[Record]) -> str:
    """The implementations, what their time goes to, and the bars."""
    first = records[0]
    place = f"{first['threads']} threads, {first['allocator']} allocation" if first["device"] == "cpu" else "cuda"
    ranks = f", {first['ranks']} ranks" if first["ranks"] > 1 else ""
    lines = [
        f"\nstep ({place}{ranks}): {first['model']}, {first['crops']} crops, batches of {first['batch']}, "
        f"{first['objective']}, bn {first['bn']}",
        HEADER,
    ]
    lines += [_row(record, records) for record in records]
    timed = [r for r in records if r["parts_ms"]]
    if timed:
        parts = list(dict.fromkeys(part for r in timed for part in r["parts_ms"]))
        lines.append("\n" + f"{'ms of a step':<15}" + "".join(f"{part:>13}" for part in parts))
        for record in timed:
            cells = "".join(f"{record['parts_ms'].get(part, 0.0):>13.2f}" for part in parts)
            lines.append(f"{name(record, records):<15}{cells}")
    for record in records:
        if record["communication_share"] is not None:
            share = f"{record['communication_share']:.1%} of a step has a collective under way"
            lines.append(f"{name(record, records)}: {share}, waiting for slower ranks included")
    return "\n".join([*lines, *verdicts(records)])


def _row(record: Record, records: Sequence[Record]) -> str:
    label = f"{name(record, records):<15}"
    if record["images_per_s_p50"] is None:
        return f"{label} {record['error']}"
    spread = f"{record['images_per_s_p20']:.2f} to {record['images_per_s_p80']:.2f}"
    ratio = _ratio(record, records)
    shares = record["roofline_share"] or {}
    cells = "".join(f"{shares[level]:>7.0%}" if level in shares else f"{'':>7}" for level in ("L0", "L1", "L3"))
    peak, kernels = (f"{record[key]:.0f}" if record[key] is not None else "" for key in ("peak_mib", "kernels"))
    row = f"{label}{record['precision']:>9}{record['images_per_s_p50']:>11.2f}{spread:>20}{ratio:>8}{cells}"
    # Absent only since: what was measured before that is shown.
    return f"{row}{peak:>9}{kernels:>9}  {record['error'] or ''}".rstrip()


def _ratio(record: Record, records: Sequence[Record]) -> str:
    """How many times as fast ours is."""
    ratios: Record = next((r["ratio"] for r in records if r["ratio"]), {})
    label = name(record, records)
    return f"{ratios[label]:.2f}x" if label in ratios else ""


def verdicts(records: Sequence[Record]) -> list[str]:
    """Whether the bars that apply to what was measured are met."""
    ours = next((r for r in records if r["impl"] == FASTREX), None)
    if ours is None or (ours["crops"], ours["model"], ours["ranks"]) != (CROPS, MODEL, 1):
        return []
    cpu = (ours["device"], ours["threads"], ours["batch"], ours["allocator"]) == ("cpu", 2, 8, "pooled")
    gpu = ours["device"] == "cuda" and ours["batch"] == 256 and "H200" in ours["versions"].get("gpu", "")
    if not cpu and not gpu:
        return []
    if ours["images_per_s_p50"] is None:
        return [f"bars: missed, {ours['error']}"]
    lines = []
    if gpu and ours["bn"] in GPU_BARS:
        bar, speed = GPU_BARS[ours["bn"]], ours["images_per_s_p50"]
        lines.append(_say(f"{bar:.0f} images/s with model.bn={ours['bn']}", speed >= bar, f"{speed:.0f} images/s"))
    for rival, bar in (CPU_BARS if cpu else GPU_RATIOS).items():
        if (reached := (ours["ratio"] or {}).get(rival)) is not None:
            lines.append(_say(f"{bar:.2f}x over {rival}", reached >= bar, f"{reached:.3f}x"))
    return lines


def _say(bar: str, met: bool, reached: str) -> str:
    return f"bar {bar}: {'met' if met else 'missed'}, reached {reached}"


def chart(records: Sequence[Record], target: Path) -> str | None:
    """Write the picture: time per image of each implementation, divided as its parts are. Returns why it could not."""
    try:
        import matplotlib
    except ImportError:
        return "no chart: it needs matplotlib; pip install 'fastrex[plots]'"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in records if r["images_per_s_p50"] is not None]
    if not rows:
        return "no chart: nothing was measured"
    names = list(dict.fromkeys(part for r in rows for part in r["parts_ms"] or {} if part != OTHER))
    colours = {part: COLOURS[place % len(COLOURS)] for place, part in enumerate(names)} | {OTHER: REST}
    figure, axis = plt.subplots(figsize=(9.5, 1.5 + 0.7 * len(rows)), layout="constrained")
    longest = max(1e3 / r["images_per_s_p50"] for r in rows)
    for place, record in enumerate(rows):
        whole, left = 1e3 / record["images_per_s_p50"], 0.0
        parts = record["parts_ms"] or {OTHER: 1.0}
        for part, taken in parts.items():
            width = whole * taken / (sum(parts.values()) or 1.0)
            axis.barh(place, width, left=left, height=0.6, color=colours[part])
            if width > 0.07 * longest and record["parts_ms"]:
                axis.text(left + width / 2, place, f"{part}\n{width:.3g}", ha="center", va="center", fontsize=7)
            left += width
        ratio = _ratio(record, records)
        text = f"  {record['images_per_s_p50']:.4g} images/s{ratio and ', ours ' + ratio}"
        axis.text(whole, place, text, va="center", fontsize=8.5)
    axis.set_yticks(range(len(rows)), [f"{name(r, records)}\n{r['precision']}" for r in rows], fontsize=8.5)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.3 * longest)
    axis.set_xlabel("milliseconds per image, divided as the parts measured one after the other are")
    axis.legend(
        [plt.Rectangle((0, 0), 1, 1, color=colours[part]) for part in (*names, OTHER)], [*names, OTHER],
        ncols=len(names) + 1, loc="upper center", bbox_to_anchor=(0.5, -0.6 / len(rows)), frameon=False, fontsize=7.5,
    )  # fmt: skip
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(left=False)
    first, facts = rows[0], rows[0]["versions"]
    machine = facts.get("gpu") or facts.get("cpu") or first["device"]
    threads = f", {first['threads']} threads" if first["device"] == "cpu" else ""
    figure.suptitle(
        f"{first['model']}, {first['crops']} crops, batches of {first['batch']}, {machine}{threads}", fontsize=9
    )
    figure.savefig(target, dpi=120)
    plt.close(figure)
    return None
