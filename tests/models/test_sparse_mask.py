"""Attention under a sparse mask is attention under the dense one, and computes less."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from decausal.diffusion.layout import Layout, attention_mask, positions_in_documents
from decausal.models import sparse_mask
from decausal.models.backbone import body_forward
from decausal.models.sparse_mask import SparseMask
from tests.families import FAMILIES

CHUNK = 8
CAUSAL, BIDIRECTIONAL = Layout("causal"), Layout("bidirectional")


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(sparse_mask, "CHUNK", CHUNK)


def attention(mask: Tensor, states: list[Tensor], **options: object) -> list[Tensor]:
    """The output, and the gradients of a function of it."""
    leaves = [part.clone().requires_grad_() for part in states]
    output = scaled_dot_product_attention(*leaves, attn_mask=mask, **options)
    weight = torch.linspace(-1.0, 1.0, output.numel(), dtype=output.dtype).view(output.shape)
    return [output, *torch.autograd.grad((output * weight).sum(), leaves)]


def random_states(num_rows: int, length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    # Laid out as models do: [B, S, H, d] in memory.
    return [torch.randn(num_rows, length, 2, 4, dtype=dtype).transpose(1, 2) for _ in range(3)]


def packed(lengths: list[list[int]]) -> Tensor:
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(CHUNK + 1, 40), st.floats(0.02, 0.3), st.integers(0, 2**16))
def test_any_mask_gives_what_the_dense_one_gives(num_rows, length, share, seed):
    torch.manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_mask, "CHUNK", CHUNK)
        patch.setattr(sparse_mask, "WORTHWHILE", 2.0)  # whether it pays or not
        mask = (torch.rand(num_rows, 1, length, length) < share) | torch.eye(length, dtype=torch.bool)
        sparse, states = SparseMask.of(mask), random_states(num_rows, length)
        assert isinstance(sparse, SparseMask)
        for found, expected in zip(attention(sparse, states), attention(mask, states), strict=True):
            torch.testing.assert_close(found, expected)


def test_autocast_gives_it_the_type_that_it_gives_the_dense_one():
    mask = torch.ones(1, 1, 32, 32, dtype=torch.bool).tril()
    query, key, value = random_states(1, 32, torch.float32)
    states = [query, key, value.bfloat16()]  # rotated in fp32, projected in bf16
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = attention(SparseMask.of(mask), states), attention(mask, states)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.02)  # and of the same type


def documents_of(kind: str) -> tuple[Layout, Tensor]:
    return {
        "causal": (CAUSAL, packed([[32], [32]])),
        "alike": (BIDIRECTIONAL, packed([[16, 16], [16, 16]])),
        "different": (BIDIRECTIONAL, packed([[8, 24], [24, 8]])),  # together their rows read nearly everything
    }[kind]


class PairCounter(TorchDispatchMode):
    """Counts the pairs of queries and keys that attention computes, forward and backward."""

    KERNELS = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
    )

    def __init__(self) -> None:
        super().__init__()
        self.num_pairs = [0, 0]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in self.KERNELS:
            kernel = self.KERNELS.index(function)
            query, key = args[kernel : kernel + 2]  # the backward pass has the gradient before them
            self.num_pairs[kernel] += query.shape[0] * query.shape[2] * key.shape[2]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["causal", "alike", "different"])
def test_hidden_pairs_of_whole_chunks_are_not_computed(kind):
    layout, documents = documents_of(kind)
    mask = attention_mask(layout, documents, positions_in_documents(documents))
    with PairCounter() as counter:
        attention(SparseMask.of(mask), random_states(2, 32))
    # Of 4 chunks of queries and 4 of keys in each row:
    num_read = {"causal": 1 + 2 + 3 + 4, "alike": 4 * 2, "different": 1 + 3 * 3}[kind]
    assert counter.num_pairs == [2 * num_read * CHUNK**2] * 2


def test_queries_that_read_nothing_are_as_under_the_dense_mask():
    mask = torch.ones(1, 1, 32, 32, dtype=torch.bool).tril()
    mask[:, :, 8:16] = False  # a whole chunk
    sparse, states = SparseMask.of(mask), random_states(1, 32)
    assert isinstance(sparse, SparseMask)
    for found, expected in zip(attention(sparse, states), attention(mask, states), strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("mask", [torch.ones(2, 1, 32, 32).bool(), torch.ones(2, 1, CHUNK, CHUNK).bool().tril()])
def test_a_mask_with_little_to_spare_stays_as_it_is(mask):
    assert SparseMask.of(mask) is mask


def test_to_everything_else_it_is_the_dense_mask():
    mask = torch.ones(1, 1, 32, 32, dtype=torch.bool).tril()
    sparse = SparseMask.of(mask)
    for function in (lambda rows: rows[:, :, 3:5], lambda rows: ~rows):
        assert type(function(sparse)) is Tensor
        assert torch.equal(function(sparse), function(mask))
    states = random_states(1, 32)
    torch.manual_seed(0)
    found = attention(sparse, states, dropout_p=0.5)
    torch.manual_seed(0)
    for one, other in zip(found, attention(mask, states, dropout_p=0.5), strict=True):
        torch.testing.assert_close(one, other)
    narrow = states[2][..., :2]
    torch.testing.assert_close(
        scaled_dot_product_attention(*states[:2], narrow, attn_mask=sparse),
        scaled_dot_product_attention(*states[:2], narrow, attn_mask=mask),
    )


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gpt2"])  # grouped heads; sliding windows; an old one
def test_a_model_gives_the_same_states_and_gradients(family, is_checkpointed, monkeypatch):
    model = FAMILIES[family]().train()
    if is_checkpointed:
        model.activation_checkpointing_enable()
    documents = packed([[10, 22], [17, 15]])
    ids = torch.arange(64).view(2, 32)

    def states_and_gradients() -> list[Tensor]:
        torch.manual_seed(0)
        states = body_forward(model, ids, BIDIRECTIONAL, document_ids=documents).last_hidden_state
        weights = [weight for weight in model.base_model.parameters() if weight.requires_grad]
        return [states, *torch.autograd.grad(states.pow(3).mean(), weights)]

    found, num_sparse = states_and_gradients(), count_sparse(monkeypatch, states_and_gradients)
    assert num_sparse > 0
    monkeypatch.setattr(sparse_mask, "WORTHWHILE", 0.0)
    for one, other in zip(found, states_and_gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def count_sparse(monkeypatch: pytest.MonkeyPatch, function: Callable[[], object]) -> int:
    """How many attentions go chunk by chunk meanwhile."""
    calls: list[None] = []
    apply = sparse_mask._ChunkedAttention.apply
    with monkeypatch.context() as patch:
        patch.setattr(sparse_mask._ChunkedAttention, "apply", lambda *args: calls.append(None) or apply(*args))
        function()
    return len(calls)
