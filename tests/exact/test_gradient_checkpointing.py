"""Identity 8: recomputing activations in the backward pass changes no gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from decausal.data.block_collator import BlockCollator
from decausal.data.stream import Batch, Collator, Noising, TrainingStream
from decausal.diffusion.layout import Layout, future_order
from decausal.models.backbone import decoder_layers, stock_model
from decausal.models.mask_row import freeze_embeddings
from decausal.training.losses import Supervision, loss_sums
from decausal.training.questions import Answers, Vocabulary, ask
from decausal.training.settings import ConversionSettings
from decausal.training.student import with_adapters
from decausal.training.terms import AlignmentTerm, TokenTerm
from tests.families import VOCAB_SIZE
from tests.runs import BIDIRECTIONAL, T, adapted, teacher_of, uneven_rows

FAMILIES_HERE = ["qwen3", "qwen3_moe", "gemma2", "gpt2", "mistral", "smollm3"]
TOKENS, ALIGNMENT = TokenTerm(papl=1.0), AlignmentTerm((0, 1, 2))


def aligned_batch(family: str, mask_token_id: int, layout: Layout = BIDIRECTIONAL) -> tuple[Batch, Answers]:
    """Two rows in two complementary views with half-open attention (but in blocks), and the teacher's states."""
    stream = TrainingStream(uneven_rows(), 8, seed=0, shift=1, noising=Noising(2, complementary=True))
    collator = BlockCollator(mask_token_id, 1, layout) if layout.kind == "block" else Collator(mask_token_id, 1)
    batch = collator([stream[2], stream[3]])
    batch["future_order"], batch["future_fraction"] = future_order(T, 0, "cpu"), 0.5
    return batch, ask(teacher_of(family), ALIGNMENT.questions, batch, Vocabulary(VOCAB_SIZE, mask_token_id))


def gradients(
    model: nn.Module, batch: tuple[Batch, Answers], mask_token_id: int, layout: Layout = BIDIRECTIONAL
) -> dict[str, Tensor]:
    rows, answers = batch
    sums = loss_sums(model, rows, Supervision(layout, mask_token_id), (TOKENS, ALIGNMENT), answers)
    (sums[TOKENS] + 10 * sums[ALIGNMENT]).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def count_layer_calls(model: PreTrainedModel) -> list[int]:
    calls: list[int] = []
    layer = decoder_layers(model)[0]
    for module in layer.children():
        module.register_forward_hook(lambda *_: calls.append(1))
        break
    return calls


def assert_equal_with_checkpointing(
    model: nn.Module, batch: tuple[Batch, Answers], mask_token_id: int, layout: Layout = BIDIRECTIONAL
) -> None:
    model.train()
    checkpointed = copy.deepcopy(model)
    stock_model(checkpointed).gradient_checkpointing_enable()
    expected = gradients(model, batch, mask_token_id, layout)
    calls = count_layer_calls(stock_model(checkpointed))
    found = gradients(checkpointed, batch, mask_token_id, layout)
    assert len(calls) == 2  # once forward, once recomputed: checkpointing was on
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().sum() > 0, name
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("family", FAMILIES_HERE)
def test_gradients_are_those_without_checkpointing(family):
    model, mask_token_id = adapted(family)
    assert_equal_with_checkpointing(model, aligned_batch(family, mask_token_id), mask_token_id)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "mistral"])
@pytest.mark.parametrize("causal_context", [False, True])
def test_with_doubled_rows_too(family, causal_context):
    model, mask_token_id = adapted(family)
    layout = Layout("block", 4, causal_context)
    assert_equal_with_checkpointing(model, aligned_batch(family, mask_token_id, layout), mask_token_id, layout)


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_with_frozen_embeddings_too(family):
    model, mask_token_id = adapted(family)
    batch = aligned_batch(family, mask_token_id)
    freeze_embeddings(model, mask_token_id)
    assert_equal_with_checkpointing(model, batch, mask_token_id)


def test_with_adapters_too():
    model, mask_token_id = adapted("llama")
    batch = aligned_batch("llama", mask_token_id)
    wrapped = with_adapters(ConversionSettings(lora_r=4), model)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)  # at zero, lora_A has no gradient
    freeze_embeddings(wrapped, mask_token_id)
    assert_equal_with_checkpointing(wrapped, batch, mask_token_id)
