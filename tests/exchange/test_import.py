"""Random stock models, written as the public forms are, import to the original's logits; anything else is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from decausal.diffusion.layout import Layout
from decausal.errors import UserError
from decausal.exchange.importing import import_checkpoint
from decausal.models.backbone import logits
from decausal.models.checkpoint import load_converted
from decausal.models.doctor import examine, usable
from decausal.sampling.model import load
from tests.exchange.checkpoints import (
    IDS,
    change_json,
    read_json,
    tensors_of,
    write_json,
)
from tests.exchange.public_forms import FORMS, MASK_ID, publish
from tests.families import EOS_ID, tiny_tokenizer


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_an_imported_model_has_the_originals_logits_and_the_forms_facts(form, num_shards, tmp_path):
    original = publish(tmp_path / "public", form, num_shards=num_shards)
    _, _, layout, shift = FORMS[form]
    imported = import_checkpoint(tmp_path / "public", tmp_path / "out")
    model, tokenizer, facts = load_converted(tmp_path / "out")
    assert (facts.attention, facts.shift, facts.mask_token_id) == (layout, shift, MASK_ID)
    assert facts == imported.facts
    assert tokenizer.mask_token_id == MASK_ID
    assert type(model) is type(original)
    with torch.no_grad():
        assert torch.equal(logits(model, IDS, layout), logits(original, IDS, layout))


@pytest.mark.parametrize("form", FORMS)
def test_the_doctor_finds_imported_models_usable(form, tmp_path):
    publish(tmp_path / "public", form)
    import_checkpoint(tmp_path / "public", tmp_path / "out")
    assert usable(examine(*load_converted(tmp_path / "out")))


def test_an_imported_fast_dllm_decodes_as_its_own_code_does(tmp_path):
    original = publish(tmp_path / "public", "Fast_dLLM_Qwen")
    import_checkpoint(tmp_path / "public", tmp_path / "out")
    model = load(tmp_path / "out")
    assert model.facts.sampler == {"first_token_from_clean": True}
    for length in (3, 8, 13):
        prompt = "the rain in Spain stays"[:length]
        ids = model.tokenizer(prompt)["input_ids"]
        found = model.generate(prompt, max_new_tokens=24, threshold=0.02)
        expected = _as_published(original, ids, 24, 0.02)
        assert found.ids == expected[: len(found.ids)]
        assert len(found.ids) == 24 or found.ids[-1] == EOS_ID


def test_an_imported_sdar_verifies_drafts_by_its_own_blocks_of_one_token(tmp_path):
    publish(tmp_path / "public", "sdar")
    import_checkpoint(tmp_path / "public", tmp_path / "out")
    model = load(tmp_path / "out")
    assert model.facts.sampler == {"verifier": "masks"}
    shutil.copytree(tmp_path / "out", tmp_path / "ones")
    change_json(tmp_path / "ones" / "decausal.json", block_size=1)
    one_by_one = load(tmp_path / "ones")
    for prompt in ("the rain", "in Spain stays"):
        found = model.generate(prompt, max_new_tokens=12, speculative=True)
        assert found.ids == one_by_one.generate(prompt, max_new_tokens=12).ids


@torch.no_grad()
def _as_published(model, ids, num_new, threshold, size=8):
    """A block's first token from the clean tokens before it, then whatever is sure enough, or the surest."""

    def distribution():
        found = logits(model, torch.tensor([ids]), Layout("block", size))[0].float()
        found[:, MASK_ID] = -torch.inf
        return found.softmax(-1)

    end = len(ids) + num_new
    ids = list(ids)
    while len(ids) < end:
        if len(ids) % size == 0:
            ids.append(int(distribution()[-1].argmax()))
        ids += [MASK_ID] * (-len(ids) % size)
        while MASK_ID in ids:
            best = dict(enumerate(zip(*(found.tolist() for found in distribution().max(-1)), strict=True), start=1))
            masked = sorted((i for i, token in enumerate(ids) if token == MASK_ID), key=lambda i: -best[i][0])
            for place in [i for i in masked if best[i][0] >= threshold] or masked[:1]:
                ids[place] = best[place][1]
    return ids[end - num_new : end]


