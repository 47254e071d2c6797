"""Random stock models, written as the public forms are, import to the original's logits; anything else is refused."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedModel

from decausal.diffusion.layout import Layout
from decausal.errors import UserError
from decausal.exchange.importing import import_checkpoint
from decausal.models.backbone import logits
from decausal.models.checkpoint import load_converted
from decausal.models.doctor import examine, usable
from tests.exchange.checkpoints import (
    IDS,
    ROWS,
    change_json,
    read_json,
    save_sharded,
    scatter,
    tensors_of,
    write_json,
)
from tests.families import EOS_ID, FAMILIES, tiny_tokenizer

MASK_ID = 268
SPECIAL = {"bos_token_id": EOS_ID, "eos_token_id": EOS_ID, "pad_token_id": EOS_ID}
# What the published files hold beside the numbers of the model.
HABITS = {"attention_dropout": 0.0, "initializer_range": 0.02, "torch_dtype": "float32", "use_cache": False}
QWEN = ("hidden_act", "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads")
QWEN += ("num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "vocab_size")
WINDOWS = {"max_window_layers": 28, "rope_scaling": None, "sliding_window": None, "use_sliding_window": False}
THETA = 3e4


def qwen_config(model: PreTrainedModel, *more: str, **values: Any) -> dict[str, Any]:
    taken = {name: getattr(model.config, name) for name in (*QWEN, *more)}
    return taken | SPECIAL | HABITS | WINDOWS | {"rope_theta": THETA} | values


def sdar(model: PreTrainedModel) -> dict[str, Any]:
    own = {"model_type": "sdar", "architectures": ["SDARForCausalLM"], "debug": False, "ep_size": 1}
    facts = {"block_size": 4, "mask_token_id": MASK_ID, "attn_implementation": "flex_attention"}
    return qwen_config(model, "attention_bias", "head_dim", **own, **facts, fuse_cross_entropy=True)


def sdar_moe(model: PreTrainedModel) -> dict[str, Any]:
    experts = ("moe_intermediate_size", "norm_topk_prob", "num_experts", "num_experts_per_tok", "mlp_only_layers")
    own = {"model_type": "sdar_moe", "block_size": 4, "mask_token_id": MASK_ID, "decoder_sparse_step": 1}
    return qwen_config(model, "attention_bias", "head_dim", *experts, **own, router_aux_loss_coef=0.001)


def dream(model: PreTrainedModel) -> dict[str, Any]:
    code = {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"}
    own = {"model_type": "Dream", "architectures": ["DreamModel"], "auto_map": code, "use_mrope": False}
    return qwen_config(model, **own, mask_token_id=MASK_ID)


def fast_dllm(model: PreTrainedModel) -> dict[str, Any]:
    layers = {"layer_types": ["full_attention"] * 2}
    return qwen_config(model, model_type="Fast_dLLM_Qwen", bd_size=8, mask_token_id=MASK_ID, **layers)


def llada(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config
    return {
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": config.hidden_size,
        "embedding_size": config.vocab_size,
        "flash_attention": True,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_device": "meta",
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": MASK_ID,
        "max_sequence_length": config.max_position_embeddings,
        "mlp_hidden_size": config.intermediate_size,
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "n_layers": config.num_hidden_layers,
        "precision": "amp_bf16",
        "rms_norm_eps": config.rms_norm_eps,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": THETA,
        "scale_logits": False,
        "vocab_size": config.vocab_size,
        "weight_tying": config.tie_word_embeddings,
        **SPECIAL,
    }


LLADA_NAMES = (
    (r"model\.layers\.", "model.transformer.blocks."),
    (r"input_layernorm", "attn_norm"),
    (r"post_attention_layernorm", "ff_norm"),
    (r"self_attn\.o_proj", "attn_out"),
    (r"self_attn\.", ""),
    (r"mlp\.gate_proj", "ff_proj"),
    (r"mlp\.up_proj", "up_proj"),
    (r"mlp\.down_proj", "ff_out"),
    (r"model\.embed_tokens", "model.transformer.wte"),
    (r"model\.norm", "model.transformer.ln_f"),
    (r"lm_head", "model.transformer.ff_out"),
)


def llada_names(name: str) -> str:
    for stock, other in LLADA_NAMES:
        name = re.sub(stock, other, name)
    return name


FORMS: dict[str, tuple[str, Callable[..., dict[str, Any]], Layout, int]] = {
    "sdar": ("qwen3", sdar, Layout("block", 4), 0),
    "sdar_moe": ("qwen3_moe", sdar_moe, Layout("block", 4), 0),
    "Dream": ("qwen2", dream, Layout("bidirectional"), 1),
    "Fast_dLLM_Qwen": ("qwen2", fast_dllm, Layout("block", 8), 1),
    "llada": ("llama", llada, Layout("bidirectional"), 0),
}


def publish(directory: Path, form: str, *, num_shards: int = 1, **changes: Any) -> PreTrainedModel:
    """Writes a random model as it would be published in a form; returns the stock original."""
    family, config, _, _ = FORMS[form]
    model = FAMILIES[family](vocab_size=ROWS, rope_theta=THETA, **changes)
    scatter(model)
    model.save_pretrained(directory)  # the stock names on disk, experts apart
    tensors = tensors_of(directory)
    if form == "llada":
        tensors = {llada_names(name): tensor for name, tensor in tensors.items()}
    (directory / "model.safetensors").unlink()
    (directory / "generation_config.json").unlink()
    if num_shards > 1:
        save_sharded(directory, tensors, num_shards)
    else:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    write_json(directory / "config.json", config(model))
    tiny_tokenizer(chat=True).save_pretrained(directory)
    return model


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
    with pytest.raises(UserError, match="mask token id 151669 is outside of the vocabulary of 272 rows"):
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
        ("sdar", {"use_sliding_window": True}, "has use_sliding_window = True; import takes models with False alone"),
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


def test_a_hub_that_cannot_be_reached_is_told_in_one_line(tmp_path):
    with pytest.raises(UserError, match="nobody/no-such-model is neither a directory nor a model that the hub gives"):
        import_checkpoint("nobody/no-such-model", tmp_path / "out")
    with pytest.raises(UserError, match="'owner/na--me' is no hub id"):
        import_checkpoint("owner/na--me", tmp_path / "out")


def test_the_source_is_left_as_it_was(tmp_path):
    publish(tmp_path / "public", "sdar", num_shards=3)
    shutil.copytree(tmp_path / "public", tmp_path / "copy")
    import_checkpoint(tmp_path / "public", tmp_path / "out")
    for path in sorted((tmp_path / "copy").iterdir()):
        assert path.read_bytes() == (tmp_path / "public" / path.name).read_bytes()
