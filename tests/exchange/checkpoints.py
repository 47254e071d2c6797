"""Tiny converted models on disk, and random stock models written as the public forms are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from decausal.diffusion.layout import Layout
from decausal.exchange.mask_token import ENGINE_MASK_TOKEN_ID
from decausal.models.adapt import adapt
from decausal.models.backbone import logits
from decausal.models.checkpoint import load_converted, save_converted
from decausal.models.facts import ConversionFacts
from tests.families import FAMILIES, VOCAB_SIZE, tiny_tokenizer

MASK_ID = VOCAB_SIZE  # the first id that the tokenizer does not use
ROWS = VOCAB_SIZE + 4
IDS = torch.randint(0, VOCAB_SIZE, (2, 11), generator=torch.Generator().manual_seed(3))


def save_block_model(
    directory: Path, family: str = "qwen3", *, facts: dict[str, Any] | None = None, **changes: Any
) -> ConversionFacts:
    """Writes a converted block model with unlike weights everywhere, also in its norms and in the mask token's rows."""
    values = {"layout": "block", "block_size": 4, "shift": 0, "source": "owner/model"} | (facts or {})
    layout = Layout(values["layout"], values["block_size"])
    model, tokenizer = FAMILIES[family](vocab_size=ROWS, rope_theta=5e4, **changes), tiny_tokenizer(chat=True)
    scatter(model)
    values["mask_token_id"] = adapt(model, tokenizer, layout=layout)
    converted = ConversionFacts(**values)
    save_converted(directory, model, tokenizer, converted)
    return converted


def scatter(model: PreTrainedModel) -> None:
    """Moves what starts as all ones or zeros: a norm or bias that is left out would otherwise go unnoticed."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def our_logits(directory: Path, ids: Tensor = IDS) -> Tensor:
    """Logits under the layout that the facts name, without the mask token's column, which is never read."""
    model, _, facts = load_converted(directory)
    with torch.no_grad():
        return without(logits(model, ids, facts.attention), facts.mask_token_id)


def without(values: Tensor, column: int) -> Tensor:
    return torch.cat((values[..., :column], values[..., column + 1 :]), dim=-1)


def tensors_of(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def change_json(path: Path, **changes: Any) -> None:
    """Changes keys of a file; `...` removes one."""
    values = read_json(path) | changes
    write_json(path, {name: value for name, value in values.items() if value is not ...})


def save_sharded(directory: Path, tensors: dict[str, Tensor], num_shards: int = 3) -> None:
    """Writes tensors in shards with an index, spread over them like cards."""
    names = sorted(tensors)
    files = {name: f"model-{1 + i % num_shards:05d}-of-{num_shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, directory / file, {"format": "pt"})
    write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})


def large_vocabulary(directory: Path) -> None:
    """Gives a saved model as many rows as a real Qwen3 has beyond its mask token, and a tokenizer that fills them."""
    rows = ENGINE_MASK_TOKEN_ID + 3
    tensors = tensors_of(directory)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            old = tensors[name]
            tensors[name] = torch.zeros(rows, old.shape[1])
            tensors[name][: len(old)] = old
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    change_json(directory / "config.json", vocab_size=rows)
