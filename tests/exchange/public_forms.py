"""Random stock models, written as public diffusion checkpoints are."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedModel

from decausal.diffusion.layout import Layout
from tests.exchange.checkpoints import ROWS, save_sharded, scatter, tensors_of, write_json
from tests.families import EOS_ID, FAMILIES, tiny_tokenizer

MASK_ID = 268
SPECIAL = {"bos_token_id": EOS_ID, "eos_token_id": EOS_ID, "pad_token_id": EOS_ID}
# What the published files hold beside the numbers of the model.
HABITS = {"attention_dropout": 0.0, "initializer_range": 0.02, "torch_dtype": "float32", "use_cache": False}
QWEN = ("hidden_act", "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads")
QWEN += ("num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "vocab_size")
WINDOWS = {"max_window_layers": 28, "rope_scaling": None, "sliding_window": None, "use_sliding_window": False}
THETA = 3e4


def qwen_config(model: PreTrainedModel, *more: str, **values: Any) -> dict[str, Any]:
    taken = {name: getattr(model.config, name) for name in (*QWEN, *more)}
    return taken | SPECIAL | HABITS | WINDOWS | {"rope_theta": THETA} | values


def sdar(model: PreTrainedModel) -> dict[str, Any]:
    own = {"model_type": "sdar", "architectures": ["SDARForCausalLM"], "debug": False, "ep_size": 1}
    facts = {"block_size": 4, "mask_token_id": MASK_ID, "attn_implementation": "flex_attention"}
    return qwen_config(model, "attention_bias", "head_dim", **own, **facts, fuse_cross_entropy=True)


def sdar_moe(model: PreTrainedModel) -> dict[str, Any]:
    experts = ("moe_intermediate_size", "norm_topk_prob", "num_experts", "num_experts_per_tok", "mlp_only_layers")
    own = {"model_type": "sdar_moe", "block_size": 4, "mask_token_id": MASK_ID, "decoder_sparse_step": 1}
    return qwen_config(model, "attention_bias", "head_dim", *experts, **own, router_aux_loss_coef=0.001)


def dream(model: PreTrainedModel) -> dict[str, Any]:
    code = {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"}
    own = {"model_type": "Dream", "architectures": ["DreamModel"], "auto_map": code, "use_mrope": False}
    return qwen_config(model, **own, mask_token_id=MASK_ID)


def fast_dllm(model: PreTrainedModel) -> dict[str, Any]:
    own = {"model_type": "Fast_dLLM_Qwen", "architectures": ["Fast_dLLM_QwenForCausalLM"], "bd_size": 8}
    habits = {"layer_types": ["full_attention"] * 2, "conplemenrary_mask": True}  # spelt so
    return qwen_config(model, **own, **habits, mask_token_id=MASK_ID)


def llada(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config
    return {
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": config.hidden_size,
        "embedding_size": config.vocab_size,
        "flash_attention": True,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_device": "meta",
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": MASK_ID,
        "max_sequence_length": config.max_position_embeddings,
        "mlp_hidden_size": config.intermediate_size,
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "n_layers": config.num_hidden_layers,
        "precision": "amp_bf16",
        "rms_norm_eps": config.rms_norm_eps,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": THETA,
        "scale_logits": False,
        "vocab_size": config.vocab_size,
        "weight_tying": config.tie_word_embeddings,
        **SPECIAL,
    }


LLADA_NAMES = (
    (r"model\.layers\.", "model.transformer.blocks."),
    (r"input_layernorm", "attn_norm"),
    (r"post_attention_layernorm", "ff_norm"),
    (r"self_attn\.o_proj", "attn_out"),
    (r"self_attn\.", ""),
    (r"mlp\.gate_proj", "ff_proj"),
    (r"mlp\.up_proj", "up_proj"),
    (r"mlp\.down_proj", "ff_out"),
    (r"model\.embed_tokens", "model.transformer.wte"),
    (r"model\.norm", "model.transformer.ln_f"),
    (r"lm_head", "model.transformer.ff_out"),
)


def llada_names(name: str) -> str:
    for stock, other in LLADA_NAMES:
        name = re.sub(stock, other, name)
    return name


FORMS: dict[str, tuple[str, Callable[..., dict[str, Any]], Layout, int]] = {
    "sdar": ("qwen3", sdar, Layout("block", 4), 0),
    "sdar_moe": ("qwen3_moe", sdar_moe, Layout("block", 4), 0),
    "Dream": ("qwen2", dream, Layout("bidirectional"), 1),
    "Fast_dLLM_Qwen": ("qwen2", fast_dllm, Layout("block", 8), 1),
    "llada": ("llama", llada, Layout("bidirectional"), 0),
}


def publish(directory: Path, form: str, *, num_shards: int = 1, **changes: Any) -> PreTrainedModel:
    """Writes a random model as it would be published in a form; returns the stock original."""
    family, config, _, _ = FORMS[form]
    model = FAMILIES[family](vocab_size=ROWS, rope_theta=THETA, **changes)
    scatter(model)
    model.save_pretrained(directory)  # the stock names on disk, experts apart
    tensors = tensors_of(directory)
    if form == "llada":
        tensors = {llada_names(name): tensor for name, tensor in tensors.items()}
    (directory / "model.safetensors").unlink()
    (directory / "generation_config.json").unlink()
    if num_shards > 1:
        save_sharded(directory, tensors, num_shards)
    else:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    write_json(directory / "config.json", config(model))
    tiny_tokenizer(chat=True).save_pretrained(directory)
    return model
