"""Converted models on disk: a plain Hugging Face directory, and `decausal.json` with the facts of the conversion."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from decausal.diffusion.layout import Layout
from decausal.errors import UserError, first_line
from decausal.files import follow_umask, write_whole
from decausal.models.adapt import LOADING_ERRORS, adapt, forget_private, load_source, source_dtype, unreadable
from decausal.models.adapters import merged
from decausal.models.architecture import attention_implementation
from decausal.models.casting import cast_weights
from decausal.models.directories import Adapter, adapter_of
from decausal.models.facts import FACTS_FILE, ConversionFacts, read_facts, write_facts
from decausal.models.gated_checkpoint import load_gated
from decausal.models.mask_row import fold_mask_row, put_mask_row
from decausal.models.names import converted_directory, is_converted


class Converted(NamedTuple):
    """A converted model as loaded."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    facts: ConversionFacts


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

    Old facts are removed first, and new ones are written last, so a directory with `decausal.json` is complete.

    Args:
        directory: Made if it does not exist.
        model: The stock model (merge adapters first). A separately trained mask row goes back into its matrix.
        tokenizer: Its tokenizer, with the mask token.
        facts: The facts of the conversion.
        state_dict: The weights, if they were gathered from a sharded model. None: the model's own.
        dtype: Floating-point type to save in. None: the weights' own. The model in memory keeps its type.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / FACTS_FILE).unlink(missing_ok=True)
    state_dict = fold_mask_row(model, model.state_dict() if state_dict is None else state_dict)
    if dtype is not None:
        state_dict = _cast(state_dict, dtype)
    with _without_bars():
        model.save_pretrained(directory, state_dict=state_dict)
    if dtype is not None:
        _state_dtype(directory / "config.json", dtype)
    tokenizer.save_pretrained(directory)
    follow_umask(directory.glob("*.safetensors"))
    write_facts(directory, facts)


def saved_dtype(facts: ConversionFacts) -> torch.dtype:
    """Returns the dtype in which the run of these facts writes its final weights."""
    name, revision = facts.recipe.get("model_name_or_path", facts.source), facts.recipe.get("revision")
    return dtype_to_save(facts.recipe.get("save_dtype", "source"), name, revision)


def dtype_to_save(save_dtype: str, model_name_or_path: str, revision: str | None) -> torch.dtype:
    """Returns the dtype of the setting `save_dtype`, for a run that starts from a model."""
    if save_dtype == "source":
        return source_dtype(model_name_or_path, revision)
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[save_dtype]


