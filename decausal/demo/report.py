"""The report on disk: figures as JSON, plots as PNG, and one page that holds everything it shows.

The page needs nothing from outside. It is made for small and large screens, light and dark.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from decausal.demo.history import MEASURES, best
from decausal.demo.infilling import Filling, Gap
from decausal.demo.output import REPORT_FIGURES, REPORT_PAGE, REPORT_PICTURE
from decausal.demo.plots import DARK, LIGHT, Curves, as_data_uri, figures, save_picture
from decausal.demo.result import DemoResult
from decausal.demo.terminal import LABELS
from decausal.wording import quantity

CAPTIONS = {
    "cross_entropy_by_step": (
        "Mean cross-entropy of masked tokens in files that neither run trained on, by training step. The dashed line "
        "is the best of plain denoising; the star is where REPR-ALIGN's line meets it."
    ),
    "cross_entropy_by_seconds": (
        "The same by training time. A step of REPR-ALIGN costs more: the frozen AR model reads each row too. Time "
        "spent measuring is not counted."
    ),
    "nelbo_by_step": (
        "The NELBO bounds from above how many nats the diffusion model needs for a token, so that it can be set beside "
        "the AR model's own negative log-likelihood, the dotted line."
    ),
    "cosines": (
        "Mean cosine between the student's hidden states where it predicts a masked token (half of the tokens are "
        "masked) and the AR model's at the same places. The AR model reads the text whole, from left to right."
    ),
}

# The colours of the two runs are those of the figures.
_STYLE = f"""
:root {{ --text: {LIGHT.text}; --back: {LIGHT.background}; --soft: #f3f5f7; --line: {LIGHT.grid}; --quiet: #5a6169;
  --plain: #b34700; --aligned: {LIGHT.aligned}; --l: 36%; --tint: 90%; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --text: {DARK.text}; --back: {DARK.background}; --soft: #20252a; --line: {DARK.grid}; --quiet: #a5adb5;
    --plain: {DARK.plain}; --aligned: {DARK.aligned}; --l: 78%; --tint: 22%; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--back); color: var(--text); font: 1rem/1.55 system-ui, sans-serif; }}
main {{ max-width: 66rem; margin: 0 auto; padding: 1rem 1rem 4rem; }}
h1 {{ font-size: 1.6rem; line-height: 1.25; }}
h2 {{ font-size: 1.25rem; margin: 2.2rem 0 .6rem; }}
h3 {{ font-size: 1rem; margin: 1.2rem 0 .4rem; }}
p, ul {{ max-width: 46rem; }}
ul {{ padding-left: 1.2rem; }}
li {{ margin: .35rem 0; }}
.plain {{ color: var(--plain); }}
.aligned {{ color: var(--aligned); }}
.note, figcaption, small {{ color: var(--quiet); font-size: .875rem; }}
.findings {{ background: var(--soft); border-left: .25rem solid var(--quiet); border-radius: .25rem;
  padding: .6rem 1rem .6rem 2rem; }}
code, pre {{ font: .85rem/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }}
code {{ overflow-wrap: anywhere; }}
pre {{ background: var(--soft); border-radius: .4rem; padding: .8rem 1rem; margin: .4rem 0; overflow-x: auto; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; }}
th, td {{ text-align: left; vertical-align: top; padding: .35rem 1.2rem .35rem 0;
  border-bottom: 1px solid var(--line); }}
tbody th, table > tr > th {{ font-weight: normal; }}
td {{ font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }}
.plots {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem; }}
figure {{ margin: 0; }}
figure img {{ width: 100%; height: auto; display: block; }}
mark {{ display: inline; background: none; color: inherit; font-weight: 600; border-left: .2rem solid var(--quiet);
  border-right: .2rem solid var(--quiet); }}
