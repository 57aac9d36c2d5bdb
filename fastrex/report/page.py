"""How the sections of the report look; what they have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .. import charts
from ..drawing import sign
from ..markup import Raw, text

STYLE = (
    charts.STYLE
    + """
body { padding: 1.25rem 1rem 3rem; }
header { border-bottom: 1px solid var(--line); padding-bottom: .75rem; }
nav { display: flex; flex-wrap: wrap; gap: .15rem 1rem; margin-top: .5rem; font-size: .85rem; }
nav a { text-decoration: none; padding: .15rem 0; }
nav a:hover { text-decoration: underline; }
section { margin-top: 2.25rem; }
h2 { font-size: 1.2rem; margin: 0 0 .15rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .35rem; }
section > p { max-width: 46rem; margin: 0 0 .75rem; }
.facts { display: grid; gap: .75rem 1.5rem; margin: .75rem 0 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 8.75rem), 1fr)); }
.facts dt { color: var(--dim); font-size: .8rem; }
.facts dd { margin: 0; font-size: 1.15rem; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums; }
.facts small { display: block; color: var(--dim); font-weight: 400; font-size: .8rem; }
.beside { display: grid; gap: 1rem 2rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.wide:focus-visible { outline: 2px solid var(--accent); }
.wide table { min-width: min(100%, 26rem); }
.settings td:first-child { white-space: nowrap; }
.settings td { min-width: 6rem; max-width: 24rem; overflow-wrap: anywhere; }
.pairs { display: grid; gap: 0 2rem; margin: .5rem 0; font-size: .85rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
.pairs div { display: flex; gap: 1rem; padding: .2rem 0; border-bottom: 1px solid var(--line); }
.pairs dt { color: var(--dim); flex: 0 0 9rem; }
.pairs dd { margin: 0; min-width: 0; }
.overview td, .scores td:first-child, .key td { white-space: nowrap; }
td small { display: block; color: var(--dim); }
.failure { border-left: 3px solid var(--bad); padding-left: .6rem; }
.samples { display: grid; gap: 1.25rem 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 35rem), 1fr)); }
.sample { display: grid; gap: .75rem; grid-template-columns: minmax(0, 11rem) minmax(0, 1fr); align-items: start; }
.sample svg { display: block; width: 100%; height: auto; max-height: 15rem; border-radius: 3px; }
.sample svg rect { fill: none; stroke-width: 2px; vector-effect: non-scaling-stroke; }
.strip { display: flex; flex-wrap: wrap; gap: .4rem; }
.strip img { display: block; border-width: 2px; border-style: solid; border-radius: 3px; image-rendering: auto; }
.pixels { image-rendering: pixelated !important; }
.queries { display: grid; gap: .75rem 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 35rem), 1fr)); }
.query { display: grid; grid-template-columns: 1fr .1fr repeat(5, 1fr); gap: .55rem; align-items: start; }
.query img { display: block; width: 100%; height: auto; aspect-ratio: 1; object-fit: cover; border-radius: 3px; }
.query figcaption { font-size: .75rem; line-height: 1.25; margin-top: .25rem; overflow-wrap: anywhere;
  display: -webkit-box; -webkit-line-clamp: 2; -webkit-box-orient: vertical; overflow: hidden; }
.query .right img { outline: 2px solid var(--good); outline-offset: 1px; }
.query .wrong img { outline: 2px dashed var(--bad); outline-offset: 1px; }
.query i { grid-column: 2; }
.log { font: .8rem/1.5 ui-monospace, monospace; }
.log td { padding: .05rem .75rem .05rem 0; border: 0; }
.log td:first-child { white-space: nowrap; color: var(--dim); }
.omitted { padding-left: 1.1rem; margin: .5rem 0; font-size: .85rem; color: var(--dim); }
footer { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: .5rem; color: var(--dim);
  font-size: .8rem; }
@media (max-width: 34rem) {
  .sample { grid-template-columns: minmax(0, 1fr); }
  .sample figure { max-width: 13rem; }
  .log td { display: block; }
  .log td:first-child { padding-top: .4rem; }
}
@media print { nav { display: none; } section { break-inside: avoid; } }
"""
)


@dataclass(frozen=True)
class Section:
    """A part of the page, or why it is not there: ``omitted`` are lines for the list at the end."""

    key: str
    title: str
    body: str = ""
    note: str = ""
    omitted: tuple[str, ...] = ()

    def html(self) -> str:
        note = f'<p class="dim">{text(self.note)}</p>' if self.note else ""
        return f'<section id="{self.key}"><h2>{text(self.title)}</h2>{note}{self.body}</section>'


def grid(drawn: Sequence[str]) -> str:
    """Charts side by side as the page has room."""
    return f'<div class="charts">{"".join(drawn)}</div>'


def titled(name: str, i: int | None = None) -> Raw:
    """A run's name, with the colour and form that it has in every chart where there are several."""
    return Raw(f"{'' if i is None else sign(i)}{text(name)}")


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f} %"


def count(number: float | None) -> str:
    return "–" if number is None else f"{number:,.0f}"
