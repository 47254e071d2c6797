"""One forward pass for every stock model: conventions that the other rooms rely on."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from decausal.diffusion.layout import Layout, future_order
from decausal.errors import UserError
from decausal.models.backbone import body_forward, decoder_layers, head_of, logits
from decausal.objectives import head as output_head
from tests.families import FAMILIES, OTHER_FAMILIES

CAUSAL, BIDIRECTIONAL, BLOCKWISE = Layout("causal"), Layout("bidirectional"), Layout("block", 4)
IDS = torch.arange(3, 123, 10)[None]
every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
@torch.no_grad()
def test_the_last_of_l_plus_one_states_is_what_the_head_reads(family: str) -> None:
    model = FAMILIES[family]()
    output = body_forward(model, IDS, CAUSAL, output_hidden_states=True)
    assert len(output.hidden_states) == len(decoder_layers(model)) + 1
    assert output.hidden_states[-1] is output.last_hidden_state
    found = output_head.logits(output.hidden_states[-1][0], head_of(model))
    torch.testing.assert_close(found, model(IDS).logits[0], rtol=1e-6, atol=1e-6)


@every_family
@torch.no_grad()
def test_earlier_states_are_the_inputs_of_the_layers(family: str) -> None:
    model, inputs = FAMILIES[family](), []
    for layer in decoder_layers(model):
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    output = body_forward(model, IDS, BIDIRECTIONAL, output_hidden_states=True)
    assert all(map(torch.equal, output.hidden_states[:-1], inputs))


class HostReads(TorchDispatchMode):
    """Counts the values that the host reads: on a GPU it waits for each."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@every_family
@pytest.mark.parametrize("layout", [CAUSAL, BIDIRECTIONAL], ids=lambda layout: layout.kind)
@pytest.mark.parametrize("documents", [None, torch.arange(12)[None] // 5], ids=["one document", "packed"])
@torch.no_grad()
def test_the_host_never_waits_for_a_value(family: str, layout: Layout, documents: torch.Tensor | None) -> None:
    model = FAMILIES[family]().eval()
    with HostReads() as reads:
        body_forward(model, IDS, layout, document_ids=documents)
    assert reads.count == 0


def test_states_are_kept_only_on_request() -> None:
    assert body_forward(FAMILIES["llama"](), IDS, CAUSAL).hidden_states is None


@pytest.mark.parametrize("family", ["granitemoe", "cohere", "hyperclovax"])
def test_scaled_heads_give_the_stock_logits(family: str) -> None:
    model = OTHER_FAMILIES[family]()
    with torch.no_grad():
        torch.testing.assert_close(logits(model, IDS, CAUSAL), model(IDS).logits, rtol=1e-6, atol=1e-6)


def test_capped_head_is_read_with_its_cap() -> None:
    assert head_of(FAMILIES["gemma2"]()).softcap == 30.0
    assert head_of(FAMILIES["gemma3"]()).softcap is None


@every_family
@torch.no_grad()
def test_annealing_runs_from_causal_to_its_layout(family: str) -> None:
    model, order = FAMILIES[family](), future_order(IDS.shape[1], seed=3)
    causal, target = (body_forward(model, IDS, layout).last_hidden_state for layout in (CAUSAL, BIDIRECTIONAL))
    closed, half, opened = (
        body_forward(model, IDS, BIDIRECTIONAL, future=(order, fraction)).last_hidden_state
        for fraction in (0.0, 0.5, 1.0)
    )
    torch.testing.assert_close(closed, causal, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(opened, target, rtol=1e-5, atol=1e-5)
    assert (half - causal).abs().max() > 1e-3
    assert (half - target).abs().max() > 1e-3


@torch.no_grad()
def test_given_positions_replace_those_of_the_documents() -> None:
    model = FAMILIES["gpt2"]()
    positions = torch.arange(IDS.shape[1])[None]
    shifted = body_forward(model, IDS, CAUSAL, position_ids=positions + 1).last_hidden_state
    plain = body_forward(model, IDS, CAUSAL, position_ids=positions).last_hidden_state
    torch.testing.assert_close(plain, body_forward(model, IDS, CAUSAL).last_hidden_state, rtol=1e-5, atol=1e-5)
    assert (shifted - plain).abs().max() > 1e-3


@every_family
def test_gradients_do_not_depend_on_checkpointed_layers(family: str) -> None:
    documents = torch.tensor([[0] * 5 + [1] * 7])
    for layout, document_ids in ((BIDIRECTIONAL, None), (BIDIRECTIONAL, documents), (BLOCKWISE, documents)):
        gradients = []
        for use_checkpointing in (False, True):
            model = FAMILIES[family]().train()
            if use_checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            states = body_forward(model, IDS, layout, document_ids=document_ids).last_hidden_state
            states.pow(3).mean().backward()
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        assert all(map(torch.equal, *gradients))


@torch.no_grad()
def test_an_adapter_is_active_through_its_wrapper_and_through_the_stock_model() -> None:
    model = FAMILIES["qwen3"]()
    before = body_forward(model, IDS, BIDIRECTIONAL).last_hidden_state
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    outer = body_forward(wrapped, IDS, BIDIRECTIONAL).last_hidden_state
    assert torch.equal(outer, body_forward(wrapped.get_base_model(), IDS, BIDIRECTIONAL).last_hidden_state)
    assert not torch.equal(outer, before)
    with wrapped.disable_adapter():
        assert torch.equal(body_forward(wrapped, IDS, BIDIRECTIONAL).last_hidden_state, before)


def test_an_adapter_on_the_head_is_refused() -> None:
    wrapped = get_peft_model(FAMILIES["llama"](), LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(UserError, match="must be a plain linear layer"):
        head_of(wrapped)


def test_an_attention_that_takes_no_masks_is_refused() -> None:
    model = FAMILIES["llama"]()
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UserError, match="'flash_attention_2' takes no layout masks"):
        body_forward(model, IDS, BLOCKWISE)
