"""The sections of a report."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from html import escape
from itertools import count
from typing import Any

from decausal.privacy import without_paths, without_paths_in
from decausal.report.charts import Line, chart
from decausal.report.figures import Figure, figures_of
from decausal.report.page import charts, facts, number, table, with_error
from decausal.report.records import Evaluation
from decausal.report.sources import Found, Run
from decausal.report.texts import text_figures

HELD_OUT = {
    "eval_nelbo_per_token": "held-out NELBO, nats per token",
    "eval_bits_per_byte": "held-out NELBO, bits per byte",
    "eval_masked_cross_entropy": "held-out masked cross-entropy, nats",
    "eval_tokens_per_pass": "held-out tokens per pass",
}
AXES = {"step": "step", "tokens": "training tokens", "seconds": "seconds of training", "flops": "FLOPs"}
_SAMPLES = 4


def sections(found: Found) -> Iterator[str]:
    """Yields the sections in the order of the page; those without content are empty."""
    figures = figures_of(found.evaluations)
    yield scores(figures)
    yield speed([each for each in found.evaluations if each.kind == "sweep"], found.evaluations)
    yield training(found.runs)
    yield texts(found)
    yield manifests(found)
    yield "".join(f'<p class="note">{escape(note)}</p>' for note in found.notes)


def scores(figures: Sequence[Figure]) -> str:
    """Returns a table of all models, and one for each model with everything that is known about a score."""
    if not figures:
        return ""
    models = list(dict.fromkeys(figure.model for figure in figures))
    parts = ["<h2>Scores</h2>"]
    if len(models) > 1:
        parts.append(_summary(models, figures))
    for model in models:
        rows = [_row(figure) for figure in figures if figure.model == model]
        headings = ("measure", "score", "AR source", "kept, %", "made of", "how")
        parts.append(f"<h3>{escape(model)}</h3>\n{table(headings, rows)}")
    note = "± is a standard error over examples or rows. A NELBO bounds the model's own likelihood: it may be better."
    return "\n".join([*parts, f'<p class="note">{note}</p>'])


def _summary(models: Sequence[str], figures: Sequence[Figure]) -> str:
    measures = list(dict.fromkeys(figure.measure for figure in figures))
    latest = {(figure.measure, figure.model): figure for figure in figures}
    rows = []
    for measure in measures:
        cells = [latest.get((measure, model)) for model in models]
        source = next((cell.source for cell in cells if cell is not None and cell.source is not None), None)
        shown = ["–" if cell is None else with_error(cell.value, cell.error) for cell in cells]
        rows.append([escape(measure), *shown, number(source)])
    return table(["", *map(escape, models), "AR source"], rows)


def _row(figure: Figure) -> list[str]:
    return [
        escape(figure.measure),
        with_error(figure.value, figure.error),
        with_error(figure.source, figure.source_error),
        with_error(figure.kept, figure.kept_error, 1),
        f"<small>{escape(figure.made_of)}</small>",
        f'<a href="#e{figure.number}">[{figure.number}]</a>',
    ]


def speed(sweeps: Sequence[Evaluation], evaluations: Sequence[Evaluation]) -> str:
    """Returns quality against speed, drawn and as a table, for each sweep."""
    if not sweeps:
        return ""
    parts = ["<h2>Quality against speed</h2>"]
    for sweep in sweeps:
        points, where = sweep.figures["points"], evaluations.index(sweep) + 1
        tasks = ", ".join(sweep.figures["tasks"])
        parts.append(f'<h3>{escape(sweep.name)}, {escape(tasks)} <a href="#e{where}">[{where}]</a></h3>')
        drawn = [
            (chart(_lines(points, by), "", by.replace("_", " "), "score"), f"Score by {by.replace('_', ' ')}")
            for by in ("tokens_per_forward", "tokens_per_second")
        ]
        parts.append(charts(drawn))
        headings = (
            "setting",
            "score",
            "kept, %",
            "per forward",
            "per second",
            "x AR",
            "length",
            "repetition",
            "entropy",
        )
        parts.append(table(headings, map(_point, points)))
    note = (
        "The AR source and verified decoding ran in the same engine on the same questions. Tokens per second depend on "
        "the machine and on what else it did."
    )
    return "\n".join([*parts, f'<p class="note">{note}</p>'])


def _lines(points: Sequence[dict[str, Any]], by: str) -> list[Line]:
    lines = []
    for series in dict.fromkeys(point["series"] for point in points):
        members = sorted((point for point in points if point["series"] == series), key=lambda point: point[by])
        places = [(point[by], point["accuracy"]) for point in members]
        lines.append(Line(series, places, [point["standard_error"] for point in members]))
    return lines


def _point(point: dict[str, Any]) -> list[str]:
    options = " ".join(f"{name}={value}" for name, value in point["options"].items() if name != "speculative")
    look = point.get("texts") or {}
    return [
        escape(f"{point['series']} {options}" if point["series"] in ("AR", "verified") else options),
        with_error(point["accuracy"], point["standard_error"]),
        with_error(point["retention"], point["retention_standard_error"], 1),
        number(point["tokens_per_forward"], 2),
        number(point["tokens_per_second"], 1),
        number(point["speedup"], 2),
        number(look.get("length"), 1),
        number(look.get("repetition")),
        number(look.get("entropy")),
    ]


def training(runs: Sequence[Run]) -> str:
    """Returns the curves of all runs together, and a table of them."""
    runs = [run for run in runs if run.log]
    if not runs:
        return ""
    drawn = []
    for measure, name in HELD_OUT.items():
        for by, axis in AXES.items():
            lines = [Line(run.name, points) for run in runs if (points := run.curve(measure, by))]
            if lines and (by in ("step", "seconds") or measure == "eval_nelbo_per_token"):
                drawn.append((chart(lines, "", axis, name), f"{name[0].upper()}{name[1:]}, by {axis}"))
    for run in runs:
        if drafts := list(_drafts(run)):
            what = f"{run.name}: share of drafts that are right, where those before them are"
            drawn.append((chart(drafts, "", "step", "share of drafts"), what))
    losses = [Line(run.name, points) for run in runs if (points := run.curve("loss"))]
    if losses:
        drawn.append((chart(losses, "", "step", "training loss"), "Training loss, as it was logged"))
    headings = ("run", "steps", "tokens", "seconds", "rate", "rows", "seed", "held out, first", "last")
    return f"<h2>Training</h2>\n{charts(drawn)}\n{table(headings, map(_run, runs))}"


def _drafts(run: Run) -> Iterator[Line]:
    """Yields a line for each position of a draft, the first one first."""
    for position in count(1):
        points = run.curve(f"eval_draft_accuracy_{position}")
        if not points:
            return
        yield Line(f"draft {position}", points)


def _run(run: Run) -> list[str]:
    last, settings = run.log[-1], run.settings
    measure = next((name for name in HELD_OUT if run.curve(name)), None)
    points = run.curve(measure) if measure else []
    unit = "" if measure is None else f" <small>{escape(HELD_OUT[measure].removeprefix('held-out '))}</small>"
    return [
        escape(run.name),
        number(last.get("step"), 0),
        number(last.get("tokens"), 0),
        number(last.get("seconds"), 0),
        str(settings.get("learning_rate", "–")),
        str(settings.get("per_device_train_batch_size", "–")),
        str(settings.get("seed", "–")),
        number(points[0][1] if points else None) + unit,
        number(points[-1][1] if points else None),
    ]


def texts(found: Found) -> str:
    """Returns how written texts look, and the first of them."""
    rows, shown = [], []
    for place, evaluation in enumerate(found.evaluations, 1):
        for name, look, more in _looks(evaluation):
            rows.append([f'{escape(name)} <a href="#e{place}">[{place}]</a>', *_look(look), *more])
            shown += [(name, text) for text in (evaluation.figures.get("model") or {}).get("first", [])[:1]]
    for run in found.runs:
        for step in dict.fromkeys(sample["step"] for sample in run.samples):
            of_step = [sample["text"] for sample in run.samples if sample["step"] == step]
            look = text_figures([text.split() for text in of_step], "words").as_dict()
            rows.append([escape(f"{run.name}, step {step}"), *_look(look), "–"])
        last = run.samples[-1]["step"] if run.samples else None
        of_last = [sample for sample in run.samples if sample["step"] == last][:_SAMPLES]
        shown += [(f"{run.name}, step {last}: {sample['prompt']}", sample["text"]) for sample in of_last]
    if not rows:
        return ""
    headings = ("texts", "number", "length", "repetition", "distinct 1/2/3", "entropy", "perplexity")
    listed = "".join(f"<h3>{escape(name)}</h3>\n<pre>{escape(text)}</pre>" for name, text in shown)
    note = (
        "Repetition: share of pieces of four tokens that stood in the text before. Entropy of a text's tokens: nats. "
        "Perplexity under the AR source is low for texts that repeat themselves: read it with the entropy beside it."
    )
    return f'<h2>Texts</h2>\n{table(headings, rows)}\n<p class="note">{note}</p>\n{listed}'


def _looks(evaluation: Evaluation) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
    """Yields name, figures and perplexity of each set of texts."""
    found = evaluation.figures
    if evaluation.kind == "texts":
        for name, part in ((evaluation.name, found["model"]), (f"{evaluation.name}, AR source", found["source"])):
            if part is not None:
                yield name, part["look"], [number(part["perplexity"])]
    elif evaluation.kind == "harness":
        for task, look in found.get("texts", {}).items():
            yield f"{evaluation.name}, {task}", look, ["–"]


def _look(look: dict[str, Any]) -> list[str]:
    return [
        str(look["num_texts"]),
        f"{number(look['length'], 1)} {escape(look['unit'])}",
        number(look["repetition"]),
        "/".join(number(share) for share in look["distinct"]),
        number(look["entropy"]),
    ]


def manifests(found: Found) -> str:
    """Returns, for each evaluation and run, all that its figures depend on."""
    parts = []
    for place, evaluation in enumerate(found.evaluations, 1):
        command = f"decausal {without_paths_in(evaluation.arguments)}"
        values = {"command": command, **evaluation.manifest, "model": evaluation.name}
        values |= {"weights": evaluation.model.get("fingerprint") or "not hashed"}
        values |= _recipe(evaluation.model.get("facts") or {})
        parts.append(
            f'<details id="e{place}"><summary>[{place}] <code>{escape(command)}</code></summary>'
            f"{facts(without_paths(values))}</details>"
        )
    for run in found.runs:
        command = "decausal convert --recipe run.yaml"
        values = {"command": command, **{name: value for name, value in run.settings.items() if value is not None}}
        title = escape(f"run {run.name}: {shlex.join(['decausal', 'convert', '--recipe', f'{run.name}/run.yaml'])}")
        parts.append(f"<details><summary>{title}</summary>{facts(without_paths(values))}</details>")
    return "<h2>How each figure was made</h2>\n" + "\n".join(parts) if parts else ""


def _recipe(stored: dict[str, Any]) -> dict[str, Any]:
    """Returns the facts of a conversion that are set, with its recipe."""
    if not stored:
        return {"facts": "an AR model"}
    named = ("source", "source_revision", "layout", "block_size", "causal_context", "shift", "weights", "sampler")
    kept = {name: stored[name] for name in named if stored.get(name) not in (None, {}, [])}
    recipe = {name: value for name, value in stored.get("recipe", {}).items() if value is not None}
    return kept | {"recipe": recipe, "decausal of the conversion": stored.get("decausal_version")}
