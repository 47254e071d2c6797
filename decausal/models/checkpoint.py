"""Converted models on disk: a plain Hugging Face directory, and `decausal.json` with the facts of the conversion."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from decausal.data.corpus import EMBEDDED_MODELS, embedded_model_path
from decausal.diffusion.layout import Layout
from decausal.errors import UserError, first_line, nearest
from decausal.files import write_whole
from decausal.hub import fetch, is_hub_id
from decausal.models.adapt import FACTS_FILE, LOADING_ERRORS
from decausal.models.architecture import attention_implementation
from decausal.models.mask_row import fold_mask_row
from decausal.secrets import without_secrets

SCHEMA_VERSION = 1


def _installed_version() -> str:
    try:
        return version("decausal")
    except PackageNotFoundError:
        return "unknown"


@dataclass(frozen=True)
class ConversionFacts:
    """What sampler, evaluator and exporter must know of a converted model; they take no flags for it.

    Attributes:
        source: the autoregressive model: directory, hub id, or "tiny".
        source_revision: its commit on the hub, if it came from there.
        layout: kind of attention layout, see `decausal.diffusion.layout.Layout`.
        block_size: tokens per block, for the layout "block" only.
        causal_context: for the layout "block" only: finished tokens read each other causally.
        shift: 1 where the state at i - 1 predicts token i, 0 where the state at i does.
        mask_token_id: the id that stands for a token not yet known.
        noise_schedule: "linear": a token is masked with probability t.
        recipe: the recipe as resolved; its revision is the commit of the model that the run began with.
        earlier_stages: recipes of the runs that the weights went through before that one, oldest first.
        decausal_version: version that converted the model.
        sampler: default settings of the sampler.
        end_token_ids: tokens that end an answer of the chat template; older records have none.
        schema_version: version of this record.
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
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        _ = self.attention
        if self.shift not in (0, 1):
            raise UserError(f"shift is {self.shift}; accepted: 0, 1")
        if self.noise_schedule != "linear":
            raise UserError(f"noise_schedule is '{self.noise_schedule}'; accepted: linear")

    @property
    def attention(self) -> Layout:
        """The layout as the rest of the library takes it."""
        return Layout(self.layout, self.block_size, self.causal_context)


class Converted(NamedTuple):
    """A converted model as loaded."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    facts: ConversionFacts


def write_facts(directory: str | Path, facts: ConversionFacts) -> None:
    """Writes `decausal.json` in one step, without any secret of the recipe."""
    record = without_secrets(asdict(facts))
    write_whole(Path(directory) / FACTS_FILE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def read_facts(directory: str | Path) -> ConversionFacts:
    """Reads `decausal.json`.

    Raises:
        UserError: when it is missing, broken, of a newer schema, or lacks a fact.
    """
    path = Path(directory) / FACTS_FILE
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} does not exist; give the directory of a converted model")
    if not path.exists():
        raise UserError(
            f"{path.parent} is not a decausal checkpoint (it holds no {FACTS_FILE}); "
            f"convert it first: decausal convert {path.parent} --data DATA --output_dir OUT"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; convert the model again") from error
    return _checked_facts(record, path)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # to Python, true is a number


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
    "source_revision": (lambda value: value is None or _is_text(value), "text, or null"),
    "noise_schedule": (_is_text, "text"),
    "recipe": (_is_table, "a table"),
    "decausal_version": (_is_text, "text"),
    "sampler": (_is_table, "a table"),
    "earlier_stages": (lambda value: isinstance(value, list) and all(map(_is_table, value)), "a list of tables"),
    "end_token_ids": (lambda value: isinstance(value, list) and all(map(_is_whole, value)), "a list of whole numbers"),
    "schema_version": (_is_whole, "a whole number"),
}
"""What each fact may be in a file that anybody may have written."""


def _checked_facts(record: object, path: Path) -> ConversionFacts:
    if not isinstance(record, dict):
        raise UserError(f"{path} holds no table of facts; convert the model again")
    schema = record.get("schema_version")
    if not _is_whole(schema):
        raise UserError(f"{path} lacks 'schema_version'; convert the model again")
    if schema > SCHEMA_VERSION:
        raise UserError(f"{path} has schema {schema}, this decausal reads up to {SCHEMA_VERSION}; upgrade decausal")
    accepted = {fact.name: fact for fact in fields(ConversionFacts)}
    for key in record:
        if key not in accepted:
            raise UserError(f"{path} holds '{key}', which is no fact of a conversion{nearest(key, accepted)}")
    for name, fact in accepted.items():
        if name not in record and fact.default is MISSING and fact.default_factory is MISSING:
            raise UserError(f"{path} lacks '{name}'; convert the model again")
    for name, value in record.items():
        accepts, described = _TYPES[name]
        if not accepts(value):
            shown = repr(value)
            raise UserError(f"{path} has {name} {shown if len(shown) < 80 else '...'}; expected {described}")
    try:
        return ConversionFacts(**without_secrets(record))  # earlier versions recorded them
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def save_converted(
    directory: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: ConversionFacts,
    *,
    state_dict: dict[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Saves weights, configuration and tokenizer as any transformers model, then the facts.

    The facts come last, and old ones go first: a directory with `decausal.json` is whole.

    Args:
        directory: made if it does not exist.
        model: the stock model (merge adapters first). A separately trained mask row goes back into its matrix.
        tokenizer: its tokenizer, with the mask token.
        facts: the facts of the conversion.
        state_dict: the weights, where they had to be gathered from a sharded model; None: the model's own.
        dtype: floating-point type to save in; None: as the weights are. The model in memory keeps its type.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / FACTS_FILE).unlink(missing_ok=True)
    state_dict = fold_mask_row(model, model.state_dict() if state_dict is None else state_dict)
    if dtype is not None:
        state_dict = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state_dict.items()
        }
    model.save_pretrained(directory, state_dict=state_dict)
    if dtype is not None:
        _state_dtype(directory / "config.json", dtype)
    tokenizer.save_pretrained(directory)
    write_facts(directory, facts)


def _state_dtype(path: Path, dtype: torch.dtype) -> None:
    """Corrects the type that transformers wrote: that of the model in memory, not of the weights on disk."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_whole(path, json.dumps(config, indent=2) + "\n")


