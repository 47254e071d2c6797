"""Imports a public diffusion checkpoint as a plain directory with `decausal.json`. None of its code runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PretrainedConfig

from decausal.errors import UserError, first_line
from decausal.exchange.converted_files import eos_token_ids
from decausal.exchange.formats import PublicForm, block_size_of, form_of, mask_token_id_of
from decausal.exchange.mask_token import add_mask_token
from decausal.exchange.public_names import located
from decausal.exchange.sdar import FACTS_KEY
from decausal.exchange.staging import refuse_filled, staged
from decausal.exchange.stock import EMBEDDINGS, HEAD, expected_tensors
from decausal.exchange.tensor_files import Stored, TensorFiles, refuse_other_tensors, write_tensor_files
from decausal.exchange.tokenizer_files import read_json, read_tokenizer
from decausal.models.facts import ConversionFacts, write_facts

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


class Imported(NamedTuple):
    """The result of an import.

    Attributes:
        output_dir: The directory.
        form: The public form that it was read from.
        facts: The facts written to it.
    """

    output_dir: Path
    form: PublicForm
    facts: ConversionFacts


def import_checkpoint(
    model_name_or_path: str | Path,
    output_dir: str | Path,
    *,
    revision: str | None = None,
    block_size: int | None = None,
    mask_token_id: int | None = None,
    ignore_keys: Collection[str] = (),
) -> Imported:
    """Reads a public diffusion checkpoint and writes it in decausal's form, under a stock architecture.

    Only its config.json, tokenizer and safetensors are read. Its code is neither downloaded nor run. Tensors keep their
    type and values, and only one is in memory at a time.

    Args:
        model_name_or_path: A directory or a hub id.
        output_dir: A new or empty directory.
        revision: Branch, tag or commit of a hub id.
        block_size: Replaces the block size in config.json.
        mask_token_id: Replaces the mask token's id in config.json.
        ignore_keys: Keys of config.json that do not change the forward pass.

    Raises:
        UserError: The form is unknown, config.json or tensors hold something that no stock class computes (with names),
            files are missing or broken, or `output_dir` is not empty.
    """
    output_dir = Path(output_dir)
    refuse_filled(output_dir)
    directory, commit = located(str(model_name_or_path), revision)
    config = read_json(directory / "config.json")
    form = form_of(config, directory)
    stock = form.stock(config, ignore_keys)
    facts = _facts(form, config, str(model_name_or_path), commit, block_size, mask_token_id)
    if not 0 <= facts.mask_token_id < stock.vocab_size:
        raise UserError(
            f"mask token id {facts.mask_token_id} is outside the vocabulary of {stock.vocab_size} rows; "
            "give the right one with --mask_token_id"
        )
    tokenizer = read_tokenizer(directory, stock)
    if tokenizer.mask_token_id != facts.mask_token_id:
        add_mask_token(tokenizer, facts.mask_token_id)
    tensors = _tensors(TensorFiles(directory), form, stock, directory)
    _complete(stock, config, tensors)
    with staged(output_dir) as staging:
        write_tensor_files(staging, tensors)
        stock.save_pretrained(staging)
        end_ids = eos_token_ids(directory, stock, tokenizer)
        GenerationConfig(eos_token_id=end_ids or None, pad_token_id=stock.pad_token_id).save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        write_facts(staging, facts)
    return Imported(output_dir, form, facts)


def _facts(
    form: PublicForm,
    config: Mapping[str, Any],
    source: str,
    commit: str | None,
    block_size: int | None,
    mask_token_id: int | None,
) -> ConversionFacts:
    """Returns the facts of the form; where decausal wrote the checkpoint, those that it left in it, but for the
    options."""
    block_size = block_size_of(form, config, block_size)
    mask_token_id = mask_token_id_of(form, config, mask_token_id)
    if FACTS_KEY in config:
        try:
            facts = ConversionFacts(**config[FACTS_KEY])
        except (TypeError, UserError) as error:
            raise UserError(f"config.json holds facts of decausal that cannot be read: {first_line(error)}") from error
        if (facts.layout, facts.shift) == (form.layout, form.shift):
            return replace(facts, block_size=block_size, mask_token_id=mask_token_id)
    return ConversionFacts(
        source=source,
        source_revision=commit,
        layout=form.layout,
        block_size=block_size,
        shift=form.shift,
        mask_token_id=mask_token_id,
        recipe={"imported_as": form.name},
        sampler=dict(form.sampler),
    )


def _tensors(files: TensorFiles, form: PublicForm, stock: PretrainedConfig, directory: Path) -> dict[str, Stored]:
    """Returns the tensors under their stock names, checked against the stock architecture."""
    original: dict[str, str] = {}
    for name in files.names():
        if name.endswith("rotary_emb.inv_freq"):  # these follow from config.json
            continue
        if form.renamed(name) in original:
            raise UserError(f"{directory} holds both {original[form.renamed(name)]} and {name}, which are one tensor")
        original[form.renamed(name)] = name
    shapes = files.shapes()
    found = {name: shapes[old] for name, old in original.items()}
    if stock.tie_word_embeddings and HEAD in found:
        if not torch.equal(files.load(original[HEAD]), files.load(original[EMBEDDINGS])):
            raise UserError(
                f"{directory}: config.json ties head and embeddings, but {original[HEAD]} is another matrix"
            )
        del found[HEAD]
    expected = expected_tensors(stock)
    # Errors name tensors like the checkpoint.
    refuse_other_tensors(
        {original[name]: shape for name, shape in found.items()},
        {original.get(name, name): shape for name, shape in expected.items()},
        directory,
    )
    return {name: files.stored(original[name]) for name in expected}


def _complete(stock: PretrainedConfig, config: Mapping[str, Any], tensors: Mapping[str, Stored]) -> None:
    """Adds the class, the type and the special tokens to the stock configuration."""
    stock.architectures = [ARCHITECTURES[stock.model_type]]
    stock.dtype = tensors[EMBEDDINGS].load().dtype
    stock.is_causal = False
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(stock, name, config.get(name))
