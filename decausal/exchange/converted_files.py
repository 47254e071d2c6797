"""A converted model on disk: facts, configuration and tokenizer are in memory, tensors still in their files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from decausal.errors import UserError, first_line
from decausal.exchange.tensor_files import TensorFiles
from decausal.models.adapt import LOADING_ERRORS
from decausal.models.base_files import refuse_links_out, refuse_secrets
from decausal.models.checkpoint import load_converted, save_converted, saved_dtype
from decausal.models.directories import adapter_of
from decausal.models.facts import FACTS_FILE, ConversionFacts, read_facts
from decausal.privacy import without_paths


class ConvertedFiles(NamedTuple):
    """What `open_converted` found."""

    directory: Path
    facts: ConversionFacts
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    tensors: TensorFiles

    @property
    def all_end_ids(self) -> list[int]:
        """Every token that ends a text, those that end answers in training among them."""
        found = eos_token_ids(self.directory, self.config, self.tokenizer)
        return list(dict.fromkeys([*found, *self.facts.end_token_ids]))


@contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
    """Yields a converted model's directory. For a checkpoint with adapters, it is a directory with merged weights.

    Raises:
        UserError: As `load_converted`.
    """
    if not (directory / FACTS_FILE).is_file() or adapter_of(directory) is None:
        yield directory
        return
    model, tokenizer, facts = load_converted(directory)
    with TemporaryDirectory(prefix="decausal-") as merged:
        save_converted(merged, model, tokenizer, facts, dtype=saved_dtype(facts))
        yield Path(merged)


def open_converted(directory: Path) -> ConvertedFiles:
    """Opens a converted model without loading its weights.

    Raises:
        UserError: It is not a converted model, its files are broken, or facts, tokenizer and weights do not match.
    """
    facts = read_facts(directory)
    refuse_links_out(directory)
    refuse_secrets(directory)
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except LOADING_ERRORS as error:
        raise UserError(f"{directory} holds {FACTS_FILE} but cannot be read: {first_line(error)}") from error
    if tokenizer.mask_token_id != facts.mask_token_id:
        raise UserError(
            f"{directory}: {FACTS_FILE} has mask_token_id {facts.mask_token_id}, "
            f"the tokenizer's mask token has id {tokenizer.mask_token_id}"
        )
    if not 0 <= facts.mask_token_id < config.vocab_size:
        raise UserError(
            f"{directory}: {FACTS_FILE} has mask_token_id {facts.mask_token_id}, "
            f"the vocabulary has {config.vocab_size} rows"
        )
    return ConvertedFiles(directory, facts, config, tokenizer, TensorFiles(directory))


def eos_token_ids(directory: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Returns every token that ends a text, from generation_config.json, config.json and the tokenizer, in this order.

    A chat model ends its turns with another token than its documents. Often only generation_config.json names it.
    """
    found: list[int] = []
    with suppress(*LOADING_ERRORS):  # the file may be missing
        found += _as_list(GenerationConfig.from_pretrained(directory).eos_token_id)
    found += _as_list(config.eos_token_id)
    found += _as_list(getattr(tokenizer, "eos_token_id", None))
    return list(dict.fromkeys(found))


def _as_list(ids: int | list[int] | None) -> list[int]:
    if ids is None:
        return []
    return list(ids) if isinstance(ids, list | tuple) else [ids]


def facts_to_hand_on(facts: ConversionFacts) -> ConversionFacts:
    """Returns the facts as an exported model carries them: without the paths of source and data on this machine."""
    names = ("source", "recipe", "earlier_stages")
    return replace(facts, **{name: without_paths(getattr(facts, name)) for name in names})
