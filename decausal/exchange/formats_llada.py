"""LLaDA's own names (those of OLMo) for what is a Llama model."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from transformers import LlamaConfig

from decausal.errors import UserError
from decausal.exchange.config_keys import NEUTRAL, refuse_keys

_FIXED: dict[str, Any] = {
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "rope": True,
    "scale_logits": False,
}
# Numbers that the mathematics needs, then those that may be left out or follow from others.
_NEEDED = ("d_model", "max_sequence_length", "n_heads", "n_layers", "rms_norm_eps", "rope_theta", "vocab_size")
_DERIVED = (
    "embedding_size",
    "mlp_hidden_size",
    "mlp_ratio",
    "multi_query_attention",
    "n_kv_heads",
    "weight_tying",
)
# Dropout, initialisation and kernels. Rotary embeddings in another precision are the same mathematics.
_WITHOUT_EFFECT = frozenset(
    """
    alibi_bias_max attention_layer_norm_with_affine embedding_dropout flash_attention flash_attn_varlen
    init_cutoff_factor init_device init_fn init_std precision residual_dropout rope_full_precision
    """.split()  # noqa: SIM905
)
_OUTER = {
    "model.transformer.wte.weight": "model.embed_tokens.weight",
    "model.transformer.ln_f.weight": "model.norm.weight",
    "model.transformer.ff_out.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
_LAYER = re.compile(r"model\.transformer\.blocks\.(\d+)\.(\w+)\.weight")


def llada_name(name: str) -> str:
    """Returns the stock name of a LLaDA tensor; a name that is none of LLaDA's comes back as it is."""
    found = _LAYER.fullmatch(name)
    if found and found[2] in _IN_LAYER:
        return f"model.layers.{found[1]}.{_IN_LAYER[found[2]]}.weight"
    return _OUTER.get(name, name)


def llada_config(config: Mapping[str, Any], ignored: Collection[str]) -> LlamaConfig:
    """Returns the stock configuration of a LLaDA config.json.

    Raises:
        UserError: a number is missing, a key is not known, or a switch makes it something other than a Llama model.
    """
    refuse_keys(config, {*_NEEDED, *_DERIVED, *_FIXED, *_WITHOUT_EFFECT, *NEUTRAL}, _FIXED, ignored)
    missing = [name for name in _NEEDED if config.get(name) is None]
    # Its code takes another block, another norm and no rotary embedding where the keys are left out.
    missing += [name for name in ("activation_type", "block_type", "layer_norm_type", "rope") if name not in config]
    if missing:
        raise UserError(f"config.json lacks {', '.join(missing)}")
    heads = config["n_heads"]
    return LlamaConfig(
        hidden_size=config["d_model"],
        intermediate_size=config.get("mlp_hidden_size") or config.get("mlp_ratio", 4) * config["d_model"],
        max_position_embeddings=config["max_sequence_length"],
        num_attention_heads=heads,
        num_hidden_layers=config["n_layers"],
        num_key_value_heads=config.get("n_kv_heads") or (1 if config.get("multi_query_attention") else heads),
        rms_norm_eps=config["rms_norm_eps"],
        rope_theta=config["rope_theta"],
        tie_word_embeddings=config.get("weight_tying", True),
        vocab_size=config.get("embedding_size") or config["vocab_size"],
    )
