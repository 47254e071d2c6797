"""SDAR's form read by nothing of ours and nothing of transformers': config.json, safetensors and plain torch.

This is what an engine does with an exported directory: SDAR's blocks are Qwen3's (norms before attention and feed-
forward, norms of queries and keys per head, rotary embedding of halves, grouped keys, SwiGLU or experts of it), a token
reads all blocks up to its own, and the logits at a masked place are that token's own.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import silu, softmax


def sdar_logits(directory: Path, ids: Tensor) -> Tensor:
    config = json.loads((directory / "config.json").read_text())
    weights = load_file(directory / "model.safetensors")
    assert config["tie_word_embeddings"] is False
    assert config["attention_bias"] is False
    hidden = weights["model.embed_tokens.weight"][ids]
    block = torch.arange(ids.shape[1]) // config["block_size"]
    is_visible = block[None, :] <= block[:, None]
    for number in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{number}."
        layer = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        normed = rms_norm(hidden, layer["input_layernorm.weight"], config)
        hidden = hidden + attention(normed, layer, config, is_visible)
        normed = rms_norm(hidden, layer["post_attention_layernorm.weight"], config)
        feed_forward = experts if config["model_type"] == "sdar_moe" else dense
        hidden = hidden + feed_forward(normed, layer, config)
    return rms_norm(hidden, weights["model.norm.weight"], config) @ weights["lm_head.weight"].T


def rms_norm(hidden: Tensor, weight: Tensor, config: dict[str, Any]) -> Tensor:
    return hidden / (hidden.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * weight


def attention(hidden: Tensor, layer: dict[str, Tensor], config: dict[str, Any], is_visible: Tensor) -> Tensor:
    queries, keys, values = (
        (hidden @ layer[f"self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, config["head_dim"])).transpose(1, 2)
        for name in "qkv"
    )
    queries = rotated(rms_norm(queries, layer["self_attn.q_norm.weight"], config), config)
    keys = rotated(rms_norm(keys, layer["self_attn.k_norm.weight"], config), config)
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(config["head_dim"])
    read = softmax(scores.masked_fill(~is_visible, -math.inf), -1) @ values
    return read.transpose(1, 2).flatten(2) @ layer["self_attn.o_proj.weight"].T


def rotated(heads: Tensor, config: dict[str, Any]) -> Tensor:
    width = config["head_dim"]
    frequency = config["rope_theta"] ** (-torch.arange(0, width, 2) / width)
    angle = torch.arange(heads.shape[2])[:, None] * frequency
    first, second = heads[..., : width // 2], heads[..., width // 2 :]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def dense(hidden: Tensor, layer: dict[str, Tensor], config: dict[str, Any], prefix: str = "mlp") -> Tensor:
    gate, up = hidden @ layer[f"{prefix}.gate_proj.weight"].T, hidden @ layer[f"{prefix}.up_proj.weight"].T
    return (silu(gate) * up) @ layer[f"{prefix}.down_proj.weight"].T


def experts(hidden: Tensor, layer: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    share = softmax(hidden @ layer["mlp.gate.weight"].T, -1)
    top = share.topk(config["num_experts_per_tok"], -1)
    kept = torch.zeros_like(share).scatter(-1, top.indices, top.values)
    if config["norm_topk_prob"]:
        kept = kept / kept.sum(-1, keepdim=True)
    each = [dense(hidden, layer, config, f"mlp.experts.{number}") for number in range(config["num_experts"])]
    return sum(kept[..., number, None] * output for number, output in enumerate(each))
