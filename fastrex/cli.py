"""The command ``fastrex``. Every error is one line with the way out; ``--debug`` shows the traceback.

Exit codes: 0 done, 1 error, 2 usage, 3 diverged, 75 preempted, 130 aborted (torchrun turns every one but 0 into 1: read
status.json).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import click

from . import config as config_module
from . import settings as settings_module
from . import streams
from .cli_data import data
from .cli_options import DATA, DEVICE, PLACE, SETTINGS, SOURCE, located, split, writable, write_json
from .cli_transfer import analyze, report, transfer
from .config import Config
from .errors import DivergedError, FastrexError, UsageError, explain, one_line

CODES = ((UsageError, 2), (DivergedError, 3))
ABORTED = 130
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 120}
# A group without a command: an error from click 8.2 on.
NoArguments: Any = getattr(click.exceptions, "NoArgsIsHelpError", ())
# What a launcher counts when it starts a job again.
RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


def main() -> None:
    """Entry point of the console script, of ``python -m fastrex`` and of ``torchrun -m fastrex``."""
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    streams.tolerate()
    text = ""
    try:
        code = _invoke(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        code, text = ABORTED, "fastrex: aborted"
    except BrokenPipeError:
        if debug:
            raise
        code = 1  # Who read the output has gone: there is nobody to tell.
    except click.ClickException as error:
        path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "fastrex"
        see = f" (see '{path} --help')" if isinstance(error, click.UsageError) else ""
        code, text = error.exit_code, f"fastrex: error: {one_line(error.format_message())}{see}"
    except Exception as error:
        if debug:
            raise
        rank = os.environ.get("RANK", "0")
        where = f" [rank {rank}]" if _several() else ""
        text = f"fastrex: error{where}: {one_line(_words(error))}"
        code = next((number for kind, number in CODES if isinstance(error, kind)), 1)
    if text:
        with contextlib.suppress(OSError, ValueError):
            click.echo(text, err=True)
    _leave(code)


def _invoke(arguments: list[str]) -> int:
    """Run the command. Not by click's own ``main``, which ends silently on every EOFError and broken pipe, be it of a
    data set or of another rank."""
    if "_FASTREX_COMPLETE" in os.environ:
        cli(prog_name="fastrex")  # The shell asks for completions.
    try:
        with cli.make_context("fastrex", list(arguments)) as context:
            code = cli.invoke(context)
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except NoArguments as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.exceptions.Abort:
        raise KeyboardInterrupt from None
    return code if isinstance(code, int) else 0


def _words(error: Exception) -> str:
    """The error as one line."""
    if isinstance(error, FastrexError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return explain(error)
    first = (str(error).strip().splitlines() or ["no message"])[0]
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in first:
        return f"out of memory ({first}); lower optim.batch_size or data.threads, or set optim.accumulate higher"
    return f"{type(error).__name__}: {first} (--debug shows the traceback)"


def _several() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _leave(code: int) -> NoReturn:
    """End the process; one of several ranks without the interpreter's teardown.

    After an error that would wait for ranks that are gone. After a success a thread of gloo may still be about to free
    a tensor: it asks the interpreter that is going down for its lock, and the process aborts, its work done.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            streams.drop(stream)
    if _several():
        os._exit(code)
    sys.exit(code)


def restarted() -> bool:
    """Whether a launcher has started this job before: it repeats its command, which then has to continue."""
    return any(os.environ.get(name, "0").strip() not in ("", "0") for name in RESTARTS)


@click.group(context_settings=CONTEXT)
@click.version_option(package_name="fastrex")
def cli() -> None:
    """Train transferable supervised image encoders with the t-ReX method. Add --debug to any command for tracebacks."""


@cli.command()
@SETTINGS
@DATA
@click.option("--out", type=PLACE, help="Run directory; default runs/<recipe>-<UTC time>.")
@click.option("--resume", type=click.Choice(["never", "auto", "must"]), default="never", show_default=True)
@click.option(
    "--init-from",
    type=SOURCE,
    metavar="SOURCE",
    help="Start a new run from an encoder: a run, a safetensors file, a .pth.",
)
@click.option("--max-steps", type=click.IntRange(min=1), help="Stop early; the schedule keeps its length.")
@click.option("--arch", metavar="NAME", help="resnet18|34|50|101 or timm:NAME; sets model.arch.")
@click.option("--precision", type=click.Choice(["auto", "bf16", "fp16", "fp32"]), help="Sets optim.precision.")
@DEVICE
@click.option(
    "--allow-world-size-change",
    is_flag=True,
    help="Continue on another number of ranks: the same batches, not the same bits.",
)
@click.option(
    "--dry-run", is_flag=True, help="Check settings, images, model, memory and disk; exit 0 if training would start."
)
def train(
    settings: tuple[str, ...],
    data_path: str | None,
    out: Path | None,
    resume: str,
    init_from: str | None,
    max_steps: int | None,
    arch: str | None,
    precision: str | None,
    device: str,
    allow_world_size_change: bool,
    dry_run: bool,
) -> int:
    """Train a recipe (demo when none is named) on a folder of images, to an exported encoder.

    \b
    fastrex train                                     the embedded demo
    fastrex train trex --data /data/imagenet          the paper's recipe
    fastrex train trex_star --data PATH optim.batch_size=512 run.seed=1
    fastrex train --out RUN --resume must             continue RUN exactly
    fastrex train trex --data PATH --dry-run          look for what is in the way first
    torchrun --nproc-per-node=8 -m fastrex train trex --data PATH
    """
    from . import rundir, trainer

    recipe, words = split(settings)
    words = [*words, *located(data_path)]
    words += [f"model.arch={json.dumps(arch)}"] if arch else []
    words += [f"optim.precision={precision}"] if precision else []
    if resume == "never" and restarted():
        if out is None:
            raise FastrexError(
                "train: a restarted job needs the run directory to continue; pass --out RUN to its command"
            )
        resume = "auto"
    config = _config(recipe, words, out if resume != "never" else None, rundir.CONFIG)
    options: dict[str, Any] = {"init_from": init_from, "max_steps": max_steps, "device": device}
    options |= {"out": out, "resume": resume, "allow_world_size_change": allow_world_size_change}
    if dry_run:
        return _dry_run(config, options)
    result = trainer.train(config, **options)
    return rundir.EXIT_CODES[result.state]


