"""What a training step of gated drafts costs: the clean half once forward, the masks forward and back, nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from decausal.models.draft_head import draft_head_of
from tests.device.steps import STEPS, batches_of, prepared, step
from tests.families import FAMILIES
from tests.runs import save_source
from tests.training.test_lossless import write_answers

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "max_position_embeddings": 512}
GATED = STEPS["drafts, gated"] | {"align_weight": 0.0, "max_length": 128, "lora_r": 4}


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "with a draft head"])
def trainer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("step")
    save_source(root / "source", "qwen3", **SIZES)
    settings = GATED | ({"draft_head": True, "causal_groups": True} if request.param else {})
    return prepared(settings, root / "source", write_answers(root / "answers.jsonl", 200), root / "out")


def floor(trainer, batch) -> float:
    """Operations of the matrix products that no way to compute the step can spare."""
    clean, masks, targets = batch["clean_ids"].numel(), batch["groups"].position_ids.numel(), len(batch["target_index"])
    layers = [
        (module.in_features, module.out_features)
        for name, module in trainer.model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith("base_layer")
    ]
    rank = GATED["lora_r"]
    body = sum(2 * wide * tall for wide, tall in layers)
    adapters = sum(2 * rank * (wide + tall) for wide, tall in layers)
    head = 2 * trainer.model.get_base_model().get_output_embeddings().weight.numel()
    # Base weights are frozen, so that their layers have one product more in the backward pass, and adapters two.
    draft_head = draft_head_of(trainer.model)
    drafts = 0 if draft_head is None else targets * 3 * 2 * sum(weight.numel() for weight in draft_head.parameters())
    return drafts + clean * body + masks * (2 * body + 3 * adapters) + targets * (2 + 1) * head


def attention(trainer, batch) -> float:
    """Operations of attention over whole rows: twice forward, four times back."""
    config = trainer.model.get_base_model().config
    width = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    num_rows, length = batch["clean_ids"].shape
    num_masks = batch["groups"].position_ids.shape[1]
    return num_rows * width * 4 * (length * length + (1 + 2.5) * num_masks * (length + num_masks))


def test_a_step_has_the_operations_of_its_floor(trainer) -> None:
    batch = batches_of(trainer)["packed"]
    trainer.model.train()
    with FlopCounterMode(display=False) as counter:
        step(trainer, batch)
    products = floor(trainer, batch)
    assert products <= counter.get_total_flops() <= 1.05 * (products + attention(trainer, batch))


def test_there_is_no_second_copy_of_the_model(trainer) -> None:
    assert trainer.teacher is None
    source = FAMILIES["qwen3"](**SIZES)
    held = sum(weight.numel() for weight in trainer.model.parameters())
    trained = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    assert held - trained == sum(weight.numel() for weight in source.parameters())


def test_the_clean_half_keeps_nothing_for_the_backward_pass(trainer) -> None:
    batch = batches_of(trainer)["packed"]
    shapes: list[tuple[int, ...]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    trainer.model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step(trainer, batch)
    num_rows, length = batch["clean_ids"].shape
    states = [shape for shape in shapes if shape[:2] == (num_rows, length) and len(shape) == 3]
    assert not states
