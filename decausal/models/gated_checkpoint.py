"""A gated conversion on disk: the source's unchanged files, and beside them an adapter that acts at masks.

    config.json, weights, tokenizer     the source's, byte for byte; not there where the facts refer to the hub
    decausal.json                       the facts, with the hash of each of these files
    draft/                              a PEFT adapter, the mask token's row, and the draft head if there is one

In the main directory, `from_pretrained` would find the adapter and apply it to every token.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from decausal.errors import UserError
from decausal.files import follow_umask, write_whole
from decausal.models.adapt import load_base
from decausal.models.adapters import with_adapter
from decausal.models.base_files import copy_base, refuse_other_base
from decausal.models.directories import ADAPTER_FILE
from decausal.models.draft_head import (
    DRAFT_HEAD_FILE,
    add_draft_head,
    save_draft_head,
)
from decausal.models.facts import DRAFT, FACTS_FILE, ConversionFacts, write_facts
from decausal.models.gated import install_gate
from decausal.models.mask_row import required_mask_row, save_mask_row
from decausal.models.names import located, refuse_as_base


def source_directory(name: str, commit: str | None) -> Path:
    """Returns the directory with the files of an AR model, which a gated conversion keeps.

    Args:
        name: A directory, a hub id or an embedded model's name.
        commit: On the hub.

    Raises:
        UserError: There is no such model, or it has no complete files of its own.
    """
    path, commit = located(name, commit, may_be_converted=True, merge_adapter=True)
    refuse_as_base(name, path, commit)
    if commit is None:
        return Path(path)
    from decausal.hub import fetch

    return fetch(path, commit)[0]


def save_gated(
    directory: Path, model: nn.Module, state_dict: dict[str, Tensor], facts: ConversionFacts, base: Path
) -> None:
    """Writes a gated conversion: the source's files, the adapter, and last the facts.

    Args:
        directory: Made if it does not exist.
        model: A PEFT wrapper around the source, gated.
        state_dict: Its weights.
        facts: With the hashes of the source's files; with a reference, the files are left out.
        base: Where the source's files are.
    """
    draft = directory / DRAFT
    (directory / FACTS_FILE).unlink(missing_ok=True)
    if draft.exists():  # what a killed run left of it
        shutil.rmtree(draft)
    draft.mkdir(parents=True)
    if facts.base_reference is None:
        copy_base(base, directory)
        refuse_other_base(directory, facts.base, str(directory))
    model.save_pretrained(draft, state_dict=state_dict, save_embedding_layers=False)
    (draft / "README.md").unlink(missing_ok=True)  # PEFT's card, which is empty
    save_mask_row(state_dict, draft)
    save_draft_head(model, state_dict, draft)
    follow_umask(draft.glob("*.safetensors"))
    settings = json.loads((draft / ADAPTER_FILE).read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = facts.source if facts.source_revision else None  # no local paths
    write_whole(draft / ADAPTER_FILE, json.dumps(settings, indent=2) + "\n")
    write_facts(directory, facts)


def load_gated(
    path: Path, facts: ConversionFacts, dtype: torch.dtype, attn_implementation: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a gated conversion, or a checkpoint of its run: the source with the gated adapter.

    Raises:
        UserError: The source is missing or another one, or the adapter does not fit it.
    """
    draft = path / DRAFT if (path / DRAFT).is_dir() else path
    base = base_of(path, facts)
    refuse_other_base(base, facts.base, str(path))
    model, tokenizer = load_base(base, dtype=dtype, attn_implementation=attn_implementation)
    num_rows = len(model.get_input_embeddings().weight)
    if facts.mask_token_id < num_rows:
        raise UserError(
            f"{path}: {FACTS_FILE} has mask_token_id {facts.mask_token_id}, and the weights have {num_rows} embedding "
            "rows: a gated model's mask has none of them"
        )
    model = with_adapter(model, draft)
    install_gate(model, facts.mask_token_id, required_mask_row(draft).to(dtype))
    if facts.draft_head:
        if not (draft / DRAFT_HEAD_FILE).is_file():
            raise UserError(f"{draft} lacks {DRAFT_HEAD_FILE}, the draft head; fetch it again")
        add_draft_head(model, draft)
    model.config.is_causal = False
    return model, tokenizer


def base_of(path: Path, facts: ConversionFacts) -> Path:
    """Returns the directory of the source's files: the conversion's own, or the one its facts refer to.

    Raises:
        UserError: They are not available.
    """
    if (path / "config.json").is_file():
        return path
    if facts.base_reference is None:  # a checkpoint of a run
        return source_directory(facts.source, facts.source_revision)
    name, _, commit = facts.base_reference.partition("@")
    return source_directory(name, commit)