mark span, .legend span {{ color: hsl(var(--h) 75% var(--l)); background: hsl(var(--h) 60% var(--tint)); }}
.newline::before {{ content: "↵"; opacity: .6; }}
.legend {{ white-space: nowrap; }}
summary {{ cursor: pointer; font-weight: 600; margin-top: 2rem; }}
.replay {{ display: none; }}
@media (prefers-reduced-motion: no-preference) {{
  .replay {{ display: inline-block; cursor: pointer; color: var(--quiet); font-size: .875rem; }}
  mark span {{ animation: commit .4s calc(var(--s) * .18s + .6s) backwards; }}
  .infill:has(:checked) mark span {{ animation-name: commit-again; }}
}}
@keyframes commit {{ from {{ color: transparent; background: var(--line); }} }}
@keyframes commit-again {{ from {{ color: transparent; background: var(--line); }} }}
"""


def write_report(result: DemoResult) -> list[Path]:
    """Writes `report.html`, `report.png` and `report.json` into the demo's directory, and returns their paths."""
    output_dir = Path(result.settings.output_dir)
    paths = [output_dir / name for name in (REPORT_PAGE, REPORT_PICTURE, REPORT_FIGURES)]
    record = result.as_dict()
    curves = Curves(
        measurements={name: arm.measurements for name, arm in result.arms.items()},
        crossings=result.crossings,
        cosines=result.cosines,
        ar_nll_per_token=result.ar.nll_per_token,
    )
    paths[0].write_text(_page(result, record, curves), encoding="utf-8")
    save_picture(paths[1], curves)
    paths[2].write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return paths


