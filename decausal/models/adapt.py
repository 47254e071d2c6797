"""From an autoregressive checkpoint to a model that can be trained to denoise: load it, then give it a mask token."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from decausal.diffusion.layout import Layout
from decausal.errors import UserError, first_line
from decausal.models.architecture import attention_implementation, refusal
from decausal.models.names import located

BIDIRECTIONAL = Layout("bidirectional")
DEFAULT_MASK_TOKEN = "<|mask|>"
# What transformers raises for files that are missing, unreachable, broken, or of an architecture it does not know.
LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    RuntimeError,
    ImportError,
    SafetensorError,
    UnpicklingError,  # what PyTorch raises for a .bin that would run code
)


def load_source(
    model_name_or_path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads an autoregressive model and its tokenizer, to be converted or to teach. Never runs a repository's own code.

    Attention runs under SDPA, or eagerly where the architecture needs that (soft-capped scores, attention sinks).

    Args:
        model_name_or_path: a directory, a hub id, or ``"tiny"`` or ``"tiny-tasks"`` for an embedded model.
        dtype: type of the weights.
        revision: branch, tag or commit of a hub id.
        attn_implementation: "sdpa" or "eager"; None: what the architecture needs.

    Returns:
        The model in eval mode, and its tokenizer.

    Raises:
        UserError: when there is no such model, it cannot be read, or it is not a decoder-only causal language model.
    """
    path, revision = located(model_name_or_path, revision)
    config = _config(path, revision)
    reason = refusal(config)
    if reason is not None:
        raise UserError(f"{path} cannot be converted: {reason}; give a decoder-only causal language model")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            revision=revision,
            attn_implementation=attn_implementation or attention_implementation(config),
            trust_remote_code=False,
            output_loading_info=True,
        )
    except LOADING_ERRORS as error:
        raise UserError(f"cannot load the weights of {path}: {first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"{path} is not a causal language model: its weights lack {missing[0]} ({len(missing)} tensors missing); "
            "give a checkpoint with its output head"
        )
    return model.eval(), _tokenizer(path, revision)


def source_config(model_name_or_path: str | Path, revision: str | None = None) -> PretrainedConfig:
    """Returns the configuration of a source, or of a converted model, without loading its weights.

    Raises:
        UserError: when there is no such model, or it cannot be read.
    """
    return _config(*located(model_name_or_path, revision, may_be_converted=True))


def source_commit(model_name_or_path: str | Path, revision: str | None = None) -> str | None:
    """Returns the commit that a source, or a converted model, on the hub has now; None for one that is here.

    Raises:
        UserError: when there is no such model.
    """
    return located(model_name_or_path, revision, may_be_converted=True)[1]


def source_dtype(model_name_or_path: str | Path, revision: str | None = None) -> torch.dtype:
    """Returns the type in which a model's weights are stored, as its configuration says; float32 if it does not."""
    return getattr(source_config(model_name_or_path, revision), "dtype", None) or torch.float32


def adapt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    mask_token: str | None = None,
    layout: Layout = BIDIRECTIONAL,
) -> int:
    """Gives the model a mask token and sets its configuration's `is_causal`. Changes model and tokenizer in place.

    The mask token is `mask_token` if given, else the tokenizer's own, else ``<|mask|>``, added where the tokenizer
    lacks it. An added token takes a spare row of the embedding (Qwen3: 151669), or the embedding grows; its row, and
    the head's where that is untied, starts as the mean of the rows that the tokenizer uses.

    Args:
        model: as `load_source` gives it.
        tokenizer: its tokenizer.
        mask_token: text of the mask token, if not the tokenizer's own.
        layout: what the model will read under; `is_causal` stays True for ``"causal"`` alone.

    Returns:
        The mask token's id.

    Raises:
        UserError: when the mask token already has another role.
    """
    name = mask_token or tokenizer.mask_token or DEFAULT_MASK_TOKEN
    known_ids = set(tokenizer.get_vocab().values())
    if tokenizer.mask_token != name:
        _refuse_other_role(tokenizer, name)
        tokenizer.add_special_tokens({"mask_token": name})
    mask_token_id = tokenizer.mask_token_id
    num_rows = model.get_input_embeddings().weight.shape[0]
    if mask_token_id >= num_rows:
        model.resize_token_embeddings(mask_token_id + 1, mean_resizing=False)
    if mask_token_id not in known_ids or mask_token_id >= num_rows:
        trained_ids = torch.tensor(sorted(token_id for token_id in known_ids if token_id < num_rows))
        _start_as_mean(model, mask_token_id, trained_ids)
    model.config.is_causal = layout.kind == "causal"
    return mask_token_id


def _refuse_other_role(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    for role in ("eos_token", "bos_token", "pad_token", "unk_token"):
        if getattr(tokenizer, role) == name:
            raise UserError(f"mask token '{name}' is the tokenizer's {role}; give another with --mask_token")


def _start_as_mean(model: PreTrainedModel, token_id: int, trained_ids: Tensor) -> None:
    parameters: list[Tensor] = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    if head.weight is not parameters[0]:
        parameters.append(head.weight)
    if isinstance(head, nn.Linear) and head.bias is not None:
        parameters.append(head.bias)
    with torch.no_grad():
        for parameter in parameters:
            trained = parameter[trained_ids.to(parameter.device)]
            parameter[token_id] = trained.mean(dim=0, dtype=torch.float32).to(parameter.dtype)


def _config(path: str, revision: str | None) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    except LOADING_ERRORS as error:
        needs_code = "trust_remote_code" in str(error)
        reason = "it needs code of its own (trust_remote_code), which is never run" if needs_code else first_line(error)
        raise UserError(f"{path} holds no model that transformers can read: {reason}") from error


def _tokenizer(path: str, revision: str | None) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except LOADING_ERRORS as error:
        raise UserError(f"cannot load the tokenizer of {path}: {first_line(error)}") from error
    # Where its files are missing, transformers makes one that knows special tokens alone and drops every text.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(f"cannot load the tokenizer of {path}: its vocabulary is missing (tokenizer.json)")
    return tokenizer
