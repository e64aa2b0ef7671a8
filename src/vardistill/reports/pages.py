"""What the pages of runs and benches are made of: one HTML file with its style and figures inside.

A page's own policy allows neither scripts nor requests, so it opens without a network.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from importlib.resources import files

from matplotlib.figure import Figure

from vardistill.reports.figures import svg

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What the page may load: pictures and styles in itself."""


def document(title: str, body: str, footer: str, style: str = "") -> str:
    """A whole page.

    Args:
        title: of the window, as text.
        body: HTML.
        footer: as text.
        style: CSS beyond that of all pages.
    """
    common = files("vardistill.reports").joinpath("report.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)} · vardistill</title>
<style>
{common}{style}</style>
</head>
<body>
<main>
{body}
<footer>{escape(footer)}</footer>
</main>
</body>
</html>
"""


def masthead(kind: str, title: str, facts: Mapping[str, object], about: str = "") -> str:
    """What a page begins with; facts that are None are left out."""
    items = "".join(f"<li>{name} <b>{escape(str(v))}</b></li>" for name, v in facts.items() if v is not None)
    lines = [f'<p class="kind">{kind}</p>', f"<h1>{escape(title)}</h1>", f"<p>{escape(about)}</p>" if about else ""]
    return "\n".join([*filter(None, lines), f'<ul class="facts">{items}</ul>'])


def card(title: str, figure: Figure, caption: str, label: str = "") -> str:
    """A figure with its title and, as HTML, its caption; one without a title is broad and has a label."""
    head = f"<h3>{escape(title)}</h3>" if title else ""
    foot = f'<p class="note">{caption}</p>' if caption else ""
    kind = "card" if title else "card broad"
    return f'<div class="{kind}">{head}{svg(figure, label or title)}{foot}</div>'


def grid(cells: Iterable[str]) -> str:
    """Cards side by side, as many as there is room for."""
    return f'<div class="grid">{"".join(cells)}</div>'


def swatch(name: str) -> str:
    """A dot in one of the colours of the figures."""
    return f'<span class="swatch {name}"></span>'


def scroll_table(rows: Iterable[str], headings: Iterable[str] = ()) -> str:
    """A table of rows, HTML each, under headings; it scrolls where it is wider than its place."""
    cells = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    head = f"<thead><tr>{cells}</tr></thead>" if cells else ""
    return f'<div class="scroll"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def pairs(rows: Iterable[tuple[str, str]]) -> str:
    """Names and values as a table."""
    return scroll_table(f'<tr><td class="note">{escape(name)}</td><td>{escape(v)}</td></tr>' for name, v in rows)