@pytest.mark.parametrize(
    ("form", "changes"), [("Dream", {"tie_word_embeddings": False}), ("llada", {"tie_word_embeddings": True})]
)
def test_tied_and_untied_heads_are_both_read(form, changes, tmp_path):
    original = publish(tmp_path / "public", form, **changes)
    import_checkpoint(tmp_path / "public", tmp_path / "out")
    with torch.no_grad():
        layout = Layout("bidirectional")
        assert torch.equal(logits(load_converted(tmp_path / "out").model, IDS, layout), logits(original, IDS, layout))


def test_weights_keep_their_type(tmp_path):
    publish(tmp_path / "public", "Dream")
    tensors = {name: tensor.bfloat16() for name, tensor in tensors_of(tmp_path / "public").items()}
    save_file(tensors, tmp_path / "public" / "model.safetensors")
    import_checkpoint(tmp_path / "public", tmp_path / "out")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == "bfloat16"


def test_every_end_token_is_taken_over(tmp_path):
    publish(tmp_path / "public", "sdar")
    write_json(tmp_path / "public" / "generation_config.json", {"eos_token_id": [267, EOS_ID], "temperature": 0.6})
    import_checkpoint(tmp_path / "public", tmp_path / "out")
    written = read_json(tmp_path / "out" / "generation_config.json")
    assert written["eos_token_id"] == [267, EOS_ID]
    assert "temperature" not in written  # of writing from left to right


def test_options_win_over_the_file_and_fill_in_what_it_lacks(tmp_path):
    publish(tmp_path / "public", "sdar")
    assert import_checkpoint(tmp_path / "public", tmp_path / "a", block_size=8).facts.block_size == 8
    change_json(tmp_path / "public" / "config.json", block_size=..., mask_token_id=...)
    with pytest.raises(UserError, match="give the block size with --block_size"):
        import_checkpoint(tmp_path / "public", tmp_path / "b")
    with pytest.raises(UserError, match="mask token id 151669 is outside the vocabulary of 272 rows"):
        import_checkpoint(tmp_path / "public", tmp_path / "b", block_size=4)
    facts = import_checkpoint(tmp_path / "public", tmp_path / "b", block_size=4, mask_token_id=MASK_ID).facts
    assert (facts.block_size, facts.mask_token_id) == (4, MASK_ID)


def test_a_mask_token_that_is_a_token_already_gets_the_role(tmp_path):
    publish(tmp_path / "public", "llada")
    import_checkpoint(tmp_path / "public", tmp_path / "out", mask_token_id=267)
    tokenizer = load_converted(tmp_path / "out").tokenizer
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == ("<|im_end|>", 267)


def test_a_tokenizer_that_comes_with_code_is_read_without_it(tmp_path):
    publish(tmp_path / "public", "Dream")
    directory = tmp_path / "public"
    code = {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}
    change_json(directory / "tokenizer_config.json", auto_map=code, tokenizer_class="DreamTokenizer")
    (directory / "tokenization_dream.py").write_text("raise SystemExit('remote code ran')")
    import_checkpoint(directory, tmp_path / "out")
    text = "the rain in Spain<|im_end|> 12"
    assert load_converted(tmp_path / "out").tokenizer(text)["input_ids"] == tiny_tokenizer(chat=True)(text)["input_ids"]


