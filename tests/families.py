"""Tiny random models of every family that must convert, and a tiny tokenizer: shared by tests of all rooms."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from decausal.models.architecture import attention_implementation

EOS = "<|endoftext|>"
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MERGES = (("Ġ", "t"), ("h", "e"), ("i", "n"), ("Ġ", "a"), ("r", "e"), ("o", "n"), ("e", "r"), ("Ġt", "he"), ("Ġ", "s"))
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = [*BYTES, *("".join(pair) for pair in MERGES), EOS, *CHAT_TOKENS]
VOCAB_SIZE = len(VOCABULARY)
EOS_ID = VOCABULARY.index(EOS)
SLIDING_WINDOW = 4
MAX_LENGTH = 64


def tiny_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 268 entries for any text, with an end-of-text token and no padding token.

    Args:
        chat: attach a ChatML template over the tokens `<|im_start|>` and `<|im_end|>`.
    """
    ids = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=list(MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        additional_special_tokens=list(CHAT_TOKENS),
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )
    fast.chat_template = CHAT_TEMPLATE if chat else None
    return fast


DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LENGTH,
}
# Large enough that one changed token moves every logit it reaches by far more than rounding.
SHARED = {
    "vocab_size": VOCAB_SIZE,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": EOS_ID,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
WINDOWED = {"sliding_window": SLIDING_WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": MAX_LENGTH}
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


def build(config_name: str, defaults: dict[str, Any], seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random fp32 model in eval mode; `changes` override the family's configuration (e.g. `vocab_size=300`)."""
    config = getattr(transformers, config_name)(**{**SHARED, **defaults, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention_implementation(config)
        )
    return model.eval()


def _family(config_name: str, **defaults: Any) -> Callable[..., PreTrainedModel]:
    return partial(build, config_name, defaults)


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "qwen2": _family("Qwen2Config", **DECODER, tie_word_embeddings=True),
    "qwen3": _family("Qwen3Config", **DECODER, head_dim=16, tie_word_embeddings=True),
    "qwen3_moe": _family("Qwen3MoeConfig", **DECODER, **EXPERTS, head_dim=16, moe_intermediate_size=24),
    "llama": _family("LlamaConfig", **DECODER),
    "mistral": _family("MistralConfig", **DECODER, sliding_window=SLIDING_WINDOW),
    "mixtral": _family("MixtralConfig", **DECODER, num_local_experts=4, num_experts_per_tok=2),
    "gemma2": _family("Gemma2Config", **DECODER, **WINDOWED, head_dim=16, query_pre_attn_scalar=16),
    "gemma3": _family("Gemma3TextConfig", **DECODER, **WINDOWED, head_dim=16, query_pre_attn_scalar=16),
    "phi3": _family("Phi3Config", **DECODER, original_max_position_embeddings=MAX_LENGTH),
    "olmo2": _family("Olmo2Config", **DECODER),
    "olmoe": _family("OlmoeConfig", **DECODER, **EXPERTS),
    "gpt2": _family("GPT2Config", **GPT2, **NO_DROPOUT),
    "gpt_neox": _family("GPTNeoXConfig", **{k: v for k, v in DECODER.items() if k != "num_key_value_heads"}),
    "granite": _family(
        "GraniteConfig", **DECODER, logits_scaling=2.0, embedding_multiplier=3.0, residual_multiplier=0.5
    ),
    "smollm3": _family("SmolLM3Config", **DECODER, no_rope_layers=[1, 0]),
}

LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
SPARSE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MULTI_HEAD = {**DECODER, "num_key_value_heads": 4}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": MAX_LENGTH}

# Families beyond those promised: the probes let these in, ...
OTHER_FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "apertus": _family("ApertusConfig", **DECODER),
    "arcee": _family("ArceeConfig", **DECODER),
    "cohere": _family("CohereConfig", **DECODER),
    "cohere2": _family("Cohere2Config", **DECODER, **WINDOWED),
    "deepseek_v3": _family("DeepseekV3Config", **MULTI_HEAD, **LATENT, **SPARSE, first_k_dense_replace=1),
    "ernie4_5": _family("Ernie4_5Config", **DECODER),
    "exaone4": _family("Exaone4Config", **DECODER, **WINDOWED),
    "falcon": _family("FalconConfig", **SMALL),
    "gemma": _family("GemmaConfig", **DECODER, head_dim=16),
    "glm": _family("GlmConfig", **DECODER, head_dim=16),
    "glm4": _family("Glm4Config", **DECODER, head_dim=16),
    "gpt_bigcode": _family("GPTBigCodeConfig", **GPT2, **NO_DROPOUT),
    "gpt_oss": _family("GptOssConfig", **DECODER, **WINDOWED, **LOCAL_EXPERTS, head_dim=16),
    "gptj": _family("GPTJConfig", **GPT2, **NO_DROPOUT, rotary_dim=8),
    "granitemoe": _family("GraniteMoeConfig", **DECODER, **LOCAL_EXPERTS, logits_scaling=6.0),
    "helium": _family("HeliumConfig", **DECODER, head_dim=8),
    "hyperclovax": _family("HyperCLOVAXConfig", **DECODER, logits_scaling=0.5),
    "ministral": _family("MinistralConfig", **DECODER, **WINDOWED, head_dim=8),
    "ministral3": _family("Ministral3Config", **DECODER),
    "olmo": _family("OlmoConfig", **DECODER),
    "olmo3": _family("Olmo3Config", **DECODER, **WINDOWED),
    "opt": _family("OPTConfig", **SMALL, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0, pad_token_id=1),
    "phi": _family("PhiConfig", **DECODER),
    "qwen2_moe": _family("Qwen2MoeConfig", **DECODER, **EXPERTS, moe_intermediate_size=24),
    "seed_oss": _family("SeedOssConfig", **DECODER),
    "stablelm": _family("StableLmConfig", **DECODER),
    "starcoder2": _family("Starcoder2Config", **DECODER, sliding_window=SLIDING_WINDOW),
}
# ... and keep these out.
UNUSABLE_FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "bloom": _family("BloomConfig", hidden_size=32, n_layer=2, n_head=4),
    "gpt_neo": _family(
        "GPTNeoConfig",
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        intermediate_size=48,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=MAX_LENGTH,
    ),
}
