"""With frozen embeddings the mask token's row learns alone, and checkpoints cannot tell how it was stored."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from decausal.diffusion.layout import Layout
from decausal.models.adapt import adapt
from decausal.models.backbone import body_forward, logits
from decausal.models.mask_row import fold_mask_row, freeze_embeddings, load_mask_row, settle_mask_row
from tests.families import FAMILIES, tiny_tokenizer

BIDIRECTIONAL = Layout("bidirectional")
every_kind = pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2", "gemma3"])  # tied, untied, positions, scaled


def adapted(family: str) -> tuple[nn.Module, int]:
    model = FAMILIES[family]()
    return model, adapt(model, tiny_tokenizer())


def noised(mask_token_id: int) -> Tensor:
    return torch.tensor([[5, mask_token_id, 9, 11, mask_token_id, 2]])


@every_kind
def test_freezing_changes_no_output(family: str) -> None:
    model, mask_token_id = adapted(family)
    with torch.no_grad():
        expected = logits(model, noised(mask_token_id), BIDIRECTIONAL)
        freeze_embeddings(model, mask_token_id)
        assert torch.equal(logits(model, noised(mask_token_id), BIDIRECTIONAL), expected)


@every_kind
def test_the_rows_gradient_is_the_one_it_has_in_the_whole_matrix(family: str) -> None:
    whole, mask_token_id = adapted(family)
    frozen = copy.deepcopy(whole)
    freeze_embeddings(frozen, mask_token_id)
    for model in (whole, frozen):
        body_forward(model, noised(mask_token_id), BIDIRECTIONAL).last_hidden_state.square().sum().backward()
    expected = whole.get_input_embeddings().weight.grad[mask_token_id]
    torch.testing.assert_close(frozen.get_input_embeddings().mask_row.grad, expected)
    assert frozen.get_input_embeddings().weight.grad is None
    assert frozen.get_output_embeddings().weight.grad is None
    assert not frozen.get_output_embeddings().weight.requires_grad


@every_kind
def test_only_the_row_among_the_embeddings_is_trainable(family: str) -> None:
    model, mask_token_id = adapted(family)
    freeze_embeddings(model, mask_token_id)
    row = model.get_input_embeddings().mask_row
    assert row.shape == (model.config.hidden_size,)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(name.endswith(("embed_tokens.weight", "wte.weight", "lm_head.weight")) for name in trainable)
    assert sum(name.endswith("mask_row") for name in trainable) == 1


@every_kind
def test_folded_weights_in_a_plain_model_give_the_same_logits(family: str) -> None:
    model, mask_token_id = adapted(family)
    plain = copy.deepcopy(model)
    freeze_embeddings(model, mask_token_id)
    with torch.no_grad():
        model.get_input_embeddings().mask_row.normal_()
        before = model.get_input_embeddings().weight.clone()
        folded = fold_mask_row(model, model.state_dict())
        assert set(folded) == set(plain.state_dict())
        plain.load_state_dict(folded)
        ids = noised(mask_token_id)
        found, expected = logits(plain, ids, BIDIRECTIONAL), logits(model, ids, BIDIRECTIONAL)
        assert torch.equal(found[..., :mask_token_id], expected[..., :mask_token_id])
    assert torch.equal(model.get_input_embeddings().weight, before)


@every_kind
def test_a_tied_head_stays_tied_in_the_folded_weights(family: str) -> None:
    model, mask_token_id = adapted(family)
    freeze_embeddings(model, mask_token_id)
    folded = fold_mask_row(model, model.state_dict())
    matrices = [tensor for name, tensor in folded.items() if name.endswith(("embed_tokens.weight", "wte.weight"))]
    is_shared = folded["lm_head.weight"].data_ptr() == matrices[0].data_ptr()
    assert is_shared == model.config.tie_word_embeddings


def test_loading_folded_weights_restores_the_row() -> None:
    model, mask_token_id = adapted("qwen3")
    freeze_embeddings(model, mask_token_id)
    resumed = copy.deepcopy(model)
    with torch.no_grad():
        model.get_input_embeddings().mask_row.normal_()
    missing = resumed.load_state_dict(fold_mask_row(model, model.state_dict()), strict=False)
    assert [name.rpartition(".")[2] for name in missing.missing_keys] == ["mask_row"]
    load_mask_row(resumed)
    assert torch.equal(resumed.get_input_embeddings().mask_row, model.get_input_embeddings().mask_row)


def test_without_a_row_folding_and_loading_do_nothing() -> None:
    model, _ = adapted("qwen3")
    state_dict = model.state_dict()
    assert fold_mask_row(model, state_dict) is state_dict
    load_mask_row(model)


def test_freezing_twice_keeps_what_was_learnt() -> None:
    model, mask_token_id = adapted("qwen3")
    freeze_embeddings(model, mask_token_id)
    with torch.no_grad():
        model.get_input_embeddings().mask_row.normal_()
    learnt = model.get_input_embeddings().mask_row.clone()
    freeze_embeddings(model, mask_token_id)
    assert torch.equal(model.get_input_embeddings().mask_row, learnt)
    assert len(model.get_input_embeddings()._forward_hooks) == 1


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("fold_by_wrapper", [True, False])
def test_under_lora_the_row_trains_and_folds_too(family: str, fold_by_wrapper: bool) -> None:
    model, mask_token_id = adapted(family)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    freeze_embeddings(wrapped, mask_token_id)
    body_forward(wrapped, noised(mask_token_id), BIDIRECTIONAL).last_hidden_state.square().sum().backward()
    row = wrapped.get_input_embeddings().mask_row
    assert row.grad.abs().sum() > 0
    trainable = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert all(".lora_" in name or name.endswith("mask_row") for name in trainable)
    with torch.no_grad():
        row.normal_()
    folded = fold_mask_row(wrapped if fold_by_wrapper else wrapped.get_base_model(), wrapped.state_dict())
    assert torch.equal(folded["base_model.model.model.embed_tokens.weight"][mask_token_id], row)
    assert not any(name.endswith("mask_row") for name in folded)


def test_gradient_reaches_the_row_through_checkpointed_layers() -> None:
    model, mask_token_id = adapted("llama")
    freeze_embeddings(model, mask_token_id)
    gradients = []
    for use_checkpointing in (False, True):
        if use_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train().zero_grad()
        body_forward(model, noised(mask_token_id), BIDIRECTIONAL).last_hidden_state.square().sum().backward()
        gradients.append(model.get_input_embeddings().mask_row.grad)
    assert torch.equal(*gradients)


@every_kind
def test_settling_the_row_leaves_the_stock_model_with_the_same_outputs(family: str) -> None:
    model, mask_token_id = adapted(family)
    names = set(model.state_dict())
    freeze_embeddings(model, mask_token_id)
    with torch.no_grad():
        model.get_input_embeddings().mask_row.normal_()
        ids = noised(mask_token_id)
        expected = body_forward(model, ids, BIDIRECTIONAL).last_hidden_state
        folded = fold_mask_row(model, model.state_dict())
        settle_mask_row(model)
        settle_mask_row(model)
        assert torch.equal(body_forward(copy.deepcopy(model), ids, BIDIRECTIONAL).last_hidden_state, expected)
    assert set(model.state_dict()) == names
    assert all(torch.equal(tensor, folded[name]) for name, tensor in model.state_dict().items())