def test_a_qwen_tokenizer_of_vocabulary_and_merges_alone_is_read(tmp_path):
    publish(tmp_path / "public", "Dream")
    directory = tmp_path / "public"
    model = read_json(directory / "tokenizer.json")["model"]
    text = "the rain"
    expected = AutoTokenizer.from_pretrained(directory)(text)["input_ids"]
    write_json(directory / "vocab.json", {token: index for token, index in model["vocab"].items() if index < EOS_ID})
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (directory / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    (directory / "tokenizer.json").unlink()
    added = {
        str(EOS_ID + place): {"content": token, "special": True}
        for place, token in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    }
    settings = {"auto_map": {"AutoTokenizer": ["x.DreamTokenizer", None]}, "tokenizer_class": "DreamTokenizer"}
    settings |= {"added_tokens_decoder": added, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    write_json(directory / "tokenizer_config.json", settings)
    import_checkpoint(directory, tmp_path / "out")
    tokenizer = load_converted(tmp_path / "out").tokenizer
    assert tokenizer(text)["input_ids"] == expected
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 267


# Refusals


def refused(directory: Path, **options: Any) -> str:
    out = directory.parent / "out"
    with pytest.raises(UserError) as caught:
        import_checkpoint(directory, out, **options)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert [path.name for path in directory.parent.iterdir() if path.name.startswith(".")] == []
    return str(caught.value)


@pytest.mark.parametrize(
    ("form", "changes", "reason"),
    [
        ("sdar", {"logit_cap": 30.0}, "holds logit_cap = 30.0, which import does not know"),
        ("sdar", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "scales the rotary embedding ('yarn')"),
        ("sdar", {"use_sliding_window": True}, "has use_sliding_window = True; import only takes models with False"),
        ("sdar", {"rope_theta": ...}, "lacks rope_theta"),
        ("sdar", {"hidden_act": "gelu"}, "has hidden_act = 'gelu'"),
        ("sdar_moe", {"norm_topk_prob": ...}, "lacks norm_topk_prob"),
        ("sdar_moe", {"mlp_only_layers": [0]}, "has mlp_only_layers = [0]"),
        ("Dream", {"mask_token_id": ...}, "has no mask_token_id; give it with --mask_token_id"),
        ("Dream", {"layer_types": ["sliding_attention"] * 2}, "layers other than full_attention"),
        ("Fast_dLLM_Qwen", {"use_relay": True}, "holds use_relay = True"),
        ("llada", {"include_qkv_bias": True}, "has include_qkv_bias = True"),
        ("llada", {"alibi": True}, "has alibi = True"),
        ("llada", {"layer_norm_type": ...}, "lacks layer_norm_type"),
        ("llada", {"attention_layer_norm": True}, "has attention_layer_norm = True"),
        ("llada", {"num_experts": 64}, "holds num_experts = 64"),
        ("sdar", {"model_type": "qwen3"}, "has model type 'qwen3'"),
        ("sdar", {"model_type": "sdarr"}, "did you mean 'sdar'?"),
    ],
)
def test_a_configuration_that_no_stock_class_computes_is_refused_by_name(form, changes, reason, tmp_path):
    publish(tmp_path / "public", form)
    change_json(tmp_path / "public" / "config.json", **changes)
    assert reason in refused(tmp_path / "public")


def test_a_key_that_the_user_vouches_for_is_passed_over(tmp_path):
    publish(tmp_path / "public", "sdar")
    change_json(tmp_path / "public" / "config.json", project_name="x", note=None)
    assert "--ignore_keys project_name" in refused(tmp_path / "public")
    import_checkpoint(tmp_path / "public", tmp_path / "out", ignore_keys=["project_name"])


@pytest.mark.parametrize("form", FORMS)
def test_missing_extra_and_misshapen_tensors_are_refused_by_name(form, tmp_path):
    publish(tmp_path / "public", form)
    directory, file = tmp_path / "public", tmp_path / "public" / "model.safetensors"
    tensors = tensors_of(directory)
    norm = next(name for name in tensors if ".1." in name and "norm" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != norm}, file)
    missing = refused(directory)
    assert "lacks model.layers.1." in missing
    assert "norm" in missing
    save_file(tensors | {"model.layers.0.adapter.weight": torch.zeros(2)}, file)
    assert "also holds model.layers.0.adapter.weight" in refused(directory)
    save_file(tensors | {norm: torch.zeros(7)}, file)
    assert f"tensor {norm} has shape (7,), config.json says" in refused(directory)


def test_biases_that_the_architecture_does_not_have_are_refused(tmp_path):
    publish(tmp_path / "public", "llada")
    tensors = tensors_of(tmp_path / "public")
    name = "model.transformer.blocks.0.q_proj.bias"
    save_file(tensors | {name: torch.zeros(32)}, tmp_path / "public" / "model.safetensors")
    assert f"also holds {name}" in refused(tmp_path / "public")


def test_a_head_that_is_not_the_embedding_it_should_be_is_refused(tmp_path):
    publish(tmp_path / "public", "Dream", tie_word_embeddings=False)
    change_json(tmp_path / "public" / "config.json", tie_word_embeddings=True)
    assert "lm_head.weight is another matrix" in refused(tmp_path / "public")
    tensors = tensors_of(tmp_path / "public")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "public" / "model.safetensors")
    import_checkpoint(tmp_path / "public", tmp_path / "out")


