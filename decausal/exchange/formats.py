"""The forms in which diffusion language models are published, read from their config.json alone.

Each form is a stock architecture under other names. An unknown key is refused unless it is null, because it might
change the mathematics. Keys and their meaning were read in the models' public configuration and modelling files
(November 2026): JetAstra/SDAR, DreamLM/Dream, ML-GSAI/LLaDA, NVlabs/Fast-dLLM and the checkpoints they name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from decausal.errors import UserError, nearest

# Keys that transformers, trainers and engines leave in a config.json and that do not change what is computed.
_NEUTRAL = frozenset(
    """
    _attn_implementation _name_or_path architectures attention_dropout attn_implementation auto_map bos_token_id
    chunk_size_feed_forward debug decausal dtype ep_size eos_token_id fuse_cross_entropy id2label initializer_range
    is_decoder is_encoder_decoder label2id mask_token_id max_window_layers micro_forward model_type
    output_attentions output_hidden_states output_router_logits pad_token_id problem_type return_dict
    router_aux_loss_coef skip_checkpoint sliding_window tokenizer_class torch_dtype transformers_version use_cache
    use_deepep
    """.split()  # noqa: SIM905
)
_QWEN = (
    *("hidden_act", "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads"),
    *("num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "vocab_size"),
)
_QWEN3 = (*_QWEN, "attention_bias", "head_dim")
_EXPERTS = ("decoder_sparse_step", "moe_intermediate_size", "norm_topk_prob", "num_experts", "num_experts_per_tok")
_OPTIONAL = frozenset({"attention_bias", "decoder_sparse_step", "head_dim", "tie_word_embeddings"})
# Switches that must be set like this. Otherwise no stock class with our layouts has the same mathematics.
_FIXED: dict[str, Any] = {"hidden_act": "silu", "use_sliding_window": False, "use_mrope": False}
_FIXED |= {"mlp_only_layers": [], "decoder_sparse_step": 1}
# LLaDA is a Llama model with the names of OLMo. These switches must be set like this.
_LLADA_FIXED: dict[str, Any] = {
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
# Numbers that are needed, then numbers that may be missing or follow from others.
_LLADA_NEEDED = ("d_model", "max_sequence_length", "n_heads", "n_layers", "rms_norm_eps", "rope_theta", "vocab_size")
_LLADA_DERIVED = (
    "embedding_size",
    "mlp_hidden_size",
    "mlp_ratio",
    "multi_query_attention",
    "n_kv_heads",
    "weight_tying",
)
# Dropout, initialisation and kernels. The precision of rotary embeddings does not change the mathematics.
_LLADA_WITHOUT_EFFECT = frozenset(
    """
    alibi_bias_max attention_layer_norm_with_affine embedding_dropout flash_attention flash_attn_varlen
    init_cutoff_factor init_device init_fn init_std precision residual_dropout rope_full_precision
    """.split()  # noqa: SIM905
)
_LLADA_OUTER = {
    "model.transformer.wte.weight": "model.embed_tokens.weight",
    "model.transformer.ln_f.weight": "model.norm.weight",
    "model.transformer.ff_out.weight": "lm_head.weight",
}
_LLADA_IN_LAYER = {
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
_LLADA_LAYER = re.compile(r"model\.transformer\.blocks\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True)
class PublicForm:
    """A published form of diffusion language models.

    Attributes:
        name: Its usual name.
        model_type: `model_type` in its config.json.
        layout: Its attention layout.
        shift: 1 if the state before a token predicts it.
        stock: Returns the stock configuration for a config.json.
        block_key: The key of the block size, for the layout "block".
        mask_token_id: The default if config.json has none. None: config.json must have it.
        renamed: Returns a tensor's stock name.
        sampler: Settings of the form's own sampler that differ from our defaults.
    """

    name: str
    model_type: str
    layout: str
    shift: int
    stock: Callable[[Mapping[str, Any], Collection[str]], PretrainedConfig]
    block_key: str | None = None
    mask_token_id: int | None = None
    renamed: Callable[[str], str] = str
    sampler: Mapping[str, Any] = field(default_factory=dict)


def form_of(config: Mapping[str, Any], where: object) -> PublicForm:
    """Returns the form of a config.json.

    Raises:
        UserError: It has no known form.
    """
    model_type = config.get("model_type")
    for form in FORMS:
        if form.model_type == model_type:
            return form
    known = ", ".join(f"{form.model_type} ({form.name})" for form in FORMS)
    hint = nearest(str(model_type), [form.model_type for form in FORMS])
    raise UserError(f"{where} has model type '{model_type}'{hint}; import reads {known}")


def block_size_of(form: PublicForm, config: Mapping[str, Any], asked: int | None) -> int | None:
    """Returns the block size: `asked`, or the one in config.json.

    Raises:
        UserError: The form has blocks of unknown size, or it has no blocks and a size was given.
    """
    if form.block_key is None:
        if asked is not None:
            raise UserError(f"--block_size {asked}: {form.name} has no blocks; leave it out")
        return None
    found = asked if asked is not None else config.get(form.block_key)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise UserError(f"config.json has {form.block_key} {found!r}; give the block size with --block_size")
    return found


def mask_token_id_of(form: PublicForm, config: Mapping[str, Any], asked: int | None) -> int:
    """Returns the mask token's id: `asked`, or the one of config.json or of the form.

    Raises:
        UserError: None of them has one.
    """
    for found in (asked, config.get("mask_token_id"), form.mask_token_id):
        if found is not None:
            return int(found)
    raise UserError("config.json has no mask_token_id; give it with --mask_token_id")


def _qwen(
    stock: type[PretrainedConfig], copied: tuple[str, ...], special: tuple[str, ...] = ()
) -> Callable[[Mapping[str, Any], Collection[str]], PretrainedConfig]:
    """Returns `stock` for a config.json with a Qwen model's keys, and `special` keys that are facts."""

    def make(config: Mapping[str, Any], ignored: Collection[str]) -> PretrainedConfig:
        config = {**config, "rope_theta": _rope_theta(config)}
        known = {*copied, *special, *_FIXED, *_NEUTRAL, "layer_types", "rope_parameters", "rope_scaling"}
        _refuse_keys(config, known, _FIXED, ignored)
        if any(kind != "full_attention" for kind in config.get("layer_types") or ()):
            raise UserError("config.json has layers other than full_attention, which these models do not have")
        missing = sorted(name for name in copied if config.get(name) is None and name not in _OPTIONAL)
        if missing:
            raise UserError(f"config.json lacks {', '.join(missing)}")
        return stock(**{name: config[name] for name in copied if config.get(name) is not None})

    return make


