"""FlexAttention for a whole model. On a GPU it skips what no query reads, while dense masks pay for every pair."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from decausal.diffusion.layout import Layout
from decausal.errors import UserError
from decausal.models.backbone import body_forward
from decausal.models.row_attention import FLEX

# There is one program for each layout, window and mode, first for one row length, then for any. Dynamo's own limit of 8
# is reached soon. Programs after that would run uncompiled, slowly and silently.
NUM_PROGRAMS = 64


def use_flex_attention(model: PreTrainedModel, layout: Layout, device: torch.device) -> None:
    """Moves `model` to a GPU and makes it attend by FlexAttention, after a trial on a short row.

    Raises:
        UserError: The device is not a GPU (only GPUs have a backward pass), or the model's code does not take block
            masks.
    """
    if device.type != "cuda":
        raise UserError(f"--attn_implementation {FLEX} needs a GPU: on a CPU it cannot be trained; leave it out")
    model.to(device)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, NUM_PROGRAMS)
    before, was_training = model.config._attn_implementation, model.training
    try:
        model.set_attn_implementation(FLEX)
        row = torch.arange(12, device=model.device)[None]
        with torch.no_grad():
            body_forward(model.train(), row, layout, document_ids=row // 7)
    except Exception as error:  # models fail under it in many ways: attributes, shapes, the compiler
        model.set_attn_implementation(before)
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"--attn_implementation {FLEX}: a model of type '{model.config.model_type}' does not run under it "
            f"({type(error).__name__}: {reason}); leave it out"
        ) from error
    finally:
        model.train(was_training)