def _cast(state_dict: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Casts each tensor once, even with several names, because transformers recognises tied weights by their memory."""
    cast: dict[tuple[Any, ...], torch.Tensor] = {}
    found = {}
    for name, tensor in state_dict.items():
        memory = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else (name,)
        if memory not in cast:
            cast[memory] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        found[name] = cast[memory]
    return found


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hides transformers' bar of files written, which shows without a terminal too."""
    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bars:
            logging.enable_progress_bar()


def _state_dtype(path: Path, dtype: torch.dtype) -> None:
    """Corrects the dtype in the configuration: transformers writes that of the model in memory, not of the files."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_whole(path, json.dumps(config, indent=2) + "\n")


def load_converted(
    model_name_or_path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    attn_implementation: str | None = None,
) -> Converted:
    """Loads a converted model in eval mode, after checking that its facts and files match.

    Args:
        model_name_or_path: A directory or a hub id. Adapters in a run's checkpoint are merged into their base.
        dtype: Type of the weights.
        device: Where they go.
        revision: Branch, tag or commit of a hub id.
        attn_implementation: "sdpa" or "eager"; None: what the architecture needs.

    Raises:
        UserError: When there is no converted model of that name, or facts and weights do not match.
    """
    path = converted_directory(model_name_or_path, revision)
    facts = read_facts(path)
    if facts.is_gated:
        model, tokenizer = load_gated(path, facts, dtype, attn_implementation)
        count_as_ends(model, tokenizer, facts.end_token_ids)
        return Converted(model.eval().to(device), tokenizer, facts)
    adapter = adapter_of(path)
    if adapter is not None:
        return _with_adapter(path, facts, adapter, dtype, device, attn_implementation)
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
        raise UserError(f"{path} holds {FACTS_FILE} but its model cannot be loaded: {unreadable(error)}") from error
    if info["missing_keys"]:
        raise UserError(f"{path} holds {FACTS_FILE} but its weights lack {min(info['missing_keys'])}")
    forget_private(path, model, tokenizer)
    _refuse_disagreement(path, facts, model, tokenizer)
    return Converted(model.eval().to(device), tokenizer, facts)


def _with_adapter(
    path: Path,
    facts: ConversionFacts,
    adapter: Adapter,
    dtype: torch.dtype,
    device: torch.device | str,
    attn_implementation: str | None,
) -> Converted:
    """Loads a checkpoint of a run that trains adapters: the model it started from, with the adapters."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if is_converted(adapter.base, adapter.revision):
            model, base_tokenizer, _ = load_converted(
                adapter.base, revision=adapter.revision, attn_implementation=attn_implementation
            )
        else:
            model, base_tokenizer = load_source(
                adapter.base, revision=adapter.revision, attn_implementation=attn_implementation, merge_adapter=True
            )
    except UserError as error:
        raise UserError(f"{path} holds adapters on {adapter.base}, which cannot be loaded: {error}") from error
    except LOADING_ERRORS as error:
        raise UserError(f"cannot load the tokenizer of {path}: {first_line(error)}") from error
    forget_private(path, tokenizer)
    adapt(model, base_tokenizer, mask_token=tokenizer.mask_token, layout=facts.attention)
    model = merged(model, path)
    put_mask_row(model, facts.mask_token_id, path)
    count_as_ends(model, tokenizer, facts.end_token_ids)
    _refuse_disagreement(path, facts, model, tokenizer)
    return Converted(cast_weights(model, dtype).eval().to(device), tokenizer, facts)


def load_causal(
    model_name_or_path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    revision: str | None = None,
) -> Converted:
    """Loads an autoregressive model in eval mode, in the form that engines take: its facts say that it writes from left
    to right.

    It gets a mask token too, because engines ban one. It never reads or writes that token.

    Args:
        model_name_or_path: As `load_source` takes it; adapters are merged.
        dtype: Type of the weights.
        device: Where they go.
        revision: Branch, tag or commit of a hub id.

    Raises:
        UserError: There is no such model.
    """
    model, tokenizer = load_source(model_name_or_path, revision=revision, dtype=dtype, merge_adapter=True)
    mask_token_id = adapt(model, tokenizer, layout=Layout("causal"))
    facts = ConversionFacts(str(model_name_or_path), "causal", 1, mask_token_id, source_revision=revision)
    return Converted(model.to(device).eval(), tokenizer, facts)


def count_as_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, end_token_ids: list[int]) -> None:
    """Writes the ends of answers into the generation settings, where other programs look for them."""
    listed = model.generation_config.eos_token_id
    listed = listed if isinstance(listed, list) else [tokenizer.eos_token_id if listed is None else listed]
    missing = [end for end in end_token_ids if end not in listed]
    if missing:
        model.generation_config.eos_token_id = [end for end in listed if end is not None] + missing


def _refuse_disagreement(
    path: Path, facts: ConversionFacts, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    num_rows = model.get_input_embeddings().weight.shape[0]
    for name, token_id in [
        ("mask_token_id", facts.mask_token_id),
        *(("end_token_ids", end) for end in facts.end_token_ids),
    ]:
        if not 0 <= token_id < num_rows:
            raise UserError(f"{path}: {FACTS_FILE} has {name} {token_id}, the weights have {num_rows} embedding rows")
    if tokenizer.mask_token_id != facts.mask_token_id:
        raise UserError(
            f"{path}: {FACTS_FILE} has mask_token_id {facts.mask_token_id}, "
            f"the tokenizer's mask token has id {tokenizer.mask_token_id}"
        )
    is_causal = getattr(model.config, "is_causal", True)
    if is_causal != (facts.layout == "causal"):
        raise UserError(f"{path}: {FACTS_FILE} has layout '{facts.layout}', config.json has is_causal {is_causal}")
