"""Draws docs/images/infill.svg from a demo's report: tokens appear in the order in which the model committed them.

decausal demo && python docs/images/infill_svg.py decausal-demo/report.json
"""

from __future__ import annotations

import json
import sys
from html import escape
from pathlib import Path

CHARACTER, LINE, MARGIN = 8.4, 20, 18
SECONDS_PER_STEP, REST = 0.35, 4.0
COLOURS = ("#7dd3fc", "#86efac", "#fde68a", "#fdba74", "#f9a8d4", "#c4b5fd")
STYLE = "font: 14px ui-monospace, 'DejaVu Sans Mono', Menlo, monospace; white-space: pre"


def main(report: str) -> None:
    found = json.loads(Path(report).read_text(encoding="utf-8"))["infilling"]
    filling = found["fillings"]["aligned"]
    pieces = [(found["gap"]["prefix"], None)]
    pieces += zip(filling["pieces"], filling["step_of_piece"], strict=True)
    pieces += [(found["gap"]["suffix"], None)]
    lines = _lines(pieces)
    num_steps = max(filling["step_of_piece"]) + 1
    period = num_steps * SECONDS_PER_STEP + REST
    width = 2 * MARGIN + CHARACTER * max(sum(len(text) for text, _ in line) for line in lines)
    height = 2 * MARGIN + LINE * (len(lines) + 1)
    note = f"{len(filling['pieces'])} tokens in {filling['num_forwards']} forward passes, coloured by step"
    body = [
        _text(column, MARGIN + LINE * (row + 1), text, step, period)
        for row, line in enumerate(lines)
        for column, text, step in _columns(line)
    ]
    svg = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img"
 aria-label="A converted model fills a gap in a held-out file; tokens appear in the order in which it commits them">
<rect width="100%" height="100%" rx="8" fill="#0f172a"/>
<g style="{STYLE}" fill="#cbd5e1">
{chr(10).join(body)}
<text x="{MARGIN}" y="{height - MARGIN / 2:.0f}" fill="#64748b">{escape(note)}</text>
</g>
</svg>
"""
    (Path(__file__).parent / "infill.svg").write_text(svg, encoding="utf-8")


def _lines(pieces: list[tuple[str, int | None]]) -> list[list[tuple[str, int | None]]]:
    lines: list[list[tuple[str, int | None]]] = [[]]
    for text, step in pieces:
        for number, part in enumerate(text.split("\n")):
            if number:
                lines.append([])
            if part:
                lines[-1].append((part, step))
    return lines


def _columns(line: list[tuple[str, int | None]]) -> list[tuple[int, str, int | None]]:
    placed, column = [], 0
    for text, step in line:
        placed.append((column, text, step))
        column += len(text)
    return placed


def _text(column: int, y: float, text: str, step: int | None, period: float) -> str:
    x = MARGIN + CHARACTER * column
    if step is None:
        return f'<text x="{x:.1f}" y="{y:.0f}" xml:space="preserve">{escape(text)}</text>'
    shown_from = min(0.99, (step + 1) * SECONDS_PER_STEP / period)
    width = CHARACTER * len(text)
    hidden, shown = f"0;{shown_from:.4f};1", COLOURS[step % len(COLOURS)]
    return (
        f'<rect x="{x:.1f}" y="{y - 13:.0f}" width="{width - 1:.1f}" height="16" rx="2" fill="#334155" opacity="0">'
        f'<animate attributeName="opacity" calcMode="discrete" dur="{period:.2f}s" repeatCount="indefinite" '
        f'keyTimes="{hidden}" values="1;0;0"/></rect>'
        f'<text x="{x:.1f}" y="{y:.0f}" xml:space="preserve" fill="{shown}">{escape(text)}'
        f'<animate attributeName="opacity" calcMode="discrete" dur="{period:.2f}s" repeatCount="indefinite" '
        f'keyTimes="{hidden}" values="0;1;1"/></text>'
    )


if __name__ == "__main__":
    main(sys.argv[1])
