"""Names and shapes of the tensors in stock checkpoints of all architectures that are exchanged."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PretrainedConfig

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
STOCK_MODEL_TYPES = ("llama", "qwen2", "qwen3", "qwen3_moe")


def expected_tensors(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor, by name.

    Args:
        config: Configuration of a model type in `STOCK_MODEL_TYPES`.
    """
    vocabulary, width = config.vocab_size, config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDINGS: (vocabulary, width),
        "model.norm.weight": (width,),
    }
    if not config.tie_word_embeddings:
        shapes[HEAD] = (vocabulary, width)
    for layer in range(config.num_hidden_layers):
        for parts in (_norms(config), _attention(config), _feed_forward(config)):
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in parts}
    return shapes


def head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _norms(config: PretrainedConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "input_layernorm.weight", (config.hidden_size,)
    yield "post_attention_layernorm.weight", (config.hidden_size,)
    if config.model_type in ("qwen3", "qwen3_moe"):
        yield "self_attn.q_norm.weight", (head_dim(config),)
        yield "self_attn.k_norm.weight", (head_dim(config),)


def _attention(config: PretrainedConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    width = config.hidden_size
    queries, keys = config.num_attention_heads * head_dim(config), config.num_key_value_heads * head_dim(config)
    is_qwen2 = config.model_type == "qwen2"  # always biased, whatever the configuration says
    biased = "qkv" if is_qwen2 else "qkvo" * config.attention_bias
    for name, shape in {"q": (queries, width), "k": (keys, width), "v": (keys, width), "o": (width, queries)}.items():
        yield f"self_attn.{name}_proj.weight", shape
        if name in biased:
            yield f"self_attn.{name}_proj.bias", shape[:1]


def _feed_forward(config: PretrainedConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    width = config.hidden_size
    if config.model_type != "qwen3_moe":
        yield from _gated("mlp", width, config.intermediate_size)
        return
    yield "mlp.gate.weight", (config.num_experts, width)
    for expert in range(config.num_experts):
        yield from _gated(f"mlp.experts.{expert}", width, config.moe_intermediate_size)


def _gated(prefix: str, width: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.gate_proj.weight", (inner, width)
    yield f"{prefix}.up_proj.weight", (inner, width)
    yield f"{prefix}.down_proj.weight", (width, inner)
