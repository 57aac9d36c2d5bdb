"""HTML that needs nothing else and lets nothing in: escaped text, tables, whole pages. Standard library only."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence

ALIGN = {"l": "", "r": ' class="number"', "c": ' class="middle"'}

# The colours, light and dark: variables that everything else uses.
THEME = """
:root { color-scheme: light dark; --back: #fff; --text: #1f2328; --dim: #59636e; --line: #d1d9e0; --card: #f6f8fa;
  --accent: #0969da; --good: #1a7f37; --bad: #cf222e; }
@media (prefers-color-scheme: dark) {
  :root { --back: #0d1117; --text: #e6edf3; --dim: #9198a1; --line: #3d444d; --card: #151b23;
    --accent: #58a6ff; --good: #3fb950; --bad: #ff7b72; }
}
"""
STYLE = (
    THEME
    + """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 80rem; padding: 1rem; background: var(--back); color: var(--text);
  font: 1rem/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.05rem; margin: .25rem 0 0; }
p { margin: .25rem 0; }
a { color: var(--accent); }
figure { margin: 0; min-width: 0; }
.dim, figcaption { color: var(--dim); font-size: .85rem; }
.good { color: var(--good); }
.bad { color: var(--bad); }
code { font: .85rem/1.4 ui-monospace, monospace; }
p > code { display: block; padding: .5rem; background: var(--card); border: 1px solid var(--line); border-radius: 4px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; margin: .5rem 0; }
th, td { padding: .2rem .75rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  overflow-wrap: normal; }
th { color: var(--dim); font-weight: 600; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.middle { text-align: center; }
details td:last-child { min-width: 12rem; }
summary { cursor: pointer; color: var(--dim); font-size: .85rem; }
"""
)


class Raw(str):
    """Markup as it is meant: not escaped again. Whoever makes one has escaped what is inside."""

    __slots__ = ()


def text(value: object) -> str:
    """A value as the text of an element or a quoted attribute: markup is escaped, and what cannot be seen is spelt out
    (control characters, marks that turn the direction of writing, bytes of a name that are not UTF-8)."""
    return html.escape("".join(c if c.isprintable() else _spelt(c) for c in str(value)))


def _spelt(character: str) -> str:
    byte = ord(character) - 0xDC00  # where Python keeps a byte that is not UTF-8
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else ascii(character)[1:-1]


def table(
    headers: Sequence[object], rows: Iterable[Sequence[object]], *, align: str = "", classes: Sequence[str] = ()
) -> Raw:
    """A table in a box of its own, which scrolls sideways where the page is too narrow.

    Args:
        headers: of the columns; an empty sequence leaves the head out.
        rows: cells, escaped unless they are :class:`Raw`.
        align: a letter per column: l, r (numbers, digits of equal width) or c; columns beyond it are l.
        classes: CSS classes of the table, such as ("scores",).
    """
    head = f"<thead><tr>{_cells('th', headers, align)}</tr></thead>" if headers else ""
    body = "".join(f"<tr>{_cells('td', row, align)}</tr>" for row in rows)
    named = f' class="{text(" ".join(classes))}"' if classes else ""
    # A box that scrolls has to be within reach of the keyboard.
    return Raw(f'<div class="wide" tabindex="0"><table{named}>{head}<tbody>{body}</tbody></table></div>')


def _cells(tag: str, cells: Sequence[object], align: str) -> str:
    return "".join(
        f"<{tag}{ALIGN[align[i] if i < len(align) else 'l']}>{cell if isinstance(cell, Raw) else text(cell)}</{tag}>"
        for i, cell in enumerate(cells)
    )


def data_url(content: bytes, kind: str) -> str:
    """A picture inside the page; ``kind``: png, jpeg or svg+xml."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def document(title: str, body: str, style: str = "", script: str = "", generator: str = "fastrex") -> str:
    """A whole page, light or dark as its reader has it.

    Whatever a name might smuggle in: nothing is loaded, and nothing runs but ``script``.

    Args:
        title: plain text. body: markup. style: CSS after :data:`STYLE`. script: JavaScript, run at the end of the body.
        generator: what made the page; :func:`made_by` finds it again.
    """
    allowed = ""
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()
        allowed = f"; script-src 'sha256-{digest}'"
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'{allowed}"
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        _generator(generator),
        f"<title>{text(title)}</title>",
        f"<style>{STYLE}{style}</style>",
        "</head>",
        "<body>",
        body,
        *([f"<script>{script}</script>"] if script else []),
        "</body>",
        "</html>",
    ]
    return "\n".join(lines) + "\n"


def made_by(page: str, generator: str) -> bool:
    """Whether the beginning of a file is that of a page from :func:`document` with this ``generator``."""
    return page.startswith("<!DOCTYPE html>\n") and _generator(generator) in page.partition("<title>")[0]


def _generator(name: str) -> str:
    return f'<meta name="generator" content="{text(name)}">'