def _page(result: DemoResult, record: dict[str, Any], curves: Curves) -> str:
    """Returns the page as HTML.

    Args:
        result: The demo's result.
        record: The result as in `report.json`.
        curves: The data of the figures.
    """
    body = "\n".join(
        (
            _opening(result, record),
            _findings(result),
            _plots(curves),
            _infilling(result.gap, result.fillings),
            _commands(result.commands(), result.command_for_real_model()),
            _details(record),
        )
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>decausal demo</title>\n<style>\n{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _opening(result: DemoResult, record: dict[str, Any]) -> str:
    source, data = record["source"], record["training_data"]
    settings = result.settings
    return f"""<h1>An autoregressive model becomes a diffusion model, twice</h1>
<p>An <b>autoregressive</b> (AR) language model writes from left to right and never sees what comes later. A <b>masked
diffusion</b> model sees the whole text with holes in it and fills them in any order, several at once. decausal turned
one into the other: it opened the attention of <code>{escape(settings.model_name_or_path)}</code>
({source["num_parameters"] / 1e6:.1f} million parameters) to both sides, masked random tokens of training text and
trained it to restore them. It did so twice:</p>
<ul>
<li><b class="plain">Plain denoising</b> trains on the masked tokens alone.</li>
<li><b class="aligned">REPR-ALIGN</b> also keeps each layer's hidden states near those of the AR model, which stays
frozen beside it (weight {settings.align_weight:g}).</li>
</ul>
<p>Both had the same {quantity(settings.max_steps, "step")}, the same {quantity(data["num_tokens"], "token")} from
{quantity(data["num_documents"], "document")}, the same masks, seed and trainable parameters.
Alignment's claim is that what the AR model knows is kept, so that less data and fewer steps suffice.</p>"""


def _findings(result: DemoResult) -> str:
    rows = "".join(
        f"<tr><th scope=row>{MEASURES[measure]}, lowest</th>"
        + "".join(
            f"<td>{getattr(lowest, measure):.3f}<small> at step {lowest.step}</small></td>"
            for lowest in (best(arm.measurements, measure) for arm in result.arms.values())
        )
        + "</tr>"
        for measure in MEASURES
    )
    last = [arm.measurements[-1] for arm in result.arms.values()]
    rows += "<tr><th scope=row>masked cross-entropy at the end</th>"
    rows += "".join(f"<td>{measurement.masked_cross_entropy:.3f}</td>" for measurement in last) + "</tr>"
    rows += "<tr><th scope=row>training time</th>"
    rows += "".join(f"<td>{measurement.seconds:.1f} s</td>" for measurement in last) + "</tr>"
    rows += "<tr><th scope=row>training time of a step, median</th>"
    rows += "".join(f"<td>{median(arm.step_seconds):.2f} s</td>" for arm in result.arms.values()) + "</tr>"
    sentences = [*(found.sentence() for found in result.crossings.values()), result.difference_sentence()]
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences if sentence)
    return f"""<h2>Results</h2>
<ul class="findings">{items}</ul>
<div class="scroll"><table>
<thead><tr><th></th><th class="plain">plain denoising</th><th class="aligned">REPR-ALIGN</th></tr></thead>
<tbody>{rows}</tbody></table></div>
<p class="note">Nats; lower is better. One run of each, one seed: run the demo with other seeds before you trust a small
difference. Values are compared where they were measured, every {result.settings.eval_every} steps.</p>"""


def _plots(curves: Curves) -> str:
    drawn = []
    for name, draw in figures(curves).items():
        caption = escape(CAPTIONS[name])
        drawn.append(
            "<figure><picture>"
            f'<source media="(prefers-color-scheme: dark)" srcset="{as_data_uri(draw, DARK)}">'
            f'<img alt="{caption}" src="{as_data_uri(draw, LIGHT)}">'
            f"</picture><figcaption>{caption}</figcaption></figure>"
        )
    return f'<h2>As they trained</h2>\n<div class="plots">{"".join(drawn)}</div>'


def _infilling(gap: Gap | None, fillings: dict[str, Filling]) -> str:
    if gap is None:
        return "<h2>Filling a gap</h2>\n<p>The held-out text has no lines short enough to cut a gap from.</p>"
    shown = "".join(
        f'<h3 class="{name}">{LABELS[name]}</h3>\n{_filled(gap, filling)}'
        f'<p class="note">{quantity(gap.num_tokens, "token")} in '
        f"{quantity(filling.num_forwards, 'forward pass', 'forward passes')}; "
        f"{filling.num_as_in_file} are the file's own, place by place.</p>\n"
        for name, filling in reversed(fillings.items())
    )
    return f"""<h2>Filling a gap</h2>
<p>From <code>{escape(gap.origin)}</code>, a held-out file, the lines between the bars were taken out:
{quantity(gap.num_tokens, "token")}. Each model rewrote them, seeing what stands before and after. Each pass keeps the
tokens that the model is surest of; colours go from the first pass to the last: {_legend()}</p>
<div class="infill"><label class="replay"><input type="checkbox"> play again</label>
{shown}<h3>The file itself</h3>
<pre>{escape(gap.prefix)}<mark>{escape(gap.text)}</mark>{escape(gap.suffix)}</pre></div>
<p class="note">Lines chosen by seed, not by eye. A region has many good fillings: being unlike the file is not an error
by itself.</p>"""


def _filled(gap: Gap, filling: Filling) -> str:
    num_steps = max(filling.step_of_piece, default=0) + 1
    tokens = "".join(
        f'<span class="{_kind(piece)}" style="--s:{step};--h:{_hue(step, num_steps)}" title="pass {step + 1}">'
        f"{escape(piece)}</span>"
        for piece, step in zip(filling.pieces, filling.step_of_piece, strict=True)
    )
    return f"<pre>{escape(gap.prefix)}<mark>{tokens}</mark>{escape(gap.suffix)}</pre>\n"


def _kind(piece: str) -> str:
    return "newline" if "\n" in piece else "token"


def _legend() -> str:
    swatches = "".join(f'<span style="--h:{_hue(step, 8)}">&nbsp;&nbsp;</span>' for step in range(8))
    return f'<span class="legend">{swatches}</span>'


def _hue(step: int, num_steps: int) -> int:
    """Returns a hue from blue over green and yellow to red."""
    return round(240 * (1 - step / max(num_steps - 1, 1)))


def _commands(commands: list[str], command_for_real_model: str) -> str:
    lines = "\n".join(escape(command) for command in commands)
    return f"""<h2>Go on</h2>
<p>Both models are ready. In the directory where the demo was started:</p>
<pre>{lines}</pre>
<p>The same comparison from a real pretrained model, with three seeds:</p>
<pre>{escape(command_for_real_model)}</pre>"""


def _details(record: dict[str, Any]) -> str:
    tables = "".join(
        f"<h3>{title}</h3>\n{_table(values.items())}"
        for title, values in (
            ("Settings", record["settings"] | {"computed in": "bfloat16" if record["is_bf16"] else "float32"}),
            ("Held-out text", record["held_out_data"]),
            ("Machine", record["hardware"]),
            ("Versions", record["versions"]),
        )
    )
    return f"""<details><summary>Settings, machine and versions</summary>
{tables}<p class="note">Started {escape(record["started"])}; {record["seconds"]:.0f} seconds in all. All
figures, of every step, are in <code>report.json</code> beside this page.</p></details>"""


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    cells = "".join(
        f"<tr><th scope=row>{escape(str(name))}</th><td>{escape(str(value))}</td></tr>" for name, value in rows
    )
    return f'<div class="scroll"><table>{cells}</table></div>\n'
