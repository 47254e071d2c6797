"""The frame of a page that loads nothing from elsewhere: light and dark, for large and small screens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

STYLE = """
:root { --text: #222222; --back: #ffffff; --soft: #f3f5f7; --line: #dddddd; --quiet: #5a6169; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e4e4; --back: #16191c; --soft: #20252a; --line: #3a3f44; --quiet: #a5adb5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 1rem/1.55 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
p, ul { max-width: 46rem; }
.note, figcaption, small { color: var(--quiet); font-size: .875rem; }
code, pre { font: .85rem/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
pre { background: var(--soft); border-radius: .4rem; padding: .8rem 1rem; margin: .4rem 0; white-space: pre-wrap; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { text-align: right; vertical-align: top; padding: .35rem 1rem .35rem 0; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; white-space: nowrap; }
th:first-child, td:first-child, .facts td { text-align: left; }
.facts td { white-space: normal; overflow-wrap: anywhere; }
tbody th { font-weight: normal; text-align: left; }
a { color: inherit; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; }
svg.chart { width: 100%; height: auto; display: block; }
summary { cursor: pointer; margin-top: .6rem; overflow-wrap: anywhere; }
"""


def page(title: str, sections: Iterable[str]) -> str:
    """Returns a page as HTML."""
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{escape(title)}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table; the cells are HTML."""
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def facts(values: dict[str, Any]) -> str:
    """Returns names and values as a table of two columns."""
    rows = "".join(
        f"<tr><th scope=row>{escape(str(name))}</th><td>{escape(_plain(value))}</td></tr>"
        for name, value in values.items()
    )
    return f'<div class="scroll"><table class="facts">{rows}</table></div>'


def charts(drawn: Iterable[tuple[str, str]]) -> str:
    """Returns figures side by side, each an SVG with its caption."""
    figures = "".join(f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>" for svg, caption in drawn)
    return f'<div class="charts">{figures}</div>' if figures else ""


def number(value: float | int | None, digits: int = 3) -> str:
    """Returns a number as a cell; a dash for none."""
    if value is None:
        return "–"
    return f"{value:,.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"


def with_error(value: float | int | None, error: float | int | None, digits: int = 3) -> str:
    """Returns a number with its standard error as a cell."""
    return number(value, digits) + (
        "" if error is None or value is None else f" <small>± {number(error, digits)}</small>"
    )


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(part)}" for name, part in value.items())
    return ", ".join(map(_plain, value)) if isinstance(value, list | tuple) else str(value)