def _rope_theta(config: Mapping[str, Any]) -> float | None:
    """Returns the base of the rotary embedding, which transformers 4 and 5 store in different places.

    Raises:
        UserError: The embedding is scaled.
    """
    rope = config.get("rope_parameters") or {}
    for scaling in (rope, config.get("rope_scaling") or {}):
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default":
            raise UserError(f"config.json scales the rotary embedding ('{kind}'); import takes models without scaling")
    return config.get("rope_theta", rope.get("rope_theta"))


def _llada_name(name: str) -> str:
    """Returns the stock name of a LLaDA tensor; other names unchanged."""
    found = _LLADA_LAYER.fullmatch(name)
    if found and found[2] in _LLADA_IN_LAYER:
        return f"model.layers.{found[1]}.{_LLADA_IN_LAYER[found[2]]}.weight"
    return _LLADA_OUTER.get(name, name)


def _llada_config(config: Mapping[str, Any], ignored: Collection[str]) -> LlamaConfig:
    """Returns the stock configuration of a LLaDA config.json.

    Raises:
        UserError: A number is missing, a key is not known, or a switch makes it something other than a Llama model.
    """
    _refuse_keys(
        config,
        {*_LLADA_NEEDED, *_LLADA_DERIVED, *_LLADA_FIXED, *_LLADA_WITHOUT_EFFECT, *_NEUTRAL},
        _LLADA_FIXED,
        ignored,
    )
    missing = [name for name in _LLADA_NEEDED if config.get(name) is None]
    # Without these keys, its code uses another block, another norm and no rotary embedding.
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


def _refuse_keys(
    config: Mapping[str, Any], known: Collection[str], fixed: Mapping[str, Any], ignored: Collection[str]
) -> None:
    """Raises UserError, with names, for unknown keys and for switches that differ from `fixed`."""
    unknown = {name for name, value in config.items() if name not in known and value is not None} - set(ignored)
    if unknown:
        shown = ", ".join(f"{name} = {config[name]!r}" for name in sorted(unknown))
        raise UserError(
            f"config.json holds {shown}, which import does not know and which might change what the model computes; "
            f"if it does not, repeat with --ignore_keys {','.join(sorted(unknown))}"
        )
    for name, value in fixed.items():
        if config.get(name) is not None and config[name] != value and name not in ignored:
            raise UserError(f"config.json has {name} = {config[name]!r}; import only takes models with {value!r}")


FORMS = (
    PublicForm(
        name="SDAR",
        model_type="sdar",
        layout="block",
        shift=0,
        stock=_qwen(Qwen3Config, _QWEN3, ("block_size",)),
        block_key="block_size",
        mask_token_id=151669,
        sampler={"verifier": "masks"},  # its finished tokens were not trained to predict the next one
    ),
    PublicForm(
        name="SDAR, mixture of experts",
        model_type="sdar_moe",
        layout="block",
        shift=0,
        stock=_qwen(Qwen3MoeConfig, (*_QWEN3, *_EXPERTS), ("block_size",)),
        block_key="block_size",
        mask_token_id=151669,
        sampler={"verifier": "masks"},  # its finished tokens were not trained to predict the next one
    ),
    PublicForm(name="Dream", model_type="Dream", layout="bidirectional", shift=1, stock=_qwen(Qwen2Config, _QWEN)),
    PublicForm(
        name="Fast-dLLM v2",
        model_type="Fast_dLLM_Qwen",
        layout="block",
        shift=1,
        # The last two switches concern training only. The published files spell the last one like this.
        stock=_qwen(Qwen2Config, _QWEN, ("bd_size", "complementary_mask", "conplemenrary_mask")),
        block_key="bd_size",
        mask_token_id=151665,  # the default in its code
        sampler={"first_token_from_clean": True},
    ),
    PublicForm(
        name="LLaDA",
        model_type="llada",
        layout="bidirectional",
        shift=0,
        stock=_llada_config,
        mask_token_id=126336,
        renamed=_llada_name,
    ),
)
