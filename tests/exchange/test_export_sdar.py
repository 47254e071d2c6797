"""What SGLang and LMDeploy load computes what we compute, and what they cannot express is refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer

from decausal.errors import UserError
from decausal.exchange.importing import import_checkpoint
from decausal.exchange.mask_token import ENGINE_MASK_TOKEN_ID, never_predicted
from decausal.exchange.sdar import export_sdar
from decausal.models.facts import read_facts
from tests.exchange.checkpoints import (
    IDS,
    MASK_ID,
    change_json,
    large_vocabulary,
    our_logits,
    read_json,
    save_block_model,
    tensors_of,
    without,
)
from tests.exchange.sdar_reader import sdar_logits

FAMILY_CHANGES = [
    ("qwen3", {}),
    ("qwen3", {"tie_word_embeddings": False}),
    ("qwen3_moe", {}),
    ("qwen3_moe", {"norm_topk_prob": True}),
]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_block_model(tmp_path / "converted")
    return tmp_path / "converted"


@pytest.mark.parametrize(("family", "changes"), FAMILY_CHANGES)
def test_an_independent_reading_of_the_form_gives_our_logits(family, changes, tmp_path):
    save_block_model(tmp_path / "converted", family, **changes)
    export_sdar(tmp_path / "converted", tmp_path / "out")
    ids = IDS.clone()
    ids[0, 5:] = MASK_ID  # masked places, as at decoding
    found = without(sdar_logits(tmp_path / "out", ids), MASK_ID)
    torch.testing.assert_close(found, our_logits(tmp_path / "converted", ids), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "changes"), FAMILY_CHANGES)
def test_an_export_imports_back_to_the_same_logits_and_facts(family, changes, tmp_path):
    recipe = {"recipe": {"name": "bd3lm"}, "sampler": {"threshold": 0.7}, "source_revision": "abc"}
    facts = save_block_model(tmp_path / "converted", family, facts=recipe, **changes)
    export_sdar(tmp_path / "converted", tmp_path / "out")
    assert import_checkpoint(tmp_path / "out", tmp_path / "back").facts == facts
    assert read_facts(tmp_path / "back") == facts
    assert torch.equal(our_logits(tmp_path / "back"), our_logits(tmp_path / "converted"))


def test_an_engine_never_predicts_the_mask_token(directory, tmp_path):
    large = tensors_of(directory)["model.embed_tokens.weight"][MASK_ID]
    export_sdar(directory, tmp_path / "out")
    logits = sdar_logits(tmp_path / "out", IDS)
    others = without(logits, MASK_ID)[..., :MASK_ID]  # of tokens, not of spare rows
    torch.testing.assert_close(logits[..., MASK_ID], others.mean(-1), atol=1e-5, rtol=1e-5)
    # What it reads where a token is masked is as it was trained.
    assert torch.equal(tensors_of(tmp_path / "out")["model.embed_tokens.weight"][MASK_ID], large)


@given(st.integers(0, 2**31), st.integers(2, 30), st.floats(0.01, 30))
def test_a_silenced_row_is_below_the_best_and_its_probability_below_one_over_the_vocabulary(seed, rows, scale):
    generator = torch.Generator().manual_seed(seed)
    head, state = torch.randn(rows + 1, 6, generator=generator), torch.randn(6, generator=generator)
    head[0] = 5 * state  # the strongest of all before
    logits = scale * (never_predicted(head, [0], list(range(rows + 1))) @ state)
    assert logits[0] < logits[1:].max()
    assert logits.softmax(0)[0] <= 1 / rows + 1e-6
    assert torch.equal(logits[1:], scale * (head @ state)[1:])


def test_every_key_that_engines_read_is_there(directory, tmp_path):
    export_sdar(directory, tmp_path / "out")
    config = read_json(tmp_path / "out" / "config.json")
    assert config["architectures"] == ["SDARForCausalLM"]
    assert (config["model_type"], config["block_size"], config["mask_token_id"]) == ("sdar", 4, MASK_ID)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e4
    assert config["bos_token_id"] is not None
    assert "lm_head.weight" in tensors_of(tmp_path / "out")
    assert yaml.safe_load((tmp_path / "out" / "sglang.yaml").read_text()) == {"block_size": 4, "threshold": 0.9}
    assert read_json(tmp_path / "out" / "generation_config.json")["eos_token_id"] == [config["eos_token_id"]]


# What SDAR's own modelling file reads of its configuration and no PretrainedConfig has by itself (training/model in
# JetAstra/SDAR, December 2025); the second line is what the mixture of experts (Qwen3-MoE's code) reads beside it.
READ_BY_SDAR = """
    attention_bias attention_dropout block_size fuse_cross_entropy head_dim hidden_act hidden_size initializer_range
    intermediate_size mask_token_id max_position_embeddings max_window_layers num_attention_heads num_hidden_layers
    num_key_value_heads pad_token_id rms_norm_eps rope_scaling rope_theta sliding_window use_cache use_sliding_window
    vocab_size
