"""``python -m benchmarks kernels``, ``loader``, ``step`` and more; in an installation ``fastrex bench`` is the same."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

from fastrex.cli_options import PLACE, SOURCE

from . import curve as curve_module
from . import files
from .family import command as family_command
from .gpu_jobs import PARTS
from .gpu_jobs import Settings as GpuSettings
from .probe import command as probe_command
from .tradeoff import command as tradeoff_command

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 120}
# Where the files go is no part of how the figures were made.
OUTPUTS = ("json_path", "png_path", "out")


DEVICE = click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
THREADS = click.option("--threads", type=click.IntRange(min=1), help="CPU cores of all together; default: all.")
BATCH = click.option("--batch", type=click.IntRange(min=2), help="Images in a step; default: 8, on a GPU 256.")
JSON = click.option("--json", "json_path", type=PLACE, help="Write the records to this file.")
PNG = click.option("--png", "png_path", type=PLACE, help="Write the chart to this file.")


@click.group(context_settings=CONTEXT)
def main() -> None:
    """Benchmarks of fastrex; each writes the JSON that its figures come from.

    \b
    fastrex bench kernels --threads 2 --json kernels.json --png kernels.png
    fastrex bench kernels --op class_means --dtype fp32
    fastrex bench loader --data PATH --threads 2 --json loader.json --png loader.png
    fastrex bench step --threads 2 --json step.json --png step.png
    fastrex bench run --data PATH --json run.json
    fastrex bench probe --set pets --json probe.json
    fastrex bench tradeoff --data ARCHIVES --out WORK
    fastrex bench family --data ARCHIVES --out WORK
    fastrex bench curve RUN --name NAME
    fastrex bench gpu --out DIR
    python -m benchmarks reliability FILE
    """


@main.command()
@click.option("--op", multiple=True, metavar="NAME", help="Only this operator (repeatable).")
@click.option("--case", multiple=True, metavar="NAME", help="Only this case, also one of the small ones of the tests.")
@click.option(
    "--dtype", multiple=True, type=click.Choice(["fp32", "bf16", "fp16"]), default=("fp32", "bf16"),
    show_default=True, help="Dtype of the inputs (repeatable).",
)  # fmt: skip
@click.option("--impl", multiple=True, metavar="NAME", help="Only this implementation or rival; 'reference' if named.")
@click.option("--direction", multiple=True, type=click.Choice(["fwd", "bwd", "fwd_bwd"]), help="Default: all.")
@click.option(
    "--allocator", type=click.Choice(["pooled", "default", "both"]), default="both", show_default=True,
    help="CPU memory: pooled as fastrex sets it, or the C library's default; both: the latter for one direction.",
)  # fmt: skip
@DEVICE
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: every core.")
@click.option("--seconds", type=click.FloatRange(min=0), default=8.0, show_default=True, help="Per case and dtype.")
@JSON
@PNG
@click.option("--out", type=PLACE, help="Write kernels-DEVICE.json and .png to this folder.")
@click.option("--ops", default="fastrex_kernels", hidden=True, help="Module whose OPS are measured.")
@click.pass_context
def kernels(
    context: click.Context,
    op: tuple[str, ...],
    case: tuple[str, ...],
    dtype: tuple[str, ...],
    impl: tuple[str, ...],
    direction: tuple[str, ...],
    allocator: str,
    device: str,
    threads: int | None,
    seconds: float,
    json_path: Path | None,
    png_path: Path | None,
    out: Path | None,
    ops: str,
) -> None:
    """Every operator beside its rivals: time, peak memory, share of the roofline, error.

    All implementations of a case run in one process and take turns; one whose error is more than twice eager PyTorch's
    gets no time. The ratio is the fastest rival's median time over the row's. Compare fwd_bwd: what computes the
    gradients in the forward has a short bwd. Peak memory (MiB, gradients included) is measured in a process of its own
    under the C library's default allocation.

    \b
    fastrex bench kernels --op cosine_cross_entropy --case c1000 --direction fwd_bwd
    """
    from . import kernels as kernels_module
    from . import report

    device = _device(device)
    settings = kernels_module.Settings(
        ops=ops, op=op, case=case, dtype=dtype, impl=impl, direction=direction, device=device,
        allocator=kernels_module.ALLOCATORS if allocator == "both" else (allocator,),
        threads=threads or len(os.sched_getaffinity(0)), seconds=seconds, command=_command(context),
    )  # fmt: skip
    json_path, png_path = _targets(f"kernels-{device}", json_path, png_path, out)
    try:
        kernels_module.discover(settings)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    groups = []
    for group in kernels_module.run(settings, lambda text: click.echo(f"measuring {text}", err=True)):
        groups.append(group)
        click.echo(report.table(group))
        if json_path is not None:  # after every case: hours of measuring are not lost with the last one
            kernels_module.write_json(json_path, groups)
    click.echo(f"\n{report.summary(groups)}")
    if png_path is not None:
        why = report.chart(groups, png_path)
        click.echo(why or f"chart: {png_path}")
    if json_path is not None:
        click.echo(f"records: {json_path}")


@main.command()
@click.argument("settings", nargs=-1, metavar="[section.key=value ...]")
@click.option("--data", "data_path", type=SOURCE, metavar="PATH", required=True, help="Images, as for fastrex train.")
@click.option("--recipe", default="trex", show_default=True, help="Crops and augmentations.")
@click.option("--batch", type=click.IntRange(min=2), default=32, show_default=True, help="Images in a batch.")
@DEVICE
@click.option("--threads", type=click.IntRange(min=1), help="Cores that each loader may use; default: all.")
@click.option("--seconds", type=click.FloatRange(min=0), default=24.0, show_default=True, help="Per loader.")
@JSON
@PNG
@click.option("--out", type=PLACE, help="Write loader-DEVICE.json and .png to this folder.")
@click.pass_context
def loader(
    context: click.Context,
    settings: tuple[str, ...],
    data_path: str,
    recipe: str,
    batch: int,
    device: str,
    threads: int | None,
    seconds: float,
    json_path: Path | None,
    png_path: Path | None,
    out: Path | None,
) -> None:
    """Images per second of the training loader beside torch's DataLoader with Pillow or torchvision.

    Decoding, all crops of the recipe and all its augmentations. Each loader runs in a process of its own on the same
    cores; they take turns in rounds of a few seconds, and the one whose turn it is not is stopped. Before, their
    batches are compared. Then every stage alone.

    \b
    fastrex bench loader --data /data/imagenet/train --threads 2 --json loader.json
    fastrex bench loader --data PATH data.local_crops=2 data.prefetch=4
    """
    from . import loader as loader_module
    from . import loader_report

    device = _device(device)
    wanted = loader_module.Settings(
        data=data_path, recipe=recipe, words=settings, device=device, threads=_threads(threads), batch=batch,
        seconds=seconds, command=_command(context),
    )  # fmt: skip
    json_path, png_path = _targets(f"loader-{device}", json_path, png_path, out)
    with _one_line():
        records = loader_module.run(wanted, _say)
    click.echo(loader_report.table(records))
    if png_path is not None:
        why = loader_report.chart(records, png_path)
        click.echo(why or f"chart: {png_path}")
    if json_path is not None:
        files.write_json(json_path, records)
        click.echo(f"records: {json_path}")


@main.command()
@click.argument("settings", nargs=-1, metavar="[section.key=value ...]")
@click.option("--recipe", default="trex", show_default=True, help="Model, crops and objective.")
@BATCH
@click.option("--classes", type=click.IntRange(min=2), default=1000, show_default=True)
@click.option(
    "--impl", multiple=True, type=click.Choice(["fastrex", "eager", "eager_cl"]), help="Repeatable; default: all."
)
@click.option(
    "--allocator", type=click.Choice(["pooled", "default", "both"]), default="both", show_default=True,
    help="CPU memory: pooled for all as fastrex sets it, or the C library's default; both: and eager as shipped.",
)  # fmt: skip
@DEVICE
@THREADS
@click.option("--seconds", type=click.FloatRange(min=0), default=30.0, show_default=True, help="Per implementation.")
@click.option("--ranks", type=click.IntRange(min=1), default=1, show_default=True, help="Processes of each.")
@click.option("--find-batch", is_flag=True, help="Instead: the largest batch whose step fits into memory.")
@click.option("--limit-mib", type=click.FloatRange(min=0), default=0.0, help="Of --find-batch; default: what is free.")
@JSON
@PNG
@click.option("--out", type=PLACE, help="Write step-DEVICE.json and .png to this folder.")
@click.pass_context
def step(
    context: click.Context,
    settings: tuple[str, ...],
    recipe: str,
    batch: int | None,
    classes: int,
    impl: tuple[str, ...],
    allocator: str,
    device: str,
    threads: int | None,
    seconds: float,
    ranks: int,
    find_batch: bool,
    limit_mib: float,
    json_path: Path | None,
    png_path: Path | None,
    out: Path | None,
) -> None:
    """Images per second of the whole training step beside the step that researchers write in PyTorch.

    On crops that are there already. Each implementation runs in a process of its own; they take turns in rounds of a
    few seconds, and the one whose turn it is not is stopped. Before, the losses of their first steps from the same
    weights are compared. After, on its own, what the time of a step goes to. images/s are those of all ranks.

    \b
    fastrex bench step --threads 2 --allocator pooled --json step.json
    fastrex bench step --device cuda --batch 256 model.bn=torch
    fastrex bench step --find-batch --limit-mib 81920
    """
    from . import step as step_module
    from . import step_batch, step_report
    from .step_subjects import IMPLS

    device = _device(device)
    wanted = step_module.Settings(
        recipe=recipe, words=settings, device=device, threads=_threads(threads), ranks=ranks,
        batch=_batch(batch, device), classes=classes, impl=impl or IMPLS, allocator=allocator,
        seconds=seconds, limit_mib=limit_mib, command=_command(context),
    )  # fmt: skip
    stem = f"step-batch-{device}" if find_batch else f"step-{device}"
    json_path, png_path = _targets(stem, json_path, png_path, out)

    def keep(records: list[step_module.Record]) -> None:
        if json_path is not None:  # after every round: what is there is not lost with what fails
            files.write_json(json_path, records)

    with _one_line():
        if find_batch:
            records = step_batch.run(wanted, _say)
            click.echo(step_batch.table(records))
        else:
            records = step_module.run(wanted, _say, keep)
            click.echo(step_report.table(records))
    keep(records)
    if png_path is not None and not find_batch:
        why = step_report.chart(records, png_path)
        click.echo(why or f"chart: {png_path}")
    if json_path is not None:
        click.echo(f"records: {json_path}")


@main.command("run")
@click.argument("settings", nargs=-1, metavar="[section.key=value ...]")
@click.option("--data", "data_path", type=SOURCE, metavar="PATH", required=True, help="Images, as for fastrex train.")
@click.option("--recipe", default="trex", show_default=True)
@BATCH
@DEVICE
@THREADS
@click.option("--seconds", type=click.FloatRange(min=0), default=60.0, show_default=True, help="Of all phases.")
@JSON
@click.option("--out", type=PLACE, help="Write run-DEVICE.json to this folder.")
@click.pass_context
def run_command(
    context: click.Context,
    settings: tuple[str, ...],
    data_path: str,
    recipe: str,
    batch: int | None,
    device: str,
    threads: int | None,
    seconds: float,
    json_path: Path | None,
    out: Path | None,
) -> None:
    """Images per second of a training run, loader and step together, beside those of its step on a batch that stays.

    Both in phases that take turns, and the share of the time that the run waits for data.

    \b
    fastrex bench run --data /data/imagenet/train --device cuda --json run.json
    """
    from . import run as run_module

    device = _device(device)
    json_path, _ = _targets(f"run-{device}", json_path, None, out)
    wanted = run_module.Settings(
        data=data_path, recipe=recipe, words=settings, device=device, threads=_threads(threads),
        batch=_batch(batch, device), seconds=seconds, command=_command(context),
    )  # fmt: skip
    with _one_line():
        records = run_module.run(wanted, _say)
    click.echo(run_module.table(records))
    if json_path is not None:
        files.write_json(json_path, records)
        click.echo(f"records: {json_path}")


def _say(text: str) -> None:
    click.echo(text, err=True)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """What users can put right is one line for them."""
    from fastrex.errors import FastrexError

    try:
        yield
    except FastrexError as error:
        raise click.ClickException(str(error)) from None


def _batch(batch: int | None, device: str) -> int:
    return batch or (256 if device == "cuda" else 8)


def _threads(threads: int | None) -> int:
    cores = len(os.sched_getaffinity(0))
    if threads is not None and threads > cores:
        raise click.UsageError(f"--threads must be at most the number of cores, {cores}, got {threads}")
    return threads or cores


def _device(device: str) -> str:
    """``auto`` takes a GPU where there is one."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda needs a GPU that torch can use; torch.cuda.is_available() is False")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def _targets(
    stem: str, json_path: Path | None, png_path: Path | None, out: Path | None
) -> tuple[Path | None, Path | None]:
    """Where the records and the chart go; their folders are made."""
    if out is not None:
        json_path, png_path = json_path or out / f"{stem}.json", png_path or out / f"{stem}.png"
    for path in (json_path, png_path):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    return json_path, png_path


