"""Compiled layers: what is compiled, how often, and that it is what trains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from decausal.diffusion.layout import Layout
from decausal.errors import UserError
from decausal.models.backbone import body_forward
from decausal.models.compiled import compile_layers, uncompiled
from decausal.training.run import training_arguments
from tests.exact.test_on_policy_runs import ON_POLICY
from tests.families import FAMILIES
from tests.runs import run, save_source, write_text

MOST_PROGRAMS = 3
"""Of one piece of code for each model, student and teacher."""
# Dynamo itself looks at the gradient of what it is given.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts the graphs that layers are compiled to, and their calls; the backend runs them as they are."""
    found: Counter[str] = Counter()

    def backend(graph: torch.fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        found["graph " + " ".join(str(node.target) for node in graph.graph.nodes if node.op != "placeholder")] += 1

        def call(*args: Any) -> Any:
            found["calls"] += 1
            return graph.forward(*args)

        return call

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    yield found
    torch._dynamo.reset()


DRAFTS = {"layout": "block", "block_size": 3, "causal_context": True, "shift": 1, "noise": "all"}
STEPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "aligned, two views": {"align_weight": 1.0, "views": 2, "complementary_masks": True},
    "aligned, adapters": {"align_weight": 1.0, "lora_r": 2},
    "block": {"layout": "block", "block_size": 4},
    "rollouts": ON_POLICY,
    "drafts": DRAFTS,
    "drafts, gated": DRAFTS | {"weights": "gated", "lora_r": 2, "save_dtype": "source"},
}


@pytest.mark.parametrize("kind", STEPS)
def test_layers_stay_compiled_in_every_step_and_few_programs_serve(tmp_path: Path, counts: Counter[str], kind: str):
    source, text = save_source(tmp_path / "model"), write_text(tmp_path / "text.jsonl")
    options = STEPS[kind] | {"max_steps": 6, "save_steps": 6, "compile_layers": True}
    at_step = []

    class Note(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            at_step.append(counts["calls"])

    measured = {"eval_data": str(text), "eval_steps": 2, "eval_rows": 2}
    run(source, text, tmp_path / "out", callbacks=[Note()], **options, **measured)
    calls = [after - before for before, after in pairwise([0, *at_step])]
    assert min(calls) > 0, "a step ran uncompiled"
    assert len(set(calls)) == 1, "a measurement or a rollout ran compiled layers"
    programs = [number for name, number in counts.items() if name.startswith("graph")]
    assert 0 < max(programs) <= MOST_PROGRAMS * (1 + ("aligned" in kind or kind == "rollouts"))


def test_a_layer_is_one_program_also_after_all_states_were_asked_for(counts: Counter[str]):
    model, ids = FAMILIES["qwen3"](), torch.arange(12)[None]
    compile_layers(model)
    for asks in (True, False):
        body_forward(model, ids, Layout("bidirectional"), output_hidden_states=asks)
    assert counts["calls"] == 2 * model.config.num_hidden_layers


def test_inside_uncompiled_layers_run_as_written(counts: Counter[str]):
    class Layer(nn.Module):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return states + 1

    layer = Layer()
    layer.compile()
    with uncompiled(layer):
        layer(torch.zeros(1, 2))
    assert counts["calls"] == 0
    layer(torch.zeros(1, 2))
    assert counts["calls"] == 1


@pytest.mark.parametrize("name", ["torch_compile", "torch_compile_backend", "torch_compile_mode"])
def test_compiling_the_whole_model_is_refused_by_name(tmp_path: Path, name: str):
    value = True if name == "torch_compile" else "eager"
    with pytest.raises(UserError, match=f"--{name} .*--compile_layers true"):
        training_arguments({"output_dir": str(tmp_path), name: value})