""".split()  # noqa: SIM905
READ_BY_EXPERTS = """
    decoder_sparse_step mlp_only_layers moe_intermediate_size norm_topk_prob num_experts num_experts_per_tok
    output_router_logits router_aux_loss_coef
""".split()  # noqa: SIM905


@pytest.mark.parametrize(
    ("family", "names"), [("qwen3", READ_BY_SDAR), ("qwen3_moe", [*READ_BY_SDAR, *READ_BY_EXPERTS])]
)
def test_every_attribute_that_sdars_own_model_reads_is_exported(family, names, tmp_path):
    save_block_model(tmp_path / "converted", family)
    export_sdar(tmp_path / "converted", tmp_path / "out")
    written = read_json(tmp_path / "out" / "config.json")
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert [name for name in names if not hasattr(config, name)] == []
    assert [name for name in names if name not in written] == [
        "rope_scaling"
    ]  # its class has it; see configuration_sdar


def test_mixtures_of_experts_have_their_own_names(tmp_path):
    save_block_model(tmp_path / "converted", "qwen3_moe")
    export_sdar(tmp_path / "converted", tmp_path / "out")
    config = read_json(tmp_path / "out" / "config.json")
    assert (config["architectures"], config["model_type"]) == (["SDARMoeForCausalLM"], "sdar_moe")
    assert config["num_experts"] == 4
    assert config["auto_map"] == {"AutoConfig": "configuration_sdar.SDARMoeConfig"}


def test_every_end_token_of_a_chat_model_is_handed_on(directory, tmp_path):
    change_json(directory / "generation_config.json", eos_token_id=[267, 265])
    export_sdar(directory, tmp_path / "out")
    assert read_json(tmp_path / "out" / "generation_config.json")["eos_token_id"] == [267, 265]
    assert read_json(tmp_path / "out" / "config.json")["eos_token_id"] == [267, 265]


def test_so_are_the_tokens_that_end_answers_in_training(tmp_path):
    save_block_model(tmp_path / "converted", facts={"end_token_ids": [7]})
    export_sdar(tmp_path / "converted", tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        assert read_json(tmp_path / "out" / name)["eos_token_id"] == [265, 7]


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_transformers_reads_the_configuration_with_the_class_beside_it(family, tmp_path):
    save_block_model(tmp_path / "converted", family)
    export_sdar(tmp_path / "converted", tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert config.rope_theta == config.rope_parameters["rope_theta"] == 5e4
    assert (config.block_size, config.pad_token_id) == (4, None)
    assert AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True).mask_token_id == MASK_ID


def test_a_small_vocabulary_keeps_its_mask_token_and_no_engine_is_promised(directory, tmp_path):
    exported = export_sdar(directory, tmp_path / "out")
    assert exported.facts.mask_token_id == MASK_ID
    assert not exported.commands
    assert any("151669" in note and "cannot serve" in note for note in exported.notes)


def test_the_mask_token_moves_to_the_id_that_engines_take(directory, tmp_path, monkeypatch):
    # As in a Qwen3 whose conversion took an existing token: the id that engines take is the next that is free.
    for room in ("mask_token", "sdar"):
        monkeypatch.setattr(f"decausal.exchange.{room}.ENGINE_MASK_TOKEN_ID", MASK_ID + 1)
    before = tensors_of(directory)["model.embed_tokens.weight"]
    exported = export_sdar(directory, tmp_path / "out")
    after = tensors_of(tmp_path / "out")["model.embed_tokens.weight"]
    assert exported.facts.mask_token_id == MASK_ID + 1
    assert any("moved" in note for note in exported.notes)
    assert torch.equal(after[MASK_ID + 1], before[MASK_ID])
    assert torch.equal(without(after.T, MASK_ID + 1), without(before.T, MASK_ID + 1))
    old, new = IDS.clone(), IDS.clone()
    old[:, 6:], new[:, 6:] = MASK_ID, MASK_ID + 1
    found = sdar_logits(tmp_path / "out", new)[..., :MASK_ID]
    torch.testing.assert_close(found, our_logits(directory, old)[..., :MASK_ID], atol=2e-5, rtol=1e-5)
    assert import_checkpoint(tmp_path / "out", tmp_path / "back").facts.mask_token_id == MASK_ID + 1


def test_an_id_that_is_another_tokens_is_refused(directory, tmp_path, monkeypatch):
    monkeypatch.setattr("decausal.exchange.mask_token.ENGINE_MASK_TOKEN_ID", 40)
    with pytest.raises(UserError, match=r"take token 40 for SDAR's mask token, but here that is"):
        export_sdar(directory, tmp_path / "out")


def test_an_id_that_the_tokenizer_cannot_come_to_is_refused(directory, tmp_path):
    large_vocabulary(directory)
    with pytest.raises(UserError, match=rf"should have id {ENGINE_MASK_TOKEN_ID}, but .* would have id {MASK_ID + 1}"):
        export_sdar(directory, tmp_path / "out")


def test_the_commands_name_the_directory_the_block_and_the_schedule(tmp_path, monkeypatch):
    for room in ("mask_token", "sdar"):
        monkeypatch.setattr(f"decausal.exchange.{room}.ENGINE_MASK_TOKEN_ID", MASK_ID)
    save_block_model(tmp_path / "a", facts={"block_size": 8, "sampler": {"threshold": 0.75}})
    save_block_model(tmp_path / "b", facts={"block_size": 8, "sampler": {"num_steps": 3}})
    dynamic, static = (export_sdar(tmp_path / name, tmp_path / f"out {name}").commands for name in "ab")
    assert dynamic["SGLang"] == (
        f"python3 -m sglang.launch_server --model-path '{tmp_path}/out a' --trust-remote-code --dllm-algorithm "
        f"LowConfidence --dllm-algorithm-config '{tmp_path}/out a/sglang.yaml' --attention-backend flashinfer "
        "--max-running-requests 64"
    )
    assert dynamic["LMDeploy"] == (
        f"lmdeploy serve api_server '{tmp_path}/out a' --backend pytorch --trust-remote-code --dllm-block-length 8 "
        "--dllm-unmasking-strategy low_confidence_dynamic --dllm-denoising-steps 8 --dllm-confidence-threshold 0.75"
    )
    assert static["LMDeploy"].endswith("--dllm-unmasking-strategy low_confidence_static --dllm-denoising-steps 3")
    assert yaml.safe_load((tmp_path / "out a" / "sglang.yaml").read_text()) == {"block_size": 8, "threshold": 0.75}
    assert dynamic["SGLang"] in (tmp_path / "out a" / "README.md").read_text()


@pytest.mark.parametrize(
    ("facts", "family", "changes", "reason"),
    [
        ({"shift": 1}, "qwen3", {}, "its shift is 1"),
        ({"causal_context": True}, "qwen3", {}, "finished blocks read causally"),
        ({"layout": "bidirectional", "block_size": None}, "qwen3", {}, "its layout is 'bidirectional'"),
        ({}, "qwen2", {}, "it is made from 'qwen2', and SDAR is Qwen3 or Qwen3-MoE"),
        ({}, "qwen3", {"hidden_act": "gelu"}, "its activation is 'gelu'"),
        ({}, "qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "sliding-window"),
        ({}, "qwen3_moe", {"decoder_sparse_step": 2}, "not mixtures of experts"),
    ],
)
def test_what_sdar_cannot_express_is_refused_with_the_reason(facts, family, changes, reason, tmp_path):
    save_block_model(tmp_path / "converted", family, facts=facts, **changes)
    with pytest.raises(UserError, match="cannot be exported as SDAR") as refused:
        export_sdar(tmp_path / "converted", tmp_path / "out")
    assert reason in str(refused.value)
    assert "--format hf" in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted"]


def test_scaled_rotary_embeddings_are_refused(directory, tmp_path):
    yarn = {"rope_type": "yarn", "rope_theta": 5e4, "factor": 4.0, "original_max_position_embeddings": 16}
    change_json(directory / "config.json", rope_parameters=yarn)
    with pytest.raises(UserError, match=r"rotary embedding is scaled \('yarn'\)"):
        export_sdar(directory, tmp_path / "out")


def test_weights_keep_their_type(directory, tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in tensors_of(directory).items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    export_sdar(directory, tmp_path / "out")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}
    assert read_json(tmp_path / "out" / "config.json")["torch_dtype"] == "bfloat16"


def test_facts_that_the_tokenizer_contradicts_are_refused(directory, tmp_path):
    change_json(directory / "decausal.json", mask_token_id=3)
    with pytest.raises(UserError, match="mask_token_id 3, the tokenizer's mask token has id"):
        export_sdar(directory, tmp_path / "out")
