"""Weights that are sharded over processes by FSDP or DeepSpeed, through transformers and accelerate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainingArguments

from decausal.errors import UserError
from decausal.models.backbone import decoder_layers


def refuse_partitioned(args: TrainingArguments) -> None:
    """Raises UserError under DeepSpeed ZeRO-3, where transformers never loads a whole model, and probes see nothing."""
    plugin = args.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        raise UserError("--deepspeed: ZeRO-3 is not accepted; give ZeRO-1 or 2, or FSDP2, which also shards weights")


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Makes all of a model's weights whole inside, for calls that do not go through the model's own forward.

    Inside, processes need not run in step, because passes of the model exchange nothing.

    Only use it inside that forward (`model(inside=...)`): FSDP2 takes the module of the first forward as the root.
    """
    sharded = _units(model)
    groups = {group for module in sharded if (group := module._get_fsdp_state()._fsdp_param_group) is not None}
    after_forward = {group: group.post_forward_mesh_info for group in groups}  # FSDP2 can only set it, not read it
    for module in sharded:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for group, mesh in after_forward.items():
            group.post_forward_mesh_info = mesh
        for module in sharded:
            module.reshard()


def shard_layers(model: PreTrainedModel) -> None:
    """Shards the decoder layers of a frozen model over all processes. Embeddings, last norm and head stay whole.

    Each pass of its body gathers one layer after another. The head is always whole, since losses use it at any time.
    """
    body, layers = model.base_model, decoder_layers(model)
    whole = set(body.parameters()) - set(layers.parameters())
    for layer in layers:
        fully_shard(layer, reshard_after_forward=True)
    fully_shard(body, ignored_params=whole)


def gather_head(model: PreTrainedModel) -> None:
    """Makes the head's weights whole if FSDP2 shards the head separately, since losses read them without its
    forward."""
    head = model.get_output_embeddings()
    if isinstance(head, FSDPModule):
        head.unshard()


def reshard(model: nn.Module) -> None:
    """Reshards all of a model's weights, some of which FSDP2 keeps whole until the next backward pass."""
    for unit in _units(model):
        unit.reshard()


def _units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def are_finite(model: nn.Module) -> Bool[Tensor, ""]:
    """Returns whether all of this process's weights or shards are finite."""
    local = (weight.to_local() if isinstance(weight, DTensor) else weight for weight in model.parameters())
    return torch.stack([weight.detach().isfinite().all() for weight in local]).all()


def tie(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a gathered state dict with one tensor per parameter of the model, so that it is saved once.

    Args:
        model: The model of the weights.
        state_dict: Gathered weights. A parameter with two names has equal but separate tensors.
    """
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in state_dict:
            names[parameter].append(name)
    return state_dict | {name: state_dict[same[0]] for same in names.values() for name in same}
