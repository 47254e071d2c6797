"""FlexAttention: the same numbers as dense masks, from the same rule, and no new program for new rows."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import PreTrainedModel

from decausal.diffusion.doubled import double
from decausal.diffusion.layout import Layout
from decausal.errors import UserError
from decausal.models.backbone import body_forward
from decausal.models.block_cache import BlockCache, cached_forward
from decausal.models.flex import use_flex_attention
from decausal.models.visible_slots import visible_by_layer
from tests.families import FAMILIES
from tests.hangs import PATIENCE
from tests.runs import ROOT, environment

# In a process without type checking, which Dynamo cannot trace, and without the compiler after Dynamo, for its time.
ON_CPU = """
import torch, transformers.integrations.flex_attention as integration
from decausal.diffusion.layout import Layout, future_order
from decausal.models.backbone import body_forward
from tests.families import FAMILIES
from tests.models.test_flex_attention import decoded_states, doubled_rows, gradients, real_states

compiled = torch.compile(integration.flex_attention, backend="eager")
integration.WrappedFlexAttention.__init__ = lambda self, training: None
integration.WrappedFlexAttention.__call__ = lambda self: compiled
torch._dynamo.config.recompile_limit = 64


def assert_equal(states):
    dense, flex = states("sdpa"), states("flex_attention")
    torch.testing.assert_close(flex, dense, rtol=1e-5, atol=1e-5)


for family in ("qwen3", "gemma3"):  # no window, one in half the layers
    model = FAMILIES[family]()
    for layout in (Layout("block", 4), Layout("block", 3, causal_context=True)):
        for length, seed in ((20, 0), (23, 1)):
            assert_equal(lambda kind: real_states(model, kind, layout, length, seed))
    for length, seed in ((20, 5), (26, 6), (31, 7)):  # one program serves every length
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_equal(lambda kind: real_states(model, kind, layout, length, seed))

for family in ("qwen3", "mistral", "gemma3"):
    model = FAMILIES[family]()
    for layout in (Layout("block", 4), Layout("block", 3, causal_context=True)):
        assert_equal(lambda kind: decoded_states(model, kind, layout))

model, ids = FAMILIES["qwen3"](), torch.arange(12)[None]
for future in (None, (future_order(12, 0), 0.5)):
    for layout in (Layout("causal"), Layout("bidirectional")):
        def states(kind):
            model.config._attn_implementation = kind
            with torch.no_grad():
                return body_forward(model, ids, layout, document_ids=ids // 5, future=future).last_hidden_state
        assert_equal(states)
# What PyTorch refuses on a CPU is its compiled backward pass; the reference after it runs.
torch.nn.attention.flex_attention._validate_device = lambda *_: None
for family in ("qwen3", "mistral", "gemma3"):
    dense, flex = (gradients(FAMILIES[family](head_dim=16), kind) for kind in ("sdpa", "flex_attention"))
    for one, other in zip(flex, dense, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
print("equal")
"""


def doubled_rows(length: int, seed: int):
    """Two rows of two documents, the second with padding, in two views."""
    generator = torch.Generator().manual_seed(seed)
    clean_ids = torch.randint(0, 200, (2, length), generator=generator)
    document_ids = (torch.arange(length) >= length // 3).long().repeat(2, 1)
    document_ids[1, -3:] = -1
    is_masked = torch.rand(2, 2, length, generator=generator) < 0.5
    return double(clean_ids, document_ids, is_masked, is_masked, 250, block_size=4)


def decoded_states(model, implementation: str, layout: Layout) -> torch.Tensor:
    """States of the last two blocks of rows of different lengths, which read a cache of several blocks of a mask."""
    ids, size = torch.arange(2 * 300).view(2, 300) % 200, layout.block_size
    prompt, cache = torch.arange(300).expand(2, -1), BlockCache(model.config, 2, 300)
    last = torch.tensor([[20 * size], [70 * size]]) + torch.arange(-size, size)
    with torch.no_grad():
        model.config._attn_implementation = "sdpa"
        cached_forward(model, ids, prompt, prompt, visible_by_layer(model.config, prompt, prompt, 300), cache)
        model.config._attn_implementation = implementation
        seen = (last // size + 1) * size - 1
        if layout.causal_context:
            seen = torch.where(torch.arange(2 * size) < size, last, seen)
        is_visible = visible_by_layer(model.config, last, seen, 300)
        return cached_forward(model, ids.gather(1, last), last, last, is_visible, cache)


def real_states(model, implementation: str, layout: Layout, length: int, seed: int) -> torch.Tensor:
    """States of all but padding."""
    rows = doubled_rows(length, seed)
    model.config._attn_implementation = implementation
    with torch.no_grad():
        output = body_forward(
            model,
            rows.ids.to(model.device),
            layout,
            document_ids=rows.document_ids.to(model.device),
            position_ids=rows.position_ids.to(model.device),
            stream_ids=rows.stream_ids.to(model.device),
        )
    return output.last_hidden_state[rows.document_ids.to(model.device) >= 0]


def gradients(model: PreTrainedModel, implementation: str) -> list[torch.Tensor]:
    """Gradients of a function of these states, of all weights that have one."""
    rows = doubled_rows(20, 0)
    model.config._attn_implementation = implementation
    output = body_forward(
        model.train(),
        rows.ids.to(model.device),
        Layout("block", 4),
        document_ids=rows.document_ids.to(model.device),
        position_ids=rows.position_ids.to(model.device),
        stream_ids=rows.stream_ids.to(model.device),
    )
    output.last_hidden_state[rows.document_ids.to(model.device) >= 0].pow(3).mean().backward()
    return [weight.grad for weight in model.parameters() if weight.grad is not None]


def test_flex_attention_gives_the_numbers_of_dense_masks_and_compiles_nothing_anew_for_new_rows():
    result = subprocess.run(
        [sys.executable, "-c", ON_CPU], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert result.stdout == "equal\n", result.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention trains on a GPU only")
@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma3"])
def test_gradients_on_a_gpu_are_those_of_dense_masks(family):
    dense, flex = (FAMILIES[family](head_dim=16).cuda() for _ in range(2))
    use_flex_attention(flex, Layout("block", 4), flex.device)
    expected = gradients(dense, "sdpa")
    for one, other in zip(gradients(flex, "flex_attention"), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_it_is_refused_off_the_gpu():
    with pytest.raises(UserError, match="needs a GPU"):
        use_flex_attention(FAMILIES["qwen3"](), Layout("bidirectional"), torch.device("cpu"))
