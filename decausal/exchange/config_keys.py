"""Which keys of a public config.json are understood, and which are refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from decausal.errors import UserError

# What transformers itself, trainers and engines leave in a config.json; none of it changes what is computed.
NEUTRAL = frozenset(
    """
    _attn_implementation _name_or_path architectures attention_dropout attn_implementation auto_map bos_token_id
    chunk_size_feed_forward debug decausal dtype ep_size eos_token_id fuse_cross_entropy id2label initializer_range
    is_decoder is_encoder_decoder label2id mask_token_id max_window_layers micro_forward model_type
    output_attentions output_hidden_states output_router_logits pad_token_id problem_type return_dict
    router_aux_loss_coef skip_checkpoint sliding_window tokenizer_class torch_dtype transformers_version use_cache
    use_deepep
    """.split()  # noqa: SIM905
)


def refuse_keys(
    config: Mapping[str, Any], known: Collection[str], fixed: Mapping[str, Any], ignored: Collection[str]
) -> None:
    """Raises UserError, with names, for keys that are not known and switches that are set otherwise than `fixed`."""
    unknown = {name for name, value in config.items() if name not in known and value is not None} - set(ignored)
    if unknown:
        shown = ", ".join(f"{name} = {config[name]!r}" for name in sorted(unknown))
        raise UserError(
            f"config.json holds {shown}, which import does not know and which might change what the model computes; "
            f"if it does not, repeat with --ignore_keys {','.join(sorted(unknown))}"
        )
    for name, value in fixed.items():
        if config.get(name) is not None and config[name] != value and name not in ignored:
            raise UserError(f"config.json has {name} = {config[name]!r}; import takes models with {value!r} alone")
