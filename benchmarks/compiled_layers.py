"""What the compiler makes of a decoder layer: its kernels, and the bytes that they read and write.

    python benchmarks/compiled_layers.py

The compiler plans which operators it joins before it writes code, and its plan says what each kernel reads and writes.
Here it plans by its rules for a GPU, on tensors of a CPU. Nothing is compiled. Products and attention are kernels of
libraries; FlexAttention, which the compiler makes from a template of its own, stands as one of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Self
from unittest.mock import patch

import torch
from models import SHAPES, build
from paper_steps import block_pass
from report import circumstances, print_header
from torch import nn
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from decausal.diffusion.layout import Layout
from decausal.models.backbone import body_forward
from decausal.models.compiled import compile_layers, compiled
from decausal.models.merged import merge_projections
from decausal.models.row_attention import FLEX

CPU = torch.device("cpu")
FEW, MANY = 128, 256
"""Tokens of two rows, from which follows what grows with tokens and what does not."""


@dataclass(frozen=True)
class Plan:
    """Kernels of a layer.

    Attributes:
        of_libraries: Products and attention.
        generated: The others.
        num_bytes: Read and written by the generated ones.
        per_token: How many more for each token; where a plan is made for two lengths, `num_bytes` are those of none.
    """

    of_libraries: int
    generated: int
    num_bytes: float
    per_token: float = 0.0

    @property
    def kernels(self) -> int:
        """All of them."""
        return self.of_libraries + self.generated

    def for_tokens(self, num_tokens: int) -> float:
        """Bytes for so many tokens."""
        return self.num_bytes + num_tokens * self.per_token

    @classmethod
    def of(cls, graph: GraphLowering) -> Self:
        """Returns that of a graph, while the compiler works on it."""
        nodes = [
            node
            for node in graph.scheduler.nodes
            if not isinstance(node, NopKernelSchedulerNode) and "MultiOutput" not in type(node.node).__name__
        ]
        own = [node for node in nodes if not (isinstance(node, ExternKernelSchedulerNode) or node.is_template())]
        return cls(len(nodes) - len(own), len(own), sum(node.get_read_write_buffers_sizes() for node in own))

    def __add__(self, other: Plan) -> Plan:
        return Plan(*(getattr(self, name) + getattr(other, name) for name in vars(self)))


@contextmanager
def planned() -> Iterator[list[Plan]]:
    """Collects the plans of what is compiled inside, forward and backward. It runs as it is instead."""
    plans: list[Plan] = []

    def module_of(graph: GraphLowering) -> Any:
        graph.init_wrapper_code()
        graph._update_scheduler()
        plans.append(Plan.of(graph))
        graph.cache_key, graph.cache_path, graph.cache_linemap = "", "", []
        return SimpleNamespace(call=lambda args: tuple(graph.orig_gm.forward(*args)), __file__="")

    torch._dynamo.reset()
    with (
        patch.object(GraphLowering, "compile_to_module", module_of),
        # its plan for a GPU, and pieces are joined in the kernels that make them, as there
        torch._inductor.config.patch(force_disable_caches=True, cpu_backend="triton", force_pointwise_cat=True),
    ):
        yield plans
    torch._dynamo.reset()


def one_layer(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Returns a model of a shape with one layer and few words."""
    SHAPES["one layer"] = replace(SHAPES[name], num_hidden_layers=1, vocab_size=64)
    return build("one layer", CPU, dtype).eval()


def training_layer(name: str) -> Plan:
    """A student's layer, forward and backward, fp32 weights under bf16 autocast."""

    def step(model: nn.Module, ids: torch.Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            states = body_forward(model.train(), ids, Layout("bidirectional")).last_hidden_state
        states.float().sum().backward()

    return _of_two_lengths(name, torch.float32, step)


def teacher_layer(name: str) -> Plan:
    """A frozen teacher's layer, bf16 weights."""

    @torch.no_grad()
    def step(model: nn.Module, ids: torch.Tensor) -> None:
        body_forward(model, ids, Layout("causal"))

    return _of_two_lengths(name, torch.bfloat16, step)


def _of_two_lengths(name: str, dtype: torch.dtype, step: Callable[[Any, torch.Tensor], None]) -> Plan:
    found = []
    for length in (FEW, MANY):
        model = one_layer(name, dtype)
        with planned() as plans:
            compile_layers(model)
            step(model, torch.zeros(1, length, dtype=torch.long))
        found.append(sum(plans, Plan(0, 0, 0.0)))
    few, many = found
    per_token = (many.num_bytes - few.num_bytes) / (MANY - FEW)
    return replace(many, num_bytes=few.num_bytes - FEW * per_token, per_token=per_token)


@torch.library.custom_op("decausal_paper::attend", mutates_args=())
def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)


@_attend.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)


def _attends(_: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *__: Any, **___: Any) -> Any:
    return _attend(query, key, value), None


@contextmanager
def _flex_of_a_library() -> Iterator[None]:
    before = ALL_ATTENTION_FUNCTIONS[FLEX]
    ALL_ATTENTION_FUNCTIONS[FLEX] = _attends
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[FLEX] = before


def decoding_layer(name: str, *, num_rows: int = 1, num_keys: int = 128, is_flex: bool, is_merged: bool) -> Plan:
    """A layer of a recorded pass of block decoding.

    Args:
        name: The model's shape.
        num_rows: Rows of the pass.
        num_keys: Keys that it may read.
        is_flex: Attention by FlexAttention, which reads as much as rows hold.
        is_merged: Projections of one input are one product.
    """
    model = one_layer(name, torch.bfloat16)
    if is_merged:
        merge_projections(model)
    one_pass = block_pass(model, num_rows=num_rows, num_keys=num_keys, device=CPU, is_flex=is_flex)
    with planned() as plans, compiled(model), _flex_of_a_library():
        one_pass()
    found = sum(plans, Plan(0, 0, 0.0))
    return replace(found, of_libraries=found.of_libraries + is_flex)  # parts of the keys, and their sum


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen3-0.6b", choices=list(SHAPES))
    args = parser.parse_args()
    print_header(circumstances())
    print("| layer | kernels | of libraries | generated | their MB for each token | and apart from tokens |")
    print("|" + "---|" * 6)
    for label, plan in {
        "training, forward and backward": training_layer(args.model),
        "teacher": teacher_layer(args.model),
    }.items():
        print(_line(label, plan, f"{plan.per_token / 1e6:.3f} | {plan.num_bytes / 1e6:.1f}"), flush=True)
    for label, options in {
        "decoding, dense masks": {"is_flex": False, "is_merged": False},
        "the same, projections merged": {"is_flex": False, "is_merged": True},
        "the same, by lengths of rows": {"is_flex": True, "is_merged": True},
    }.items():
        plan = decoding_layer(args.model, **options)
        print(_line(label, plan, f"| {plan.num_bytes / 1e6:.2f}"), flush=True)


def _line(label: str, plan: Plan, num_bytes: str) -> str:
    return f"| {label} | {plan.kernels} | {plan.of_libraries} | {plan.generated} | {num_bytes} |"


if __name__ == "__main__":
    main()