def _dry_run(config: Config | None, options: Mapping[str, Any]) -> int:
    from . import dryrun

    found = dryrun.dry_run(config, **options)
    errors = sum(finding.level == "error" for _, finding in found)
    if int(os.environ.get("RANK", "0")) == 0:
        for rank, finding in found:
            where = f"[rank {rank}] " if rank else ""
            click.echo(f"{finding.level}: {where}{one_line(finding.text)}")
        click.echo(f"would not start: {errors} error{'s' * (errors > 1)}" if errors else "would start")
    return int(errors > 0)


def _config(recipe: str | None, words: list[str], run: Path | None, name: str) -> Config | None:
    """The configuration asked for. Without a recipe a resumed run's own is the base; None when it is not touched at
    all."""
    stored = run / name if run is not None else None
    if recipe is None and stored is not None and stored.is_file():
        if not words:
            return None
        return config_module.override(config_module.read(stored), words)
    return config_module.load(recipe, words)


@cli.command("eval")
@click.argument("source", type=SOURCE)
@click.argument("settings", nargs=-1, metavar="[section.key=value ...]")
@DATA
@click.option("--json", "json_path", type=PLACE, help="Also write the result to this file.")
@DEVICE
def eval_command(
    source: str, settings: tuple[str, ...], data_path: str | None, json_path: Path | None, device: str
) -> None:
    """Accuracy of SOURCE (a run, a checkpoint, an export, .safetensors, .pth) on the held-out images of a folder.

    A run is evaluated on its own data set and settings unless told otherwise; its own classifier is used where its
    classes are those of the data. Every other source is evaluated by k-NN.
    """
    from . import standalone

    writable(json_path, "--json")
    result = standalone.evaluate_source(source, [*settings, *located(data_path)], device)
    for name, value in result.items():
        click.echo(f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}")
    if json_path is not None:
        write_json(json_path, result, "--json")


for command in (data, transfer, analyze, report):
    cli.add_command(command)


@cli.command()
@click.argument("source", type=SOURCE)
@click.argument("out", type=PLACE)
@click.option(
    "--to", "target", type=click.Choice(["torchvision", "timm", "hf"]), default="torchvision", show_default=True
)
def export(source: str, out: Path, target: str) -> None:
    """Write the encoder of SOURCE (a run, safetensors, or an official .pth) to the folder OUT, verified by
    reloading."""
    from .export import export as write

    folder = write(source, out, target)
    click.echo(f"encoder: {folder / 'model.safetensors'}")
    click.echo(f"load it: fastrex.load_encoder({str(folder)!r})")


@cli.command("config")
@SETTINGS
@DATA
@click.option("--toml", is_flag=True, help="Only TOML, to be saved as a recipe of your own.")
def config_command(settings: tuple[str, ...], data_path: str | None, toml: bool) -> None:
    """Print the resolved configuration with a line of help per field, after the names of all recipes."""
    from . import objectives

    recipe, words = split(settings)
    config = objectives.resolve(config_module.load(recipe, [*words, *located(data_path)]))
    if toml:
        click.echo(config_module.to_toml(config), nl=False)
        return
    helps = objectives.option_help(config)
    click.echo(f"# recipes: {', '.join(config_module.recipes())}")
    section = ""
    for name, key, value, text in config_module.items(config):
        if name != section:
            click.echo(f"\n[{name}]")
            section = name
        click.echo(f"{key + ' = ' + settings_module.toml_value(value):<44}# {text or helps.get(key, '')}")


@cli.command()
@click.argument("run", type=PLACE)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--verify", is_flag=True, help="Read all checkpoints and compare their checksums.")
def status(run: Path, as_json: bool, verify: bool) -> int:
    """How RUN is doing: running, completed, preempted, failed, diverged or killed, and how it continues.

    Exit code 0 whatever the state; 1 if RUN is no run directory or a checkpoint in it is damaged.
    """
    from . import health

    facts = health.examine(run, verify)
    for line in [json.dumps(facts)] if as_json else map(one_line, health.lines(facts)):
        click.echo(line)
    return int(bool(facts["damaged"]))


@cli.command()
def env() -> None:
    """Versions and hardware, for a bug report."""
    from . import rundir

    click.echo(json.dumps(rundir.environment(), indent=1))


@cli.command("bench", context_settings={"ignore_unknown_options": True}, add_help_option=False)
@click.argument(
    "words",
    nargs=-1,
    type=click.UNPROCESSED,
    metavar="kernels|loader|step|run|probe|tradeoff|family|gpu|curve [OPTIONS]",
)
def bench(words: tuple[str, ...]) -> None:
    """Measure kernels and loader beside their rivals; fastrex bench --help lists what else."""
    # An installation has the benchmarks inside this package, a checkout beside it.
    root = Path(__file__).parents[1]
    try:
        module = import_module("fastrex.bench.__main__")
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("fastrex.bench") or not (root / "benchmarks" / "kernels.py").is_file():
            raise
        sys.path.insert(0, str(root))
        module = import_module("benchmarks.__main__")
    with module.main.make_context("fastrex bench", list(words) or ["--help"]) as context:
        module.main.invoke(context)
