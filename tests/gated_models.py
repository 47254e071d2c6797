"""Tiny random gated models."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from decausal.models.draft_head import draft_head_of, install_draft_head
from decausal.models.gated import gated_mask_token_id, install_gate
from tests.families import VOCAB_SIZE

FACTS: dict[str, Any] = {"layout": "block", "block_size": 4, "causal_context": True, "weights": "gated"}


def gated(source: PreTrainedModel, scale: float = 1.0, *, head: bool = False) -> Any:
    """The source with large random adapters, gated, on weights of its own; perhaps with a random draft head."""
    torch.manual_seed(1)
    is_conv = source.config.model_type == "gpt2"
    adapters = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", fan_in_fan_out=is_conv)
    student = get_peft_model(copy.deepcopy(source), adapters)
    for name, parameter in student.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=scale)
    install_gate(student, gated_mask_token_id(source), torch.randn(source.config.hidden_size))
    if head:
        install_draft_head(student, torch.arange(0, VOCAB_SIZE, 2))  # a part of the vocabulary
        for parameter in draft_head_of(student).parameters():
            torch.nn.init.normal_(parameter, std=scale)
    return student.eval()
