"""What the encoders are worth elsewhere: the transfer table, the analyses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .. import charts
from ..charts import Bar, Series
from ..markup import Raw, table, text
from ..transfer import results
from .groups import FEW, groups, many, places, spread
from .page import Section, grid, titled
from .record import Record, entries, inside, number, word

MAX_BARS, MAX_LAYERS = 40, 7
# Of analysis.json: what is shown, and its digits.
MEASURES = (
    ("coding_length", "coding length", ".1f"),
    ("effective_rank", "effective rank", ".1f"),
    ("sparsity", "sparsity", ".3f"),
    ("intra_class_distance", "intra-class distance", ".3f"),
    ("class_separation", "class separation", ".3f"),
    ("alignment", "alignment", ".3f"),
    ("uniformity", "uniformity", ".3f"),
)
ABSENT = Raw("–")
Key = tuple[str, int | None]


def transfer(records: Sequence[Record]) -> Section:
    """Top-1 of the headline probe on every set, means of log-odds, and for a lone run its other probes. Of many runs,
    those that differ only in the seed have one column."""
    omitted = tuple(
        f"Transfer of {r.name}: {_reason(r, 'transfer/transfer.json', 'fastrex transfer')}"
        for r in records
        if not r.transfer
    )
    done = [r for r in records if r.transfer]
    if not done:
        return Section("transfer", "Transfer", omitted=omitted)
    several = len(done) > 1
    columns = [(g, [r for r in g.records if r.transfer]) for g in groups(records)]
    columns = [(g, members) for g, members in columns if members]
    found = {r.name: {results.key(entry): entry for entry in (r.transfer or {})["sets"]} for r in done}
    keys = list(dict.fromkeys(key for sets in found.values() for key in sets))
    note = (
        "Probes on frozen features of other data sets. ± is the standard deviation over seeds of the probe"
        f"{', or over runs that differ only in the seed' if many(records) else ''}; log-odds are "
        "ln(p/(1−p)) of the top-1 p, with 95 % bootstrap intervals over test images in brackets."
    )
    rows = []
    for key in keys:
        row = [[found[r.name][key] for r in members if key in found[r.name]] for _, members in columns]
        best = max(_average(there) for there in row if there)
        cells = [_share(there, several and bool(there) and _average(there) == best) for there in row]
        rows.append((_set_name(key), *cells, *([] if several else _beside(row[0][0] if row[0] else None))))
    for name in dict.fromkeys(name for r in done for name in (r.transfer or {})["means"]):
        cells = [_mean([inside(r.transfer, "means", name) for r in members], name) for _, members in columns]
        if all(cell == ABSENT for cell in cells):
            continue
        cells = cells if several else [Raw(""), *cells, Raw(""), Raw("")]
        which, _, shots = name.partition("@")
        few = f", {shots} shot{'s' * (shots != '1')}" if shots else ""
        rows.append((Raw(f"<b>{text(f'mean log-odds, {which}{few}')}</b>"), *cells))
    if several:
        headers: tuple[object, ...] = ("set, top-1 in %", *(titled(g.name, g.place) for g, _ in columns))
    else:
        headers = ("set", "top-1 in %", "log-odds", "k-NN", "NCM")
    body = table(headers, rows, align="l" + "r" * (len(headers) - 1), classes=("scores",))
    drawn = [
        _bars(r, found[r.name], i if len(records) > 1 else 0, several) for i, r in enumerate(records) if r.transfer
    ]
    said = [f"{s['name']} ({s['reason']})" for r in done for s in (r.transfer or {})["skipped"]]
    noted = [f"{_set_name(key)}: {line}" for sets in found.values() for key, e in sets.items() for line in _remarks(e)]
    for before, lines in (("Sets without a result: ", said), ("", noted)):
        if lines:
            body = Raw(body + f'<p class="dim">{text(before + "; ".join(dict.fromkeys(lines)))}</p>')
    # Of many runs the table says it in less room.
    return Section("transfer", "Transfer", (grid(drawn) if len(done) <= FEW else "") + body, note, omitted)


def _bars(record: Record, sets: Mapping[Key, Mapping[str, Any]], i: int, several: bool) -> str:
    bars = [Bar(_set_name(key), _top1(e), _ends(results.headline(e)["top1"]), i) for key, e in sets.items()]
    return charts.bars(bars[:MAX_BARS], title=f"Top-1, {record.name}" if several else "Top-1", unit="%")


def _remarks(entry: Mapping[str, Any]) -> list[str]:
    """What keeps the figures of a set from standing beside published ones, and what its reader was told."""
    found = list(entry.get("notices", ()))
    if (numbers := results.published(entry)) is not None:
        found.append(
            f"{entry['classes']} classes, {entry['train']} + {entry['test']} images, published are {numbers[0]}, "
            f"{numbers[1]} + {numbers[2]}: not to be compared with published figures"
        )
    if entry.get("left_out"):
        found.append(f"{entry['left_out']} images could not be read and are left out")
    if entry["headline"] != results.usual(entry):
        found.append(f"by {entry['headline']} instead of the protocol's {results.usual(entry)}")
    return found


def analyses(records: Sequence[Record]) -> tuple[str, list[Series]]:
    """The tables of ``fastrex analyze``, and spectra: of each layer on the first set for a lone run, of the encoders on
    each run's first set for several."""
    parts, spectra = [], list[Series]()
    several = len(records) > 1
    for i, record in zip(places(records), records, strict=True):
        found = [
            (word(part, "name"), layer)
            for subject in entries(record.analysis, "subjects")
            for part in entries(subject, "sets")
            for layer in entries(part, "layers")
        ]
        if not found:
            continue
        rows = []
        for name, layer in found:
            values = [number(layer, key) for key, _, _ in MEASURES]
            shown = ["–" if v is None else f"{v:{how}}" for v, (_, _, how) in zip(values, MEASURES, strict=True)]
            rows.append((name, word(layer, "layer"), *(cell.replace("-", "−") for cell in shown)))
        heading = f"<h3>{titled(record.name, i)}</h3>" if several else ""
        headers = ("set", "layer", *(name for _, name, _ in MEASURES))
        parts.append(heading + table(headers, rows, align="ll" + "r" * len(MEASURES)))
        first = [layer for name, layer in found if name == found[0][0]]
        for place, layer in enumerate(first[:1] if several else first[:MAX_LAYERS]):
            line = inside(layer, "spectrum")
            if isinstance(line, list):
                which = f"{record.name}, {found[0][0]}" if several else f"{found[0][0]}, {word(layer, 'layer')}"
                spectra.append(spectrum(which, line, i if several else place))
    return "".join(parts), spectra


