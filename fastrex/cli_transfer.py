"""Commands about encoders that are trained: transfer, analyze, report."""

from __future__ import annotations

from pathlib import Path

import click

from .cli_options import DEVICE, PLACE, SOURCE
from .errors import UsageError

SEEDS = (22, 37, 45, 77, 93)  # of the published protocol (ImageNet-CoG)
PROBES = ("logistic", "sgd", "knn", "ncm")


def _numbers(context: click.Context, param: click.Parameter, text: str | None) -> tuple[int, ...]:
    """Such as "1,2,4" as numbers of at least 0."""
    if text is None:
        return ()
    try:
        numbers = tuple(int(word) for word in text.split(","))
    except ValueError:
        numbers = (-1,)
    if min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise UsageError(f"{param.opts[0]} must be whole numbers with commas between, each once, got {text!r}")
    return numbers


def _words(context: click.Context, param: click.Parameter, text: str | None) -> tuple[str, ...]:
    """Such as "aircraft,pets" as words; a comma inside a path is written as two."""
    if text is None:
        return ()
    return tuple(word.replace("\0", ",").strip() for word in text.replace(",,", "\0").split(",") if word.strip())


@click.command()
@click.argument("source", type=SOURCE)
@click.option(
    "--sets",
    callback=_words,
    required=True,
    metavar="NAME,NAME=PATH,...",
    help="Official sets (aircraft, cars196, ...; small, cog, inat, all) under --root, and folders of your own.",
)
@click.option("--root", type=PLACE, help="The folder that holds the official sets, each under its own name.")
@click.option("--out", type=PLACE, help="Where the tables are written; default SOURCE/transfer for a run.")
@click.option(
    "--probes",
    callback=_words,
    metavar=",".join(PROBES),
    help="Which probes; default logistic (sgd for the large sets), knn and ncm.",
)
@click.option("--protocol", type=click.Choice(["grid", "paper"]), default="grid", show_default=True)
@click.option(
    "--seeds",
    callback=_numbers,
    default=",".join(map(str, SEEDS)),
    show_default=True,
    help="Of the validation splits, and of the few shots.",
)
@click.option("--shots", callback=_numbers, help="Also with so many training images per class, such as 1,2,4,8.")
@click.option("--size", type=click.IntRange(min=1), help="Side of the image in pixels; default the source's, or 224.")
@click.option("--cache", type=PLACE, help="Where features are kept; default the cache folder. May be deleted.")
@click.option("--no-cache", is_flag=True, help="Keep no features; an interrupted extraction begins anew.")
@click.option("--threads", type=click.IntRange(min=0), default=0, help="Decoder threads per rank; 0 = its cores.")
@click.option("--batch", type=click.IntRange(min=1), default=128, show_default=True, help="Images per batch.")
@click.option("--compare", multiple=True, type=PLACE, metavar="DIR", help="Other results to put into the table.")
@DEVICE
def transfer(
    source: str,
    sets: tuple[str, ...],
    root: Path | None,
    out: Path | None,
    probes: tuple[str, ...],
    protocol: str,
    seeds: tuple[int, ...],
    shots: tuple[int, ...],
    size: int | None,
    cache: Path | None,
    no_cache: bool,
    threads: int,
    batch: int,
    compare: tuple[Path, ...],
    device: str,
) -> int:
    """What the frozen features of SOURCE (a run, an export, .safetensors, .pth) are worth on other data sets.

    \b
    fastrex transfer runs/trex --sets all --root /data/transfer
    fastrex transfer trex.pth --sets aircraft,dtd,mine=/data/mine --root /data/transfer --out trex-transfer
    fastrex transfer RUN --sets pets --root /data --shots 1,2,4,8
    torchrun --nproc-per-node=8 -m fastrex transfer RUN --sets cog,inat --root /data

    Writes transfer.json, transfer.md and transfer.html. Sets that are not there are skipped, by name, with where to get
    them. Exit code 0 if every set that is there has its result, else 1.
    """
    from .transfer import suite

    if no_cache and cache is not None:
        raise UsageError("--no-cache must stand without --cache, got both; give one of them")
    return suite.run(
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
        keep=not no_cache,
        threads=threads,
        batch_size=batch,
        compare=compare,
        device=device,
        say=click.echo,
    )


@click.command()
@click.argument("sources", nargs=-1, required=True, type=SOURCE, metavar="SOURCE [SOURCE ...]")
@click.option(
    "--sets",
    callback=_words,
    required=True,
    metavar="NAME,NAME=PATH,...",
    help="As for transfer: whose held-out images are looked at.",
)
@click.option("--root", type=PLACE, help="The folder that holds the official sets.")
@click.option("--out", type=PLACE, help="Where it is written; default SOURCE/analysis for a lone run, else ./analysis.")
@click.option("--images", type=click.IntRange(min=2), help="At most so many images of each set.")
@click.option("--size", type=click.IntRange(min=1), help="Side of the image in pixels; default the source's, or 224.")
@click.option("--cache", type=PLACE, help="Where features are kept; default the cache folder.")
@click.option("--threads", type=click.IntRange(min=0), default=0, help="Decoder threads; 0 = all cores.")
@DEVICE
def analyze(
    sources: tuple[str, ...],
    sets: tuple[str, ...],
    root: Path | None,
    out: Path | None,
    images: int | None,
    size: int | None,
    cache: Path | None,
    threads: int,
    device: str,
) -> None:
    """How the features of each SOURCE are spread: coding length, spectrum, sparsity, distances within and between
    classes, alignment and uniformity; for a run also behind each layer of its projector; and how diverse its filters
    are.

    \b
    fastrex analyze runs/depth0 runs/depth1 runs/depth3 --sets val=/data/imagenet --out depth
    fastrex analyze RUN --sets small --root /data/transfer --images 5000

    Writes analysis.json, analysis.md and analysis.html: each set alone, and all of them pooled (without IN1K). Several
    runs are put in the order of their projectors' depths. Sets that are not there are left out, by name.
    """
    from .analysis import analyze as analysis

    analysis.run(
        sources,
        sets,
        root=root,
        out=out,
        images=images,
        size=size,
        cache=cache,
        threads=threads,
        device=device,
        say=click.echo,
    )


@click.command()
@click.argument("runs", nargs=-1, required=True, type=PLACE, metavar="RUN [RUN ...]")
@click.option("--out", type=PLACE, help="The page; default report.html in a lone RUN, else in this folder.")
@click.option(
    "--no-images", is_flag=True, help="Leave out crops, neighbours and spectrum, for which images have to be read."
)
def report(runs: tuple[Path, ...], out: Path | None, no_images: bool) -> None:
    """One HTML page about RUN, or about several runs side by side; it needs no network and no server.

    Curves, bank health, the crops as the model saw them, nearest neighbours, spectrum, the transfer table, training
    against transfer, differences between the configurations, environment.
    """
    from .report import build

    page = build.run(runs, out=out, images=not no_images, say=click.echo)
    click.echo(f"report: {page}")
