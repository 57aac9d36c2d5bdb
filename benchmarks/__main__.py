"""``python -m benchmarks kernels``, ``loader`` and ``curve``; in an installation ``fastrex bench`` is the same."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import click

from . import curve as curve_module

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 120}
# Where the files go is no part of how the figures were made.
OUTPUTS = ("json_path", "png_path", "out")


@click.group(context_settings=CONTEXT)
def main() -> None:
    """Benchmarks of fastrex; each writes the JSON that its figures come from.

    \b
    fastrex bench kernels --threads 2 --json kernels.json --png kernels.png
    fastrex bench kernels --op class_means --dtype fp32
    fastrex bench loader --data PATH --threads 2 --json loader.json --png loader.png
    fastrex bench curve RUN --name NAME
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
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: every core.")
@click.option("--seconds", type=click.FloatRange(min=0), default=8.0, show_default=True, help="Per case and dtype.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the records to this file.")
@click.option("--png", "png_path", type=click.Path(path_type=Path), help="Write the chart to this file.")
@click.option("--out", type=click.Path(path_type=Path), help="Write kernels-DEVICE.json and .png to this folder.")
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
@click.option("--data", "data_path", metavar="PATH", required=True, help="Images, as for fastrex train.")
@click.option("--recipe", default="trex", show_default=True, help="Crops and augmentations.")
@click.option("--batch", type=click.IntRange(min=2), default=32, show_default=True, help="Images in a batch.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Cores that each loader may use; default: all.")
@click.option("--seconds", type=click.FloatRange(min=0), default=24.0, show_default=True, help="Per loader.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the records to this file.")
@click.option("--png", "png_path", type=click.Path(path_type=Path), help="Write the chart to this file.")
@click.option("--out", type=click.Path(path_type=Path), help="Write loader-DEVICE.json and .png to this folder.")
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
    from fastrex.errors import FastrexError

    from . import loader as loader_module
    from . import loader_report

    device = _device(device)
    cores = len(os.sched_getaffinity(0))
    if threads is not None and threads > cores:
        raise click.UsageError(f"--threads must be at most the number of cores, {cores}, got {threads}")
    json_path, png_path = _targets(f"loader-{device}", json_path, png_path, out)
    wanted = loader_module.Settings(
        data=data_path, recipe=recipe, words=settings, device=device, threads=threads or cores, batch=batch,
        seconds=seconds, command=_command(context),
    )  # fmt: skip
    try:
        records = loader_module.run(wanted, lambda text: click.echo(text, err=True))
    except FastrexError as error:
        raise click.ClickException(str(error)) from None
    click.echo(loader_report.table(records))
    if png_path is not None:
        why = loader_report.chart(records, png_path)
        click.echo(why or f"chart: {png_path}")
    if json_path is not None:
        loader_module.write_json(json_path, records)
        click.echo(f"records: {json_path}")


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
        value = "PATH" if option.name == "data_path" else context.params[str(option.name)]
        for one in value if isinstance(value, tuple) else (value,):
            words += [str(one)] if isinstance(option, click.Argument) else [option.opts[0], str(one)]
    return shlex.join(words)


@main.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--name", required=True, help="Stem of the files.")
@click.option("--command", default="", help="The command that made the run, to be kept with the figures.")
@click.option("--out", type=click.Path(path_type=Path), default=curve_module.RESULTS, show_default=True)
def curve(run: Path, name: str, command: str, out: Path) -> None:
    """Loss, accuracy and k-NN of RUN over its steps."""
    for path in curve_module.write(run, name, command, out):
        click.echo(str(path))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
