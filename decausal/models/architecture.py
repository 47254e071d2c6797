"""Which architectures can be converted, and what their configurations say about attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from decausal.errors import UserError

# Recurrence and causal convolutions read a row in one direction only, whatever the attention layout. Types whose
# configuration lists its layers (Granite 4, Bamba, ...) are also caught by RECURRENT_LAYER_TYPES. The types here are
# refused even if a version of transformers has no such list.
RECURRENT_MODEL_TYPES = frozenset(
    """
    bailing_hybrid bamba falcon_h1 falcon_mamba inkling2_text inkling_text jamba kimi_linear lfm2 lfm2_moe lfm3 mamba
    mamba2 minimax nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp
    qwen4_exp_text recurrent_gemma rwkv xlstm zamba zamba2 zaya
    """.split()  # noqa: SIM905
)
RECURRENT_LAYER_TYPES = frozenset(
    {"conv", "hybrid", "hybrid_sliding", "linear_attention", "mamba", "mamba2", "recurrent", "rwkv", "short_conv"}
)


def refusal(config: PretrainedConfig) -> str | None:
    """Returns why a model of this configuration can never be converted, as one clause; None if it may be probed."""
    kind = config.model_type
    if config.is_encoder_decoder or kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return f"model type '{kind}' is an encoder-decoder"
    if kind in RECURRENT_MODEL_TYPES:
        return f"model type '{kind}' has recurrent layers, which read a row in one direction only"
    recurrent = sorted(RECURRENT_LAYER_TYPES.intersection(getattr(config, "layer_types", None) or ()))
    if recurrent:
        names = ", ".join(recurrent)
        return f"model type '{kind}' has recurrent layers ({names}), which read a row in one direction only"
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return f"model type '{kind}' is an encoder: it already reads in both directions and has no causal head"
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return f"model type '{kind}' is not a causal language model"
    if config.get_text_config() is not config:
        return f"model type '{kind}' is multimodal; extract its text model first"
    return None


def attention_implementation(config: PretrainedConfig) -> str | None:
    """Returns ``"eager"`` if SDPA would drop the cap on attention scores; None if transformers' choice is right."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) is not None else None


def context_length(config: PretrainedConfig) -> int | None:
    """Returns the maximum number of positions that a model can read, or None without a limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def refuse_longer_rows(max_length: int, config: PretrainedConfig) -> None:
    """Raises UserError if rows of `max_length` tokens are longer than the model can read."""
    context = context_length(config)
    if context is not None and max_length > context:
        raise UserError(f"--max_length {max_length} is over the model's maximum of {context} tokens; lower it")


def sliding_windows(config: PretrainedConfig) -> dict[str, int | None]:
    """Returns each layer type's sliding window in tokens (query q reads keys k with q - k < window), None if unlimited.

    Models without `layer_types` treat all layers alike. They have one type here, ``"every"``.

    Raises:
        ValueError: For a layer type that does not attend within a sliding window.
    """
    window = getattr(config, "sliding_window", None) or None
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return {"every": window}
    known = {"full_attention": None, "sliding_attention": window}
    unknown = sorted(set(layer_types) - set(known))
    if unknown:
        raise ValueError(f"layers of type {', '.join(unknown)} take no attention mask of a layout")
    return {layer_type: known[layer_type] for layer_type in dict.fromkeys(layer_types)}


def reach(config: PretrainedConfig) -> int | None:
    """Returns how far away, in tokens, a token can change a state through all layers; None if unlimited."""
    windows = sliding_windows(config)
    layer_types = getattr(config, "layer_types", None) or ["every"] * config.num_hidden_layers
    distances = [windows[layer_type] for layer_type in layer_types]
    return None if None in distances else sum(window - 1 for window in distances)


@contextmanager
def configured(config: PretrainedConfig, **changes: Any) -> Iterator[None]:
    """Changes a configuration temporarily."""
    missing = object()
    before = {name: getattr(config, name, missing) for name in changes}
    try:
        for name, value in changes.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            if value is missing:
                delattr(config, name)
            else:
                setattr(config, name, value)
