"""Merged projections: the same states, from fewer products, on the parameters that there were."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from decausal.diffusion.layout import Layout
from decausal.models.backbone import body_forward
from decausal.models.merged import merge_projections
from tests.families import FAMILIES, OTHER_FAMILIES

EVERY_FAMILY = {**FAMILIES, **OTHER_FAMILIES}
IDS = torch.arange(24).view(2, 12) % 17 + 3


class _Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.calls[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", EVERY_FAMILY)
@torch.no_grad()
def test_merged_projections_give_the_same_states(family: str) -> None:
    model = EVERY_FAMILY[family]().eval()
    layout = Layout("causal")
    expected = body_forward(model, IDS, layout).last_hidden_state
    parameters = {name: (id(weight), weight.clone()) for name, weight in model.named_parameters()}
    num_merged = merge_projections(model)
    assert num_merged or not any(isinstance(getattr(m, "k_proj", None), nn.Linear) for m in model.modules())
    body_forward(model, IDS.flip(1), layout)  # leaves nothing after for the next input
    torch.testing.assert_close(body_forward(model, IDS, layout).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    for name, weight in model.named_parameters():
        number, before = parameters[name]
        assert id(weight) == number
        assert torch.equal(weight, before)


@torch.no_grad()
def test_a_layer_has_four_products_instead_of_seven_and_takes_no_memory() -> None:
    model = FAMILIES["qwen3"]().eval()
    products = []
    for _ in range(2):
        with _Products() as counted:
            body_forward(model, IDS, Layout("causal"))
        products.append(counted.calls["mm"] / model.config.num_hidden_layers)
        merge_projections(model)
    assert products == [7, 4]
    assert merge_projections(model) == 0, "it was merged twice"
    attention = model.model.layers[0].self_attn
    pointers = {part.weight.untyped_storage().data_ptr() for part in (attention.q_proj, attention.k_proj)}
    assert len(pointers) == 1
