"""Identity 13: what was trained is what comes back, whatever stood beside it in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from decausal.diffusion.layout import Layout
from decausal.models.adapt import adapt
from decausal.models.backbone import body_forward, logits
from decausal.models.checkpoint import load_converted, save_converted
from decausal.models.facts import ConversionFacts
from decausal.models.mask_row import freeze_embeddings
from tests.families import FAMILIES, tiny_tokenizer

BIDIRECTIONAL = Layout("bidirectional")


def facts(mask_token_id: int) -> ConversionFacts:
    return ConversionFacts(source="tiny", layout="bidirectional", shift=1, mask_token_id=mask_token_id)


def train_a_little(model: torch.nn.Module, ids: Tensor, num_steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(num_steps):
        body_forward(model, ids, BIDIRECTIONAL).last_hidden_state.pow(4).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def adapted(family: str) -> tuple[PreTrainedModel, AutoTokenizer, Tensor]:
    model, tokenizer = FAMILIES[family](), tiny_tokenizer()
    mask_token_id = adapt(model, tokenizer)
    return model, tokenizer, torch.tensor([[5, mask_token_id, 9, mask_token_id]])


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3", "gpt2"])
def test_a_model_trained_with_frozen_embeddings_comes_back(family: str, tmp_path: Path) -> None:
    model, tokenizer, ids = adapted(family)
    freeze_embeddings(model, tokenizer.mask_token_id)
    before = model.get_input_embeddings().mask_row.detach().clone()
    train_a_little(model, ids)
    assert not torch.equal(model.get_input_embeddings().mask_row, before)
    save_converted(tmp_path, model, tokenizer, facts(tokenizer.mask_token_id))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = body_forward(model, ids, BIDIRECTIONAL).last_hidden_state
        for reloaded in (load_converted(tmp_path).model, plain):
            assert torch.equal(body_forward(reloaded, ids, BIDIRECTIONAL).last_hidden_state, expected)
    assert not any("mask_row" in name for name in load_file(tmp_path / "model.safetensors"))


def test_a_model_trained_whole_comes_back(tmp_path: Path) -> None:
    model, tokenizer, ids = adapted("llama")
    train_a_little(model, ids)
    save_converted(tmp_path, model, tokenizer, facts(tokenizer.mask_token_id))
    with torch.no_grad():
        expected = logits(model, ids, BIDIRECTIONAL)
        assert torch.equal(logits(load_converted(tmp_path).model, ids, BIDIRECTIONAL), expected)


def test_a_merged_adapter_comes_back(tmp_path: Path) -> None:
    model, tokenizer, ids = adapted("qwen3")
    names = set(model.state_dict())
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    freeze_embeddings(wrapped, tokenizer.mask_token_id)
    train_a_little(wrapped, ids)
    merged = wrapped.merge_and_unload()
    save_converted(tmp_path, merged, tokenizer, facts(tokenizer.mask_token_id))
    reloaded = load_converted(tmp_path).model
    assert set(reloaded.state_dict()) == names
    with torch.no_grad():
        expected = body_forward(merged, ids, BIDIRECTIONAL).last_hidden_state
        assert torch.equal(body_forward(reloaded, ids, BIDIRECTIONAL).last_hidden_state, expected)


def test_the_plain_class_reads_both_ways_after_reloading(tmp_path: Path) -> None:
    model, tokenizer, ids = adapted("qwen3")
    save_converted(tmp_path, model, tokenizer, facts(tokenizer.mask_token_id))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    changed = ids.clone()
    changed[0, -1] = 3
    with torch.no_grad():
        assert not torch.equal(plain(ids).logits[0, 0], plain(changed).logits[0, 0])


def test_saving_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    model, tokenizer, _ = adapted("qwen3")
    freeze_embeddings(model, tokenizer.mask_token_id)
    for name in ("first", "second"):
        save_converted(tmp_path / name, model, tokenizer, facts(tokenizer.mask_token_id))
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "second").iterdir())
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name
