"""Writes a tiny GGUF file, as llama.cpp's converter would from a Llama model with a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from tests.families import CHAT_TEMPLATE, CHAT_TOKENS, EOS, MAX_LENGTH, MERGES, VOCABULARY

_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(path: Path, model: PreTrainedModel, architecture: str = "llama") -> Path:
    """Writes a Llama model: matrices in 8 bits, the rest in fp32; a tied head is left out.

    Args:
        path: of the file.
        model: of the family "llama", with the vocabulary of `tests.families`.
        architecture: what the file says that it is.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(MAX_LENGTH)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(len(VOCABULARY))
    _add_tokenizer(writer)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        _add_tensor(writer, _gguf_name(name), _as_llama_cpp_rotates(name, tensor, config).float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    special = {EOS, *CHAT_TOKENS}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in VOCABULARY]
    )
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_eos_token_id(VOCABULARY.index(CHAT_TOKENS[1]))
    writer.add_bos_token_id(VOCABULARY.index(EOS))
    writer.add_chat_template(CHAT_TEMPLATE)


def _add_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray) -> None:
    if values.ndim == 1 or values.shape[-1] % 32:
        writer.add_tensor(name, values)
        return
    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)


def _gguf_name(name: str) -> str:
    outer = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
    if name in outer:
        return f"{outer[name]}.weight"
    _, _, layer, inner = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{_IN_LAYER[inner]}.weight"


def _as_llama_cpp_rotates(name: str, tensor: Tensor, config) -> Tensor:
    """It rotates neighbours where transformers rotates halves, so the rows of queries and keys change places."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for part, count in heads.items():
        if part in name:
            return tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
    return tensor
