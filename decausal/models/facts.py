"""`decausal.json`: the facts of a converted model. This file is light, since verbs read the facts at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from decausal.diffusion.layout_kinds import Layout
from decausal.errors import UserError, nearest
from decausal.files import FACTS_FILE, parsed_json, write_whole
from decausal.privacy import without_secrets

DRAFT = "draft"
"""The directory of a gated conversion's adapter."""
SCHEMA_VERSION = 1
MASK_ROW_FILE = "mask_row.safetensors"
"""The mask token's row, beside a draft or in the checkpoint of a LoRA run."""
WEIGHTS = ("shared", "gated")


def _installed_version() -> str:
    try:
        return version("decausal")
    except PackageNotFoundError:
        return "unknown"


@dataclass(frozen=True)
class ConversionFacts:
    """What sampler, evaluator and exporter must know about a converted model. They have no flags for it.

    Attributes:
        source: The autoregressive model: directory, hub id, or "tiny".
        source_revision: Its commit on the hub, if it came from there.
        layout: Kind of attention layout, see `decausal.diffusion.layout.Layout`.
        block_size: Tokens per block, for the layout "block" only.
        causal_context: For the layout "block" only: finished tokens read each other causally.
        causal_groups: For the layout "block" only: masks of a block read no later ones of it.
        weights: "shared", or "gated": an adapter and the mask token's row act only at masks, and everything else is the
            source, see `decausal.models.gated`.
        draft_head: For gated weights: a draft head joins each draft with the one before it, see
            `decausal.models.draft_head`.
        base: For gated weights: SHA-256 of each file of the source, by name.
        base_reference: For gated weights whose source is not in the directory: its id on the hub, "@" and its commit.
        shift: 1 if the state at i - 1 predicts token i, 0 if the state at i does.
        mask_token_id: The id that stands for an unknown token.
        noise_schedule: "linear": a token is masked with probability t.
        recipe: The resolved recipe. Its revision is the commit of the model that the run started from.
        earlier_stages: Recipes of earlier runs on these weights, oldest first.
        decausal_version: Version that converted the model.
        sampler: Default settings of the sampler.
        end_token_ids: Tokens that end an answer of the chat template. Older records have none.
        schema_version: Version of this record.
    """

    source: str
    layout: str
    shift: int
    mask_token_id: int
    block_size: int | None = None
    causal_context: bool = False
    source_revision: str | None = None
    noise_schedule: str = "linear"
    recipe: dict[str, Any] = field(default_factory=dict)
    decausal_version: str = field(default_factory=_installed_version)
    sampler: dict[str, Any] = field(default_factory=dict)
    earlier_stages: list[dict[str, Any]] = field(default_factory=list)
    end_token_ids: list[int] = field(default_factory=list)
    causal_groups: bool = False
    weights: str = "shared"
    draft_head: bool = False
    base: dict[str, str] = field(default_factory=dict)
    base_reference: str | None = None
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        _ = self.attention
        if self.shift not in (0, 1):
            raise UserError(f"shift is {self.shift}; accepted: 0, 1")
        if self.noise_schedule != "linear":
            raise UserError(f"noise_schedule is '{self.noise_schedule}'; accepted: linear")
        if self.weights not in WEIGHTS:
            raise UserError(
                f"weights are '{self.weights}'{nearest(self.weights, WEIGHTS)}; accepted: {', '.join(WEIGHTS)}"
            )
        if self.is_gated and not (self.layout == "block" and self.causal_context and self.shift == 1):
            raise UserError("gated weights need layout 'block' with causal_context and shift 1: the source is causal")
        if self.draft_head and not self.is_gated:
            raise UserError("a draft head needs gated weights: without them it has no directory")

    @property
    def attention(self) -> Layout:
        """The layout as an object."""
        return Layout(self.layout, self.block_size, self.causal_context, self.causal_groups)

    @property
    def is_gated(self) -> bool:
        """Whether the source's own weights read everything except masks."""
        return self.weights == "gated"

    def shared(self) -> ConversionFacts:
        """Returns the facts of a model whose own weights read masks too: no adapters for them, and no draft head."""
        return replace(self, weights="shared", draft_head=False)

    @property
    def only_drafts(self) -> bool:
        """Whether masks only make drafts, which the causal model verifies, and cannot denoise."""
        return self.is_gated or self.causal_groups


