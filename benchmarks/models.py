"""The models that benchmarks run: shapes with random weights, or a directory."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

CONTEXT = 32768


@dataclass(frozen=True)
class Shape:
    """A Qwen3 model with tied embeddings, and the batch that it is measured on by default."""

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    batch_size: int
    length: int


SHAPES = {
    "embedded": Shape(320, 6, 832, 5, 1, 64, 4096, batch_size=4, length=512),
    "25m": Shape(384, 8, 1024, 6, 2, 64, 32_000, batch_size=2, length=512),
    "qwen3-0.6b": Shape(1024, 28, 3072, 16, 8, 128, 151_936, batch_size=8, length=1024),
}
# What every layer of it does, without waiting for all of them to be counted.
SHAPES["qwen3-0.6b, 2 layers"] = replace(SHAPES["qwen3-0.6b"], num_hidden_layers=2)
DEFAULT_MODELS = {"cpu": ("embedded", "25m"), "cuda": ("qwen3-0.6b",)}
FALLBACK = SHAPES["embedded"]


def build(name_or_path: str, device: torch.device, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Returns a model of a named shape with random weights, or the one in a directory."""
    if name_or_path in SHAPES:
        shape = vars(SHAPES[name_or_path]) | {"max_position_embeddings": CONTEXT, "tie_word_embeddings": True}
        config = Qwen3Config(**{name: value for name, value in shape.items() if name not in ("batch_size", "length")})
        with device:
            return Qwen3ForCausalLM._from_config(config, dtype=dtype)
    if not Path(name_or_path).is_dir():
        raise SystemExit(f"--model {name_or_path}: give a directory or one of {', '.join(SHAPES)}")
    return AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype).to(device)


def add_model_arguments(parser: argparse.ArgumentParser, precision: str) -> None:
    """Adds what to run and where. `precision` says what `--bf16` makes bf16."""
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--model", action="append", help=f"{', '.join(SHAPES)} or a directory; may be repeated")
    parser.add_argument("--device", default=default_device, choices=("cpu", "cuda"))
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help=f"{precision}; by default on CUDA only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write all figures to this file")


def settle_precision(args: argparse.Namespace) -> argparse.Namespace:
    """Returns the arguments with bf16 on CUDA, and only there, unless the user has said otherwise."""
    args.bf16 = args.device == "cuda" if args.bf16 is None else args.bf16
    return args
