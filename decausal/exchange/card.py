"""The model card: README.md with the front matter that the hub reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from decausal.errors import UserError
from decausal.files import parsed_json
from decausal.models.facts import ConversionFacts
from decausal.privacy import is_public_name, without_paths
from decausal.sampling.settings.of_model import settings_for

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CARD = "README.md"


@dataclass(frozen=True)
class ModelCard:
    """What a card says apart from the facts of the conversion.

    Attributes:
        name: The card's title.
        license: Identifier on the hub ("apache-2.0"), or None.
        evaluation: The file that `results` come from.
        results: Measured figures by name, see `read_evaluation`.
    """

    name: str | None = None
    license: str | None = None
    evaluation: str | None = None
    results: tuple[tuple[str, str], ...] = ()

    def text(
        self,
        facts: ConversionFacts,
        config: PretrainedConfig,
        *,
        form: str = "hf",
        commands: dict[str, str] | None = None,
    ) -> str:
        """Returns the whole card.

        Args:
            facts: The model's facts.
            config: The stock model's configuration.
            form: "hf" or "sdar", which decides how to load it.
            commands: How to serve it, by the engine's name.
        """
        title = self.name or f"{_shown(facts.source)}, converted to a diffusion language model"
        sections = [
            f"---\n{yaml.safe_dump(self._front_matter(facts), sort_keys=False)}---\n\n# {title}",
            _what_it_is(facts, config),
            _how_to_load(facts, form, commands or {}),
            _table("Sampler", "Default settings, stored with the weights.", _sampler(facts)),
            self._evaluation(),
            *_stages(facts),
        ]
        return "\n\n".join(section for section in sections if section) + "\n"

    def _front_matter(self, facts: ConversionFacts) -> dict[str, Any]:
        front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
        if self.license is not None:
            front["license"] = self.license
        if names_base_model(facts):
            front["base_model"] = facts.source
            front["base_model_relation"] = "finetune"
        data = [name for recipe in (*facts.earlier_stages, facts.recipe) for name in _as_list(recipe.get("data"))]
        datasets = [name.partition(":")[0] for name in data if is_public_name(name)]
        if datasets:
            front["datasets"] = list(dict.fromkeys(datasets))
        front["tags"] = ["diffusion-language-model", "masked-diffusion", "decausal", f"layout-{facts.layout}"]
        return front

    def _evaluation(self) -> str:
        if not self.results:
            return "## Evaluation\n\nNot measured for this card."
        return _table("Evaluation", f"From `{_shown(self.evaluation)}`.", dict(self.results))


def read_evaluation(path: str | Path) -> tuple[tuple[str, str], ...]:
    """Reads the figures of an evaluation: a JSON object as `decausal eval ... --json` prints it.

    Returns:
        Names and values, with standard errors if the file has them. Nested names are joined by dots.

    Raises:
        UserError: There is no such file, or it does not hold figures.
    """
    try:
        record = parsed_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"evaluation {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(
            f"evaluation {path} is not JSON: {error}; give what `decausal eval ... --json` prints"
        ) from error
    figures = dict(_figures(record)) if isinstance(record, dict) else {}
    shown = []
    for name, value in figures.items():
        if name.endswith("standard_error"):
            continue
        spread = figures.get(f"{name}_standard_error", figures.get(f"{_stem(name)}_standard_error"))
        shown.append((name, _number(value) + (f" ± {_number(spread)}" if spread is not None else "")))
    if not shown:
        raise UserError(f"evaluation {path} holds no figures; give what `decausal eval ... --json` prints")
    return tuple(shown)


def names_base_model(facts: ConversionFacts) -> bool:
    """Returns whether the source is on the hub, so that its commit is known. A path may look like a hub id."""
    return facts.source_revision is not None and is_public_name(facts.source)


def _what_it_is(facts: ConversionFacts, config: PretrainedConfig) -> str:
    reads = {
        "bidirectional": "every token reads the whole text",
        "block": f"text is written in blocks of {facts.block_size} tokens, each read in both directions",
        "causal": "every token reads what precedes it",
    }[facts.layout]
    if facts.is_gated:
        return _what_gated_is(facts, config)
    predicts = "the state before a token predicts it" if facts.shift else "the state at a token's place predicts it"
    revision = f" (revision `{facts.source_revision}`)" if facts.source_revision else ""
    return (
        f"A masked diffusion language model made from `{_shown(facts.source)}`{revision} with decausal "
        f"{facts.decausal_version}. Weights have the names and shapes of a stock `{config.model_type}` model.\n\n"
        "| fact | value |\n|---|---|\n"
        f"| attention layout | `{facts.layout}`: {reads} |\n"
        f"| shift | {facts.shift}: {predicts} |\n"
        f"| mask token | id {facts.mask_token_id} |\n"
        f"| vocabulary | {config.vocab_size} rows |"
    )


def _what_gated_is(facts: ConversionFacts, config: PretrainedConfig) -> str:
    revision = f" (revision `{facts.source_revision}`)" if facts.source_revision else ""
    where = (
        "in this directory, byte for byte" if facts.base_reference is None else f"`{facts.base_reference}` on the hub"
    )
    return (
        f"`{_shown(facts.source)}`{revision}, and an adapter that drafts several tokens at once, made with decausal "
        f"{facts.decausal_version}. The adapter acts at mask tokens alone; the model itself verifies every draft, so "
        "that what is written is its own text.\n\n"
        "| fact | value |\n|---|---|\n"
        f"| model | a stock `{config.model_type}`, {where} |\n"
        f"| draft | LoRA{', a draft head' if facts.draft_head else ''} and the mask token's row, in `draft/` |\n"
        f"| drafts | up to {facts.block_size} tokens in a pass |\n"
        f"| masks of a group read | {'earlier ones' if facts.causal_groups else 'each other'} |\n"
        f"| mask token | id {facts.mask_token_id}, outside the vocabulary |"
    )


def _how_to_load(facts: ConversionFacts, form: str, commands: dict[str, str]) -> str:
    if form == "sdar":
        served = "".join(f"\nWith {engine}:\n\n```bash\n{command}\n```\n" for engine, command in commands.items())
        return (
            "## Use\n\nThe files are in SDAR's form, which block diffusion engines read.\n"
            f"{served}\nBack into decausal's form: `decausal import DIR --output_dir OUT`."
        )
    if facts.is_gated:
        return _how_to_load_gated(facts)
    if facts.layout == "bidirectional":
        stock = "reads in both directions (`config.is_causal` is false)"
    else:
        stock = f"has the weights; the masks of the layout `{facts.layout}` are decausal's"
    return (
        "## Use\n\n```python\nimport decausal\n\n"
        'model = decausal.load("DIR")  # this directory, or its id on the hub\n'
        'print(model.generate("Once upon a time", max_new_tokens=64).text)\n```\n\n'
        "```bash\ndecausal generate DIR 'Once upon a time'\n```\n\n"
        "The facts above are in `decausal.json`, so neither takes a flag for them. In plain transformers\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("DIR")\n'
        'tokenizer = AutoTokenizer.from_pretrained("DIR")\n```\n\n'
        f"loads the stock class, which {stock}. `model.generate` of transformers writes from left to right and is not "
        "what this model was trained for."
    )


def _how_to_load_gated(facts: ConversionFacts) -> str:
    plain = (
        "Without decausal the directory is the AR model itself, for transformers and every engine that serves it."
        if facts.base_reference is None
        else "Without decausal load the AR model from the hub; this repository holds the draft alone."
    )
    return (
        "## Use\n\n```python\nimport decausal\n\n"
        'model = decausal.load("DIR")  # this directory, or its id on the hub\n'
        'print(model.generate("Once upon a time", max_new_tokens=64).text)\n```\n\n'
        f"```bash\ndecausal generate DIR 'Once upon a time'\n```\n\n{plain}"
    )


def _sampler(facts: ConversionFacts) -> dict[str, str]:
    settings = settings_for(facts).in_effect()
    return {name: str(value) for name, value in settings.items() if value is not None}


def _stages(facts: ConversionFacts) -> list[str]:
    tables = []
    for number, recipe in enumerate([*facts.earlier_stages, facts.recipe], start=1):
        title = f"Training, stage {number}" if facts.earlier_stages else "Training"
        values = {name: _shown(value) for name, value in recipe.items() if value is not None}
        tables.append(_table(title, "The recipe as resolved.", values))
    return tables


def _table(title: str, introduction: str, rows: dict[str, str]) -> str:
    if not rows:
        return ""
    lines = "".join(f"| `{name}` | {_escaped(value)} |\n" for name, value in rows.items())
    return f"## {title}\n\n{introduction}\n\n| name | value |\n|---|---|\n{lines}".rstrip()


def _shown(value: object) -> str:
    """Returns a value as the card prints it."""
    value = without_paths(value)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _as_list(value: object) -> list[str]:
    if value is None:
        return []
    return [str(part) for part in value] if isinstance(value, list | tuple) else [str(value)]


def _figures(record: dict[str, Any], prefix: str = "", depth: int = 2) -> list[tuple[str, int | float]]:
    found: list[tuple[str, int | float]] = []
    for name, value in record.items():
        if isinstance(value, dict) and depth:
            found += _figures(value, f"{prefix}{name}.", depth - 1)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((f"{prefix}{name}", value))
    return found


def _stem(name: str) -> str:
    return name.removesuffix("_per_token")


def _number(value: int | float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
