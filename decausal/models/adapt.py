"""Turns an autoregressive checkpoint into a model that can be trained to denoise: loads it and adds a mask token."""

from __future__ import annotations

import logging
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
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
from decausal.models.adapters import hushed, merged
from decausal.models.architecture import attention_implementation, refusal
from decausal.models.casting import cast_weights
from decausal.models.directories import adapter_of, has_tokenizer, refuse_incomplete
from decausal.models.gguf_files import check_gguf, is_gguf
from decausal.models.names import adapter_directory, gguf_path, located
from decausal.models.quantized import dequantizing, plain
from decausal.privacy import drop_secrets, secret_in
from decausal.wording import quantity

logger = logging.getLogger(__name__)

BIDIRECTIONAL = Layout("bidirectional")
DEFAULT_MASK_TOKEN = "<|mask|>"
# Errors of transformers for files that are missing, unreachable, broken, or of an unknown architecture.
LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    RuntimeError,
    ImportError,
    SafetensorError,
    StrictDataclassError,  # a value in config.json that the architecture cannot have
    UnpicklingError,  # PyTorch's error for a .bin that would run code
)


def load_source(
    model_name_or_path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    attn_implementation: str | None = None,
    merge_adapter: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads an autoregressive model and its tokenizer, to be converted or to teach. Never runs a repository's own code.

    Attention runs under SDPA, or eagerly if the architecture needs it (soft-capped scores, attention sinks).

    Args:
        model_name_or_path: A directory or GGUF file, a hub id or a GGUF file there (owner/name/file.gguf), or an
            embedded model: ``"tiny"``, ``"tiny-tasks"``.
        dtype: Type of the weights.
        revision: Branch, tag or commit of a hub id.
        attn_implementation: "sdpa" or "eager"; None: what the architecture needs.
        merge_adapter: Take a PEFT adapter too, merged into its base.

    Returns:
        The model in eval mode, and its tokenizer.

    Raises:
        UserError: When there is no such model, it cannot be read, or it is not a decoder-only causal language model.
    """
    path, revision = located(model_name_or_path, revision, merge_adapter=merge_adapter)
    adapter = None if is_gguf(path) else adapter_directory(path, revision)
    if adapter is not None:
        refuse_incomplete(adapter)
        return _load_merged(adapter, dtype, attn_implementation)
    config = _config(path, revision)
    reason = refusal(config)
    if reason is not None:
        raise UserError(f"{path} cannot be converted: {reason}; give a decoder-only causal language model")
    if revision is None and not is_gguf(path):
        refuse_incomplete(Path(path))
    model = load_weights(path, config, dtype=dtype, revision=revision, attn_implementation=attn_implementation)
    return model, _tokenizer(path, revision)


def outline(
    model_name_or_path: str | Path,
    *,
    revision: str | None = None,
    attn_implementation: str | None = None,
    device: torch.device | str = "meta",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Builds a model of a source's shape in fp32 without its weights, and loads its tokenizer.

    Args:
        model_name_or_path: See `load_source`; a converted model and a PEFT adapter are taken too.
        revision: Branch, tag or commit of a hub id.
        attn_implementation: "sdpa" or "eager"; None: what the architecture needs.
        device: "meta", where tensors hold no numbers; elsewhere the weights are random.

    Raises:
        UserError: When there is no such model, or it is not a decoder-only causal language model.
    """
    path, commit = located(model_name_or_path, revision, may_be_converted=True, merge_adapter=True)
    directory = None if is_gguf(path) else adapter_directory(path, commit)
    if directory is not None:
        adapter = adapter_of(directory)
        model, tokenizer = outline(
            adapter.base, revision=adapter.revision, attn_implementation=attn_implementation, device=device
        )
        return model, _tokenizer(str(directory), None) if has_tokenizer(directory) else tokenizer
    config = _config(path, commit)
    reason = refusal(config)
    if reason is not None:
        raise UserError(f"{path} cannot be converted: {reason}; give a decoder-only causal language model")
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=torch.float32,
            attn_implementation=attn_implementation or attention_implementation(config),
            trust_remote_code=False,
        )
    return model.eval(), _tokenizer(path, commit)