def write_facts(directory: str | Path, facts: ConversionFacts) -> None:
    """Writes `decausal.json` in one step, without secrets of the recipe."""
    record = without_secrets(asdict(facts))
    write_whole(Path(directory) / FACTS_FILE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def read_facts(directory: str | Path) -> ConversionFacts:
    """Reads `decausal.json`.

    Raises:
        UserError: When it is missing, broken, of a newer schema, or lacks a fact.
    """
    path = Path(directory) / FACTS_FILE
    if path.parent.is_file():
        raise UserError(f"{path.parent} is a file; give the directory of a converted model")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} does not exist; give the directory of a converted model")
    if not path.exists():
        raise UserError(not_converted(str(path.parent)))
    try:
        record = parsed_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; convert the model again") from error
    return _checked_facts(record, path)


def not_converted(name: str) -> str:
    """Returns the message for a model without facts, whose name may end with " on the hub"."""
    return (
        f"{name} is not a decausal checkpoint (it holds no {FACTS_FILE}); "
        f"convert it first: decausal convert {name.removesuffix(' on the hub')} --data DATA --output_dir OUT"
    )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # in Python, true is a number


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_table(value: object) -> bool:
    return isinstance(value, dict)


_TYPES: dict[str, tuple[Callable[[object], bool], str]] = {
    "source": (_is_text, "text"),
    "layout": (_is_text, "text"),
    "shift": (_is_whole, "a whole number"),
    "mask_token_id": (_is_whole, "a whole number"),
    "block_size": (lambda value: value is None or _is_whole(value), "a whole number, or null"),
    "causal_context": (lambda value: isinstance(value, bool), "true or false"),
    "causal_groups": (lambda value: isinstance(value, bool), "true or false"),
    "weights": (_is_text, "text"),
    "draft_head": (lambda value: isinstance(value, bool), "true or false"),
    "base": (lambda value: _is_table(value) and all(map(_is_text, value.values())), "a table of hashes"),
    "base_reference": (lambda value: value is None or _is_text(value), "text, or null"),
    "source_revision": (lambda value: value is None or _is_text(value), "text, or null"),
    "noise_schedule": (_is_text, "text"),
    "recipe": (_is_table, "a table"),
    "decausal_version": (_is_text, "text"),
    "sampler": (_is_table, "a table"),
    "earlier_stages": (lambda value: isinstance(value, list) and all(map(_is_table, value)), "a list of tables"),
    "end_token_ids": (lambda value: isinstance(value, list) and all(map(_is_whole, value)), "a list of whole numbers"),
    "schema_version": (_is_whole, "a whole number"),
}
"""What each fact may be. The file may come from anybody."""


def _checked_facts(record: object, path: Path) -> ConversionFacts:
    if not isinstance(record, dict):
        raise UserError(f"{path} holds no table of facts; convert the model again")
    if "schema_version" not in record:
        raise UserError(f"{path} lacks 'schema_version'; convert the model again")
    schema = record["schema_version"]
    if _is_whole(schema) and schema > SCHEMA_VERSION:  # its facts may be others
        raise UserError(f"{path} has schema {schema}, this decausal reads up to {SCHEMA_VERSION}; upgrade decausal")
    accepted = {fact.name: fact for fact in fields(ConversionFacts)}
    for key in record:
        if key not in accepted:
            raise UserError(f"{path} holds '{key}', which is not a fact of a conversion{nearest(key, accepted)}")
    for name, fact in accepted.items():
        if name not in record and fact.default is MISSING and fact.default_factory is MISSING:
            raise UserError(f"{path} lacks '{name}'; convert the model again")
    for name, value in record.items():
        accepts, described = _TYPES[name]
        if not accepts(value):
            shown = json.dumps(value)
            raise UserError(f"{path} has {name} {shown if len(shown) < 80 else '...'}; expected {described}")
    try:
        return ConversionFacts(**without_secrets(record))  # earlier versions recorded them
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