def test_blocks_are_asked_for_only_where_there_are_some(tmp_path):
    publish(tmp_path / "public", "Dream")
    assert "Dream has no blocks" in refused(tmp_path / "public", block_size=4)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: (path / "config.json").unlink(), "config.json cannot be read"),
        (lambda path: (path / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda path: (path / "config.json").write_text("[]"), "holds no table of settings"),
        (lambda path: (path / "model-00002-of-00003.safetensors").unlink(), "lacks model-00002-of-00003.safetensors"),
        (lambda path: (path / "model-00002-of-00003.safetensors").write_bytes(b"cut"), "is broken"),
        (lambda path: (path / "model.safetensors.index.json").write_text("{}"), "index.json cannot be read"),
        (lambda path: (path / "model.safetensors.index.json").unlink(), "holds neither model.safetensors nor"),
        (lambda path: (path / "tokenizer.json").unlink(), "cannot load the tokenizer"),
        (lambda path: write_json(path / "decausal.json", {}), "is in decausal's form already"),
    ],
)
def test_broken_directories_are_refused_with_the_file(damage, reason, tmp_path):
    publish(tmp_path / "public", "sdar", num_shards=3)
    damage(tmp_path / "public")
    assert reason in refused(tmp_path / "public")


def test_pickled_weights_are_not_read(tmp_path):
    publish(tmp_path / "public", "sdar")
    (tmp_path / "public" / "model.safetensors").rename(tmp_path / "public" / "pytorch_model.bin")
    assert "holds pytorch_model.bin, which only runs as code" in refused(tmp_path / "public")


def test_quantized_weights_are_refused(tmp_path):
    publish(tmp_path / "public", "sdar")
    tensors = tensors_of(tmp_path / "public")
    tensors["model.norm.weight"] = torch.zeros(32, dtype=torch.int8)
    save_file(tensors, tmp_path / "public" / "model.safetensors")
    assert "model.norm.weight holds I8" in refused(tmp_path / "public")


def test_a_directory_that_does_not_exist_and_a_file_are_refused(tmp_path):
    assert "does not exist" in refused(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(tmp_path / "file")


def test_a_hub_that_cannot_be_reached_is_reported_in_one_line(tmp_path):
    with pytest.raises(UserError, match="nobody/no-such-model is neither a directory nor a model that the hub gives"):
        import_checkpoint("nobody/no-such-model", tmp_path / "out")
    with pytest.raises(UserError, match="'owner/na--me' is not a hub id"):
        import_checkpoint("owner/na--me", tmp_path / "out")


def test_the_source_is_left_as_it_was(tmp_path):
    publish(tmp_path / "public", "sdar", num_shards=3)
    shutil.copytree(tmp_path / "public", tmp_path / "copy")
    import_checkpoint(tmp_path / "public", tmp_path / "out")
    for path in sorted((tmp_path / "copy").iterdir()):
        assert path.read_bytes() == (tmp_path / "public" / path.name).read_bytes()