def load_base(
    directory: Path, *, dtype: torch.dtype = torch.float32, attn_implementation: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the autoregressive model in a gated conversion's directory, like `load_source`.

    Raises:
        UserError: Its files cannot be read.
    """
    path = str(directory)
    model = load_weights(path, _config(path, None), dtype=dtype, attn_implementation=attn_implementation)
    return model, _tokenizer(path, None)


def load_weights(
    path: str,
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    revision: str | None = None,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Loads a causal language model of a known configuration in eval mode, with quantized weights as plain numbers.

    Raises:
        UserError: The weights cannot be read, or are not those of a causal language model.
    """
    name, where = _files(path, revision)
    try:
        with hushed():
            model, info = AutoModelForCausalLM.from_pretrained(
                name,
                **where,
                **dequantizing(config, where),
                config=config,
                dtype=dtype,
                attn_implementation=attn_implementation or attention_implementation(config),
                trust_remote_code=False,
                output_loading_info=True,
            )
    except LOADING_ERRORS as error:
        raise UserError(f"cannot load the weights of {path}: {unreadable(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"{path} is not a causal language model: its weights lack {missing[0]} "
            f"({quantity(len(missing), 'tensor')} missing); "
            "give a checkpoint with its output head"
        )
    if getattr(model, "is_quantized", False):
        model = plain(model, dtype)
    forget_private(path, model)
    return cast_weights(model, dtype).eval()


def unreadable(error: Exception) -> str:
    """Returns, in one line, why a model's files cannot be loaded."""
    if isinstance(error, UnpicklingError):
        return "a .bin file does not hold plain tensors; code in one is never run: give safetensors"
    return first_line(error)


def forget_private(path: str | Path, *loaded: PreTrainedModel | PreTrainedTokenizerBase) -> None:
    """Drops what saving would write and nobody should read: the names of a source's code, and secrets, with a warning.

    Raises:
        UserError: A secret has become a token of the vocabulary.
    """
    for each in loaded:
        if isinstance(each, PreTrainedModel):
            kept = [each.config, each.generation_config]
            vars(each.config).pop("auto_map", None)  # its code stays behind and is never run
        else:
            kept = [each.init_kwargs]
            each.init_kwargs.pop("auto_map", None)
            # transformers takes every setting `*_token` of a tokenizer for the text of a special token.
            if name := secret_in(each.special_tokens_map):
                raise UserError(
                    f"the tokenizer_config.json of {path} holds a secret, '{name}', which would become a token of the "
                    "vocabulary: remove it from the file"
                )
        if found := list(dict.fromkeys(drop_secrets(kept))):
            logger.warning(
                "the settings of %s hold secrets (%s), which are neither used nor recorded", path, ", ".join(found)
            )


def _load_merged(
    directory: Path, dtype: torch.dtype, attn_implementation: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    adapter = adapter_of(directory)
    try:
        model, tokenizer = load_source(
            adapter.base, revision=adapter.revision, attn_implementation=attn_implementation, merge_adapter=True
        )
    except UserError as error:
        raise UserError(f"{directory} is a PEFT adapter on {adapter.base}, which cannot be loaded: {error}") from error
    model = cast_weights(merged(model, directory), dtype)
    return model, _tokenizer(str(directory), None) if has_tokenizer(directory) else tokenizer


def source_config(model_name_or_path: str | Path, revision: str | None = None) -> PretrainedConfig:
    """Returns the configuration of a source, or of a converted model, without loading its weights.

    Raises:
        UserError: When there is no such model, or it cannot be read.
    """
    path, commit = located(model_name_or_path, revision, may_be_converted=True, merge_adapter=True)
    adapter = None if is_gguf(path) else adapter_directory(path, commit)
    return _config(path, commit) if adapter is None else source_config(*adapter_of(adapter))


def source_commit(
    model_name_or_path: str | Path, revision: str | None = None, *, merge_adapter: bool = False
) -> str | None:
    """Returns the current commit of a source or converted model on the hub; None for a local one.

    Raises:
        UserError: When there is no such model, or it is an adapter that is not accepted.
    """
    return located(model_name_or_path, revision, may_be_converted=True, merge_adapter=merge_adapter)[1]


def source_dtype(model_name_or_path: str | Path, revision: str | None = None) -> torch.dtype:
    """Returns the type in which a model's weights are stored, according to its configuration; float32 by default.

    For a GGUF file, which holds several small types, it is bfloat16.
    """
    if is_gguf(str(model_name_or_path)):
        return torch.bfloat16
    return getattr(source_config(model_name_or_path, revision), "dtype", None) or torch.float32


def adapt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    mask_token: str | None = None,
    layout: Layout = BIDIRECTIONAL,
) -> int:
    """Gives the model a mask token and sets its configuration's `is_causal`. Changes model and tokenizer in place.

    The mask token is `mask_token` if given, else the tokenizer's own, else ``<|mask|>``, which is added if the
    tokenizer lacks it. An added token takes a spare row of the embedding (Qwen3: 151669), or the embedding grows. Its
    row, and that of an untied head, starts as the mean of the rows that the tokenizer uses.

    Args:
        model: As `load_source` gives it.
        tokenizer: Its tokenizer.
        mask_token: Text of the mask token, if not the tokenizer's own.
        layout: What the model will read under. `is_causal` stays True only for ``"causal"``.

    Returns:
        The mask token's id.

    Raises:
        UserError: When the mask token already has another role.
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


def _files(path: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    """Returns what transformers reads from, and the keywords for the file or commit."""
    if is_gguf(path):
        file = gguf_path(path, revision)
        return str(file.parent), {"gguf_file": file.name}
    return path, {"revision": revision}


def _config(path: str, revision: str | None) -> PretrainedConfig:
    name, where = _files(path, revision)
    try:
        return AutoConfig.from_pretrained(name, **where, trust_remote_code=False)
    except LOADING_ERRORS as error:
        if is_gguf(path):
            kind = check_gguf(gguf_path(path, revision)).architecture
            raise UserError(
                f"{path} holds a model of architecture '{kind}', which transformers cannot read from GGUF "
                f"({first_line(error)}); give the model's directory"
            ) from error
        needs_code = "trust_remote_code" in str(error)
        reason = "it needs its own code (trust_remote_code), which is never run" if needs_code else first_line(error)
        raise UserError(f"{path} holds no model that transformers can read: {reason}") from error


def _tokenizer(path: str, revision: str | None) -> PreTrainedTokenizerBase:
    name, where = _files(path, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **where, trust_remote_code=False)
    except LOADING_ERRORS as error:
        raise UserError(f"cannot load the tokenizer of {path}: {first_line(error)}") from error
    # Without its files, transformers makes a tokenizer that only knows special tokens and drops all text.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(f"cannot load the tokenizer of {path}: its vocabulary is missing (tokenizer.json)")
    forget_private(path, tokenizer)
    return tokenizer
