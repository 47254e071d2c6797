"""The forms in which diffusion language models are published, read from their config.json alone.

Each form is a stock architecture under other names. A key that decausal does not know is refused unless it is null:
it might change the mathematics. Keys and their meaning were read in the models' public configuration and modelling
files (November 2026): JetAstra/SDAR, DreamLM/Dream, ML-GSAI/LLaDA, NVlabs/Fast-dLLM and the checkpoints they name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from decausal.errors import UserError, nearest
from decausal.exchange.config_keys import NEUTRAL, refuse_keys
from decausal.exchange.formats_llada import llada_config, llada_name

_QWEN = (
    *("hidden_act", "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads"),
    *("num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "vocab_size"),
)
_QWEN3 = (*_QWEN, "attention_bias", "head_dim")
_EXPERTS = ("decoder_sparse_step", "moe_intermediate_size", "norm_topk_prob", "num_experts", "num_experts_per_tok")
_OPTIONAL = frozenset({"attention_bias", "decoder_sparse_step", "head_dim", "tie_word_embeddings"})
# Switches whose other setting changes the mathematics in a way that no stock class with our layouts has.
_FIXED: dict[str, Any] = {"hidden_act": "silu", "use_sliding_window": False, "use_mrope": False}
_FIXED |= {"mlp_only_layers": [], "decoder_sparse_step": 1}


@dataclass(frozen=True)
class PublicForm:
    """One form.

    Attributes:
        name: how people call it.
        model_type: in its config.json.
        layout: its attention layout.
        shift: 1 where the state before a token predicts it.
        stock: makes the stock configuration from config.json.
        block_key: key of the block size, for the layout "block".
        mask_token_id: where config.json does not say; None: it must.
        renamed: a tensor's stock name.
        sampler: settings of the form's own sampler that are not ours by default.
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
    """Returns the form that a config.json is of.

    Raises:
        UserError: it is of none.
    """
    model_type = config.get("model_type")
    for form in FORMS:
        if form.model_type == model_type:
            return form
    known = ", ".join(f"{form.model_type} ({form.name})" for form in FORMS)
    hint = nearest(str(model_type), [form.model_type for form in FORMS])
    raise UserError(f"{where} has model type '{model_type}'{hint}; import reads {known}")


def block_size_of(form: PublicForm, config: Mapping[str, Any], asked: int | None) -> int | None:
    """The block size: `asked`, or what config.json says.

    Raises:
        UserError: the form has blocks and neither says their size, or it has none and one was asked for.
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
    """The mask token's id: `asked`, or what config.json or the form says.

    Raises:
        UserError: none of them does.
    """
    for found in (asked, config.get("mask_token_id"), form.mask_token_id):
        if found is not None:
            return int(found)
    raise UserError("config.json has no mask_token_id; give it with --mask_token_id")


def _qwen(
    stock: type[PretrainedConfig], copied: tuple[str, ...], special: tuple[str, ...] = ()
) -> Callable[[Mapping[str, Any], Collection[str]], PretrainedConfig]:
    """A form whose config.json has a Qwen model's own keys, and `special` ones that are facts."""

    def make(config: Mapping[str, Any], ignored: Collection[str]) -> PretrainedConfig:
        config = {**config, "rope_theta": _rope_theta(config)}
        known = {*copied, *special, *_FIXED, *NEUTRAL, "layer_types", "rope_parameters", "rope_scaling"}
        refuse_keys(config, known, _FIXED, ignored)
        if any(kind != "full_attention" for kind in config.get("layer_types") or ()):
            raise UserError("config.json has layers other than full_attention, which these models do not have")
        missing = sorted(name for name in copied if config.get(name) is None and name not in _OPTIONAL)
        if missing:
            raise UserError(f"config.json lacks {', '.join(missing)}")
        return stock(**{name: config[name] for name in copied if config.get(name) is not None})

    return make


def _rope_theta(config: Mapping[str, Any]) -> float | None:
    """The base of the rotary embedding, which transformers 4 and 5 write in different places.

    Raises:
        UserError: the embedding is scaled.
    """
    rope = config.get("rope_parameters") or {}
    for scaling in (rope, config.get("rope_scaling") or {}):
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default":
            raise UserError(f"config.json scales the rotary embedding ('{kind}'); import takes models without scaling")
    return config.get("rope_theta", rope.get("rope_theta"))


FORMS = (
    PublicForm(
        name="SDAR",
        model_type="sdar",
        layout="block",
        shift=0,
        stock=_qwen(Qwen3Config, _QWEN3, ("block_size",)),
        block_key="block_size",
        mask_token_id=151669,
    ),
    PublicForm(
        name="SDAR, mixture of experts",
        model_type="sdar_moe",
        layout="block",
        shift=0,
        stock=_qwen(Qwen3MoeConfig, (*_QWEN3, *_EXPERTS), ("block_size",)),
        block_key="block_size",
        mask_token_id=151669,
    ),
    PublicForm(name="Dream", model_type="Dream", layout="bidirectional", shift=1, stock=_qwen(Qwen2Config, _QWEN)),
    PublicForm(
        name="Fast-dLLM v2",
        model_type="Fast_dLLM_Qwen",
        layout="block",
        shift=1,
        # The two switches, of which the published files hold the second as it is spelt here, speak of training alone.
        stock=_qwen(Qwen2Config, _QWEN, ("bd_size", "complementary_mask", "conplemenrary_mask")),
        block_key="bd_size",
        mask_token_id=151665,  # a default of its code
        sampler={"first_token_from_clean": True},
    ),
    PublicForm(
        name="LLaDA",
        model_type="llada",
        layout="bidirectional",
        shift=0,
        stock=llada_config,
        mask_token_id=126336,
        renamed=llada_name,
    ),
)
