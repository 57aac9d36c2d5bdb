"""The loader's records as a table in a terminal and as a chart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .loader import BAR, GPU_BAR, Record
from .loader_worker import FASTREX

HEADER = f"{'impl':<14}{'images/s':>11}{'p20 to p80':>20}{'ratio':>8}"
STAGE_HEADER = f"{'stage alone':<26}{'images/s':>11}{'share':>8}"
COLOURS = ("#9498a0", "#efb118", "#ff725c", "#4269d0", "#6cc5b0", "#a463f2", "#9c6b4e", "#ff8ab7")


def table(records: Sequence[Record]) -> str:
    """The loaders, their stages, and the bar."""
    first = records[0]
    data = first["data"]
    threads = f", {first['threads']} threads" if first["device"] == "cpu" else ""
    kept = "in memory" if data["in_memory"] else "read from the disk"
    lines = [
        f"\nloader ({first['device']}{threads}), batches of {first['batch']}, {first['crops']} crops",
        f"{data['files']} files of {data['mean_bytes']} bytes and {data['mean_pixels']} pixels on average, {kept}",
        HEADER,
    ]
    for record in (r for r in records if r["stage"] is None):
        if record["error"] is not None:
            lines.append(f"{record['impl']:<14}{record['error']}")
            continue
        spread = f"{record['images_per_s_p20']:.1f} to {record['images_per_s_p80']:.1f}"
        ratio = "" if record["ratio"] is None else f"{record['ratio']:.2f}x"
        lines.append(f"{record['impl']:<14}{record['images_per_s_p50']:>11.1f}{spread:>20}{ratio:>8}".rstrip())
    lines.append(STAGE_HEADER)
    for record in (r for r in records if r["stage"] is not None):
        name = f"{record['impl']} {record['stage']}"
        alone = "" if record["impl"] == FASTREX else "  one process"
        lines.append(f"{name:<26}{record['images_per_s_p50']:>11.1f}{record['share']:>8.1%}{alone}")
    return "\n".join([*lines, *verdicts(records)])


def verdicts(records: Sequence[Record]) -> list[str]:
    """Whether the bars are met, with the paper's crops: a ratio on two threads of a CPU, images/s on a GPU."""
    ours = [r for r in records if r["impl"] == FASTREX and r["stage"] is None and r["crops"] == "1x224 + 8x96"]
    ratios = [r["ratio"] for r in ours if (r["device"], r["threads"]) == ("cpu", 2) and r["ratio"] is not None]
    rates = [r["images_per_s_p50"] for r in ours if r["device"] == "cuda" and r["error"] is None]
    return [
        *(f"bar {BAR:.2f}x: {'met' if x >= BAR else 'missed'}, {x:.3f}x over the fastest rival" for x in ratios),
        *(f"bar {GPU_BAR:.0f} images/s: {'met' if x >= GPU_BAR else 'missed'}, {x:.0f} images/s" for x in rates),
    ]


def chart(records: Sequence[Record], target: Path) -> str | None:
    """Write the picture: time per image of each loader, divided as its stages' times are. Returns why it could not."""
    try:
        import matplotlib
    except ImportError:
        return "no chart: it needs matplotlib; pip install 'fastrex[plots]'"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    wholes = [r for r in records if r["stage"] is None and r["error"] is None]
    shares = {
        r["impl"]: [(s["stage"], s["share"]) for s in records if s["impl"] == r["impl"] and s["stage"]] for r in wholes
    }
    names = list(dict.fromkeys(stage for parts in shares.values() for stage, _ in parts))
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}
    figure, axis = plt.subplots(figsize=(9.5, 1.3 + 0.7 * len(wholes)), layout="constrained")
    longest = max(1e3 / r["images_per_s_p50"] for r in wholes)
    for place, record in enumerate(wholes):
        whole, left = 1e3 / record["images_per_s_p50"], 0.0
        for stage, share in shares[record["impl"]] or [("", 1.0)]:
            axis.barh(place, share * whole, left=left, height=0.6, color=colours.get(stage, "#b9bcc4"))
            if share * whole > 0.06 * longest:
                text = f"{stage}\n{share:.0%}"
                axis.text(left + share * whole / 2, place, text, ha="center", va="center", fontsize=7.5)
            left += share * whole
        ratio = "" if record["ratio"] is None else f", {record['ratio']:.2f}x"
        axis.text(whole, place, f"  {record['images_per_s_p50']:.0f} images/s{ratio}", va="center", fontsize=8.5)
    axis.set_yticks(range(len(wholes)), [r["impl"] for r in wholes])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.3 * longest)
    axis.set_xlabel("milliseconds per image, divided as the stages' times alone are")
    axis.legend(
        [plt.Rectangle((0, 0), 1, 1, color=colours[name]) for name in names], names, ncols=len(names) or 1,
        loc="upper center", bbox_to_anchor=(0.5, -0.45 / len(wholes)), frameon=False, fontsize=7.5,
    )  # fmt: skip
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(left=False)
    first, facts = wholes[0], wholes[0]["versions"]
    machine = facts.get("gpu") or facts.get("cpu") or first["device"]
    threads = f", {first['threads']} threads" if first["device"] == "cpu" else ""
    figure.suptitle(f"{first['crops']} crops per image, {machine}{threads}", fontsize=9)
    figure.savefig(target, dpi=120)
    plt.close(figure)
    return None