def is_converted(model_name_or_path: str | Path, revision: str | None = None) -> bool:
    """Whether a directory, or a repository on the hub, holds the facts of a conversion.

    Raises:
        UserError: the hub does not give what has the form of its ids.
    """
    return (_described(model_name_or_path, revision) / FACTS_FILE).is_file()


def facts_of(model_name_or_path: str | Path, revision: str | None = None) -> ConversionFacts | None:
    """Reads the facts of a converted model, a directory or a repository on the hub; None where it is not converted.

    Raises:
        UserError: as `read_facts`, and when the hub does not give what has the form of its ids.
    """
    path = _described(model_name_or_path, revision)
    return read_facts(path) if (path / FACTS_FILE).is_file() else None


def _described(model_name_or_path: str | Path, revision: str | None) -> Path:
    """A directory that holds what is told of a model, though not always its weights."""
    if str(model_name_or_path) in EMBEDDED_MODELS:
        return embedded_model_path(str(model_name_or_path))
    path = Path(model_name_or_path).expanduser()
    if not path.exists() and is_hub_id(str(model_name_or_path)):
        path, _ = fetch(str(model_name_or_path), revision, ("config.json", FACTS_FILE), is_shown=False)
    return path


def load_converted(
    model_name_or_path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    attn_implementation: str | None = None,
) -> Converted:
    """Loads a converted model in eval mode, after checking that its facts and its files tell the same story.

    Args:
        model_name_or_path: a directory or a hub id.
        dtype: type of the weights.
        device: where they go.
        revision: branch, tag or commit of a hub id.
        attn_implementation: "sdpa" or "eager"; None: what the architecture needs.

    Raises:
        UserError: when there is no converted model of that name, or facts and weights disagree; names both.
    """
    path = _directory(model_name_or_path, revision)
    facts = read_facts(path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation or attention_implementation(config),
            trust_remote_code=False,
            output_loading_info=True,
        )
    except LOADING_ERRORS as error:
        raise UserError(f"{path} holds {FACTS_FILE} but its model cannot be loaded: {first_line(error)}") from error
    if info["missing_keys"]:
        raise UserError(f"{path} holds {FACTS_FILE} but its weights lack {min(info['missing_keys'])}")
    _refuse_disagreement(path, facts, model, tokenizer)
    return Converted(model.eval().to(device), tokenizer, facts)


def _directory(model_name_or_path: str | Path, revision: str | None) -> Path:
    name = str(model_name_or_path)
    path = Path(name).expanduser()
    if path.exists() or not is_hub_id(name):
        return path
    if not is_converted(name, revision):
        raise UserError(
            f"{name} on the hub is not a decausal checkpoint (it holds no {FACTS_FILE}); "
            f"convert it first: decausal convert {name} --data DATA --output_dir OUT"
        )
    return fetch(name, revision)[0]


def _refuse_disagreement(
    path: Path, facts: ConversionFacts, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    num_rows = model.get_input_embeddings().weight.shape[0]
    if not 0 <= facts.mask_token_id < num_rows:
        raise UserError(
            f"{path}: {FACTS_FILE} has mask_token_id {facts.mask_token_id}, the weights have {num_rows} embedding rows"
        )
    if tokenizer.mask_token_id != facts.mask_token_id:
        raise UserError(
            f"{path}: {FACTS_FILE} has mask_token_id {facts.mask_token_id}, "
            f"the tokenizer's mask token has id {tokenizer.mask_token_id}"
        )
    is_causal = getattr(model.config, "is_causal", True)
    if is_causal != (facts.layout == "causal"):
        raise UserError(f"{path}: {FACTS_FILE} has layout '{facts.layout}', config.json has is_causal {is_causal}")