def _command(context: click.Context) -> str:
    """The words that repeat this run, with PATH for the folder of the images."""
    words = ["fastrex", "bench", str(context.info_name)]
    for option in context.command.params:
        source = context.get_parameter_source(str(option.name))
        if source is not click.core.ParameterSource.COMMANDLINE or option.name in OUTPUTS:
            continue
        value = "PATH" if option.name in ("data_path", "features") else context.params[str(option.name)]
        for one in value if isinstance(value, tuple) else (value,):
            words += [str(one)] if isinstance(option, click.Argument) else [option.opts[0], str(one)]
    return shlex.join(words)


@main.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=PLACE)
@click.option("--name", required=True, help="Stem of the files.")
@click.option("--command", default="", help="The command that made the run, to be kept with the figures.")
@click.option("--out", type=PLACE, default=curve_module.RESULTS, show_default=True)
def curve(runs: tuple[Path, ...], name: str, command: str, out: Path) -> None:
    """Loss, accuracy and k-NN of each RUN over its steps, in one picture."""
    for path in curve_module.write(runs, name, command, out):
        click.echo(str(path))


@main.command()
@click.argument("raw", metavar="FILE", type=PLACE)
@click.option("--out", type=PLACE, default=curve_module.RESULTS, show_default=True)
@click.option("--document", type=PLACE, default=Path("RELIABILITY.md"), show_default=True)
@click.option("--command", default="make test-faults", show_default=True, help="What made FILE.")
def reliability(raw: Path, out: Path, document: Path, command: str) -> None:
    """What the fault tests wrote to FILE (pytest --report FILE), as reliability.json and a table in a document.

    Exit code 1: a fault was not survived, or a test of the plan did not run.
    """
    from . import reliability as reliability_module

    with _one_line():
        content = reliability_module.write(raw, out, document, command)
    totals = content["totals"]
    click.echo(
        f"{totals['injected']} faults injected, {totals['survived']} survived, {totals['bits_equal']} of "
        f"{totals['compared']} comparisons equal to the bit: {out / 'reliability.json'}, {document}"
    )
    if odd := reliability_module.verdict(content):
        raise click.ClickException(odd)