def spectrum(name: str, values: Sequence[Any], i: int) -> Series:
    """Singular values as a curve over their index, from 1; the i-th run's colour."""
    points = [(float(n), number(values, n - 1)) for n in range(1, len(values) + 1)]
    return Series(name, [(x, y) for x, y in points if y], i)


def _reason(record: Record, file: str, command: str) -> str:
    why = record.missing.get(file, "it is not there")
    return f"there is none; {command} makes it." if why == "it is not there" else f"{why}."


def _set_name(key: Key) -> str:
    name, shots = key
    return name if shots is None else f"{name}, {shots} shot{'s' * (shots != 1)}"


def _top1(entry: Mapping[str, Any]) -> float:
    return float(results.headline(entry)["top1"]["mean"])


def _ends(figures: Mapping[str, Any]) -> tuple[float, float]:
    return float(figures["low"]), float(figures["high"])


def _average(there: Sequence[Mapping[str, Any]]) -> float:
    return spread([_top1(entry) for entry in there])[0]


def _share(there: Sequence[Mapping[str, Any]], best: bool) -> Raw:
    """Top-1 of a run, or of runs that differ in the seed."""
    if not there:
        return ABSENT
    mean, deviation = spread([_top1(entry) for entry in there])
    top1 = results.headline(there[0])["top1"]
    deviation = deviation if len(there) > 1 else top1["std"]
    shown = f"{100 * mean:.1f}"
    more = f" ± {100 * deviation:.1f}" if len(there) > 1 or len(top1["seeds"]) > 1 else ""
    return Raw((f"<b>{shown}</b>" if best else shown) + more)


def _beside(entry: Mapping[str, Any] | None) -> Sequence[object]:
    """Log-odds and the other probes of a set."""
    if entry is None:
        return ["", "", ""]
    odds = results.headline(entry)["log_odds"]
    others = [entry["probes"].get(probe) for probe in ("knn", "ncm")]
    shown = ["–" if probe is None else f"{100 * probe['top1']['mean']:.1f}" for probe in others]
    value = f"{odds['value']:.2f}".replace("-", "−")
    return [Raw(f"{text(value)}<small>{text(_brackets(odds))}</small>"), *shown]


def _mean(there: Sequence[Any], name: str) -> Raw:
    """A mean of log-odds. Of the official ones only what is complete can be compared; ``all`` is of what there is."""
    known = [found for found in there if found is not None]
    whole = all(found["complete"] or name.partition("@")[0] == "all" for found in known)
    kinds = {(tuple(found["sets"]), found.get("probe", "")) for found in known}
    if len(known) < len(there) or not whole or len(kinds) != 1:
        return ABSENT
    ((sets, probe),) = kinds
    mean, deviation = spread([found["log_odds"]["value"] for found in known])
    shown = f"{mean:.3f}".replace("-", "−")
    how = f"± {deviation:.3f}" if len(known) > 1 else _brackets(known[0]["log_odds"])
    by = f", by {probe}" if probe else ""
    return Raw(f"{text(shown)}<small>{text(how)}, {len(sets)} set{'s' * (len(sets) != 1)}{text(by)}</small>")


def _brackets(odds: Mapping[str, Any]) -> str:
    return f"[{odds['low']:.2f}, {odds['high']:.2f}]".replace("-", "−")
