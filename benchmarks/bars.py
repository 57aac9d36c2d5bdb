"""What the kernels are held to: the least ratios and the most memory, by operator, case, dtype and device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .kernels import Group, Record

# The bars of ratios are against the best of these; the chunked loop and other people's kernels stand beside them.
BEST = ("eager", "compile", "linear_cross_entropy", "linear_cross_entropy_chunked")
OURS = {"cpu": "cpp", "cuda": "triton"}

# The transfer probe: times as fast as scikit-learn with Optuna, at most so many points of top-1 from it.
PROBE_RATIO, PROBE_POINTS = 5.0, 0.2


@dataclass(frozen=True)
class Bar:
    """One requirement, judged on what a training step runs.

    Attributes:
        ratio: at least this many times as fast as the fastest of ``rivals``. roofline: least share of the roofline.
        milliseconds: at most. memory_share: of eager's peak, both beyond the gradients. memory_mib: at most, beyond the
            gradients.
        threads: the bar is for this number on a CPU.
    """

    op: str
    case: str
    dtype: str
    device: str = "cpu"
    ratio: float = 0.0
    rivals: tuple[str, ...] = BEST
    roofline: float = 0.0
    milliseconds: float = 0.0
    memory_share: float = 0.0
    memory_mib: float = 0.0
    threads: int = 2


CE, CONTRASTIVE, EAGER = "cosine_cross_entropy", "contrastive_cross_entropy", ("eager",)
F32, BF16 = "fp32", "bf16"
BARS = (
    Bar(CE, "c1000", F32, ratio=1.4),
    Bar(CE, "c1000_frozen", F32, ratio=1.6),
    Bar(CE, "c1000", BF16, ratio=1.8),
    Bar(CE, "c21841", F32, ratio=1.2, memory_share=0.15),
    Bar(CE, "c21841_frozen", F32, ratio=1.9),
    Bar(CE, "c1m", F32, memory_mib=128),
    Bar(CONTRASTIVE, "n4096_m4096", F32, ratio=1.2, rivals=EAGER),
    Bar(CONTRASTIVE, "n4096_m65536", F32, memory_share=0.10),
    Bar("class_means", "trex", F32, ratio=2.0, rivals=EAGER),
    Bar("batch_norm_act", "block of stage 2", F32, ratio=2.0),
    Bar("batch_norm_act", "block of stage 2", BF16, ratio=2.3),
    Bar("sgd_ema_", "resnet50", F32, ratio=1.5),
    Bar(CE, "c1000", BF16, "cuda", ratio=3.0, rivals=EAGER),
    Bar(CE, "c21841", BF16, "cuda", ratio=1.5, rivals=(*BEST, "chunked", "liger", "apple_cce"), memory_share=0.05),
    Bar(CE, "c1m", F32, "cuda", memory_mib=128),
    Bar(CONTRASTIVE, "n4096_m4096", F32, "cuda", ratio=2.0, rivals=EAGER),
    Bar(CONTRASTIVE, "n4096_m4096", BF16, "cuda", ratio=2.0, rivals=EAGER),
    Bar(CONTRASTIVE, "n4096_m65536", F32, "cuda", memory_share=0.10),
    Bar(CONTRASTIVE, "n4096_m65536", BF16, "cuda", memory_share=0.10),
    Bar("class_means", "trex", F32, "cuda", ratio=5.0, rivals=EAGER, milliseconds=0.015),
    Bar("batch_norm_act", "block of stage 2", F32, "cuda", roofline=0.8),
    Bar("batch_norm_act", "block of stage 2", BF16, "cuda", roofline=0.8),
    Bar("sgd_ema_", "resnet50", F32, "cuda", roofline=0.8),
)


def best(records: Sequence[Record], rivals: Sequence[str]) -> Record | None:
    """The fastest of ``rivals`` among the records with a time."""
    found = [r for r in records if r["impl"] in rivals and r["ms_p50"] is not None]
    return min(found, key=lambda r: float(r["ms_p50"]), default=None)


def verdicts(group: Group) -> Iterator[tuple[bool, str]]:
    """Whether each bar of the group is met, and the sentence that says so. Pooled allocation only: under the C
    library's default the ratios measure its page faults."""
    if group.allocator == "default" or not group.records:
        return
    for bar in BARS:
        threads = group.device != "cpu" or bar.threads == group.threads
        same = (bar.op, bar.case, bar.dtype, bar.device) == (group.op, group.case, group.dtype, group.device)
        if same and threads:
            yield from _judge(bar, group)


def _judge(bar: Bar, group: Group) -> Iterator[tuple[bool, str]]:
    direction = "fwd_bwd" if "fwd_bwd" in group.directions() else "fwd"
    records = group.of(direction)
    ours = group.find(OURS[group.device], direction)
    if ours is None:
        return
    if ours["ms_p50"] is None:
        yield False, f"bars of {bar.op} {bar.case} {bar.dtype}: missed, there is no correct {ours['impl']}"
        return
    if bar.ratio:
        rival = best(records, bar.rivals)
        if rival is not None:
            reached = rival["ms_p50"] / ours["ms_p50"]
            yield _say(f"bar {bar.ratio:.2f}x", reached >= bar.ratio, f"{reached:.3f}x over {rival['impl']}")
    if bar.roofline:
        share = ours["roofline_share"]
        yield _say(f"bar {bar.roofline:.0%} of the roofline", share >= bar.roofline, f"{share:.0%}")
    if bar.milliseconds:
        taken = ours["ms_p50"]
        yield _say(f"bar {bar.milliseconds * 1e3:.0f} us", taken <= bar.milliseconds, f"{taken * 1e3:.1f} us")
    extra = None if ours["peak_extra_mib"] is None else max(ours["peak_extra_mib"] - group.gradient_mib, 0.0)
    if bar.memory_mib and extra is not None:
        words = f"bar {bar.memory_mib:.0f} MiB beyond the gradients"
        yield _say(words, extra <= bar.memory_mib, f"{extra:.0f} MiB")
    eager = group.find("eager", direction)
    if bar.memory_share and extra is not None and eager is not None and eager["peak_extra_mib"]:
        share = extra / max(eager["peak_extra_mib"] - group.gradient_mib, 1e-9)
        words = f"bar {bar.memory_share:.0%} of eager's memory beyond the gradients"
        yield _say(words, share <= bar.memory_share, f"{share:.1%}")


def _say(bar: str, met: bool, reached: str) -> tuple[bool, str]:
    return met, f"{bar}: {'met' if met else 'missed'}, {reached}"
