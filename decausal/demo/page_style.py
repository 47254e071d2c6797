"""How the report's page looks. Colours of the two runs are those of the figures, in light and dark."""

from __future__ import annotations

from decausal.demo.plots import DARK, LIGHT

STYLE = f"""
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