@main.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of all files.")
@click.option("--minutes", type=click.FloatRange(min=0.25), default=9.0, show_default=True, help="For everything.")
@click.option(
    "--data", "data_path", type=SOURCE, metavar="PATH", help="Images, as for fastrex train; default: some are made."
)
@click.option("--batch", type=click.IntRange(min=2), help="Images in a step; default: 256 where they fit.")
@click.option("--part", multiple=True, type=click.Choice(PARTS), help="Only this part (repeatable).")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", hidden=True)
@click.option("--tests", multiple=True, hidden=True, help="A word for pytest instead of the GPU tests.")
@click.option("--kernels", "words", multiple=True, hidden=True, help="A word for kernels instead of all cases.")
@click.pass_context
def gpu(
    context: click.Context,
    out: Path,
    minutes: float,
    data_path: str | None,
    batch: int | None,
    part: tuple[str, ...],
    device: str,
    tests: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    """On one GPU: the GPU tests, then kernels, loader, step and run, each within its share of --minutes.

    Writes JSON, a log for each process and one table, gpu.md. A part that cannot run here is absent with its reason,
    one whose time is over keeps what it has, one that crashes stops no other. Exit code 0: everything that could run
    ran, and no test failed.

    \b
    python -m benchmarks gpu --out gpu-results
    python -m benchmarks gpu --out gpu-results --data /data/imagenet --part loader --part run
    """
    from . import gpu as gpu_module

    if data_path is not None and Path(data_path).exists():
        data_path = str(Path(data_path).resolve())
    with tempfile.TemporaryDirectory(prefix="fastrex-gpu-") as work:
        settings = GpuSettings(
            out=out.resolve(), work=Path(work), minutes=minutes, data=data_path, device=device, batch=batch, only=part,
            tests=tests, kernels=words,
        )  # fmt: skip
        code = gpu_module.run(settings, _command(context), lambda text: click.echo(text))
    sys.exit(code)


main.add_command(probe_command, "probe")
main.add_command(tradeoff_command, "tradeoff")
main.add_command(family_command, "family")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
