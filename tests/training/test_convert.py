"""Each option of a conversion does what its name says, seen from outside: run it, look at the weights and the log."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import decausal
from decausal.errors import UserError
from decausal.evaluation.likelihood import evaluate_nll
from decausal.models.checkpoint import load_converted
from decausal.training.run import training_arguments
from decausal.training.run_directory import checkpoints
from decausal.training.terms import aligned_layers
from tests.families import FAMILIES, tiny_tokenizer
from tests.runs import assert_same, logged, run, save_source, weights, write_text


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save_source(tmp_path_factory.mktemp("source") / "model", "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


def differing(found: Path, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in weights(found).items() if not torch.equal(tensor, before[name])}


def test_what_comes_out_is_a_plain_model_with_its_facts(tmp_path, source, text):
    conversion = run(source, text, tmp_path / "out", align_weight=1.0, shift=1)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(plain).__name__ == "LlamaForCausalLM"
    assert plain.config.is_causal is False
    converted = load_converted(tmp_path / "out")
    assert_same(dict(converted.model.state_dict()), dict(plain.state_dict()))
    assert_same(dict(conversion.model.state_dict()), dict(plain.state_dict()))
    assert not conversion.model.training
    assert "forward" not in vars(conversion.model)
    assert (converted.facts.layout, converted.facts.shift) == ("bidirectional", 1)
    assert converted.facts.source == str(source)
    assert converted.facts.recipe["align_weight"] == 1.0
    assert converted.facts.recipe["learning_rate"] == 1e-3
    assert AutoTokenizer.from_pretrained(tmp_path / "out").mask_token_id == converted.facts.mask_token_id
    assert decausal.load(tmp_path / "out").generate("the", max_new_tokens=3).ids


def test_checkpoints_load_like_the_final_model(tmp_path, source, text):
    run(source, text, tmp_path / "out", freeze_embeddings=True)
    last = load_converted(tmp_path / "out" / "checkpoint-4")
    assert_same(dict(last.model.state_dict()), dict(load_converted(tmp_path / "out").model.state_dict()))


@pytest.mark.parametrize("shift", [0, 1])
def test_the_shift_is_trained_and_written_down(tmp_path, source, text, shift):
    run(source, text, tmp_path / "out", shift=shift, max_steps=1)
    assert json.loads((tmp_path / "out" / "decausal.json").read_text())["shift"] == shift


CHANGES = {
    "shift": {"shift": 0},
    "weighting": {"weighting": "inverse_t"},
    "papl": {"papl": 1.0},
    "views": {"views": 2},
    "complementary_masks": {"views": 2, "complementary_masks": True},
    "stratified_noise": {"stratified_noise": False},
    "anneal_steps": {"anneal_steps": 3},
    "align_weight": {"align_weight": 5.0},
    "align_distance": {"align_weight": 10.0, "align_distance": "l2"},
    "align_layers": {"align_weight": 10.0, "align_layers": (0, 2)},
    "align_positions": {"align_weight": 10.0, "align_positions": "all"},
    "align_schedule": {"align_weight": 10.0, "align_schedule": "linear"},
    "layout": {"layout": "causal"},
    "seed": {"seed": 7},
    "data_fraction": {"data_fraction": 0.5},
    "aligned": {"align_weight": 10.0},
    "plain": {},
}


@pytest.fixture(scope="module")
def losses(tmp_path_factory, source, text) -> dict[str, tuple[float, ...]]:
    root = tmp_path_factory.mktemp("losses")
    return {
        name: tuple(logged(run(source, text, root / name, max_steps=2, save_strategy="no", **options), "loss"))
        for name, options in CHANGES.items()
    }


@pytest.mark.parametrize("name", [name for name in CHANGES if name not in ("plain", "aligned")])
def test_every_choice_of_the_loss_reaches_training(losses, name):
    assert losses[name] != losses["aligned" if name.startswith("align") else "plain"]


def test_attention_opens_from_causal_when_it_is_annealed(losses):
    assert losses["anneal_steps"][0] == losses["layout"][0]  # step 0: nothing of the future is visible yet
    assert losses["anneal_steps"][1] != losses["layout"][1]


def test_frozen_embeddings_change_in_the_mask_tokens_row_alone(tmp_path, source, text):
    run(source, text, tmp_path / "out", freeze_embeddings=True, align_weight=1.0)
    before, after = weights(source), weights(tmp_path / "out")
    mask_token_id = load_converted(tmp_path / "out").facts.mask_token_id
    embedding = after["model.embed_tokens.weight"]
    assert mask_token_id == len(before["model.embed_tokens.weight"])
    assert torch.equal(embedding[:mask_token_id], before["model.embed_tokens.weight"])
    assert not torch.allclose(embedding[mask_token_id], before["model.embed_tokens.weight"].mean(0), atol=1e-5)
    assert torch.equal(after["lm_head.weight"][:mask_token_id], before["lm_head.weight"])
    assert all(not torch.equal(after[name], before[name]) for name in before if "proj" in name)


def test_without_freezing_all_weights_change(tmp_path, source, text):
    run(source, text, tmp_path / "out")
    before = {
        name: t for name, t in weights(source).items() if t.ndim > 1 and "embed" not in name and "head" not in name
    }
    assert all(not torch.equal(weights(tmp_path / "out")[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("vocab_size", "own_mask", "asked", "expected_id", "num_rows"),
    [
        (268, None, None, 268, 269),  # no spare row: the embedding grows
        (300, None, None, 268, 300),  # a spare row is taken
        (268, "<|im_start|>", None, 266, 268),  # the tokenizer's own
        (268, None, "<|im_end|>", 267, 268),  # one that the user names
        (300, None, "<gap>", 268, 300),  # a new one that the user names
    ],
    ids=["grown", "spare", "own", "named", "new"],
)
def test_the_mask_token_is_the_named_the_own_or_an_added_one(
    tmp_path, text, vocab_size, own_mask, asked, expected_id, num_rows
):
    directory = save_source(tmp_path / "model", "llama", vocab_size=vocab_size)
    tokenizer = tiny_tokenizer()
    if own_mask:
        tokenizer.mask_token = own_mask
    tokenizer.save_pretrained(directory)
    run(directory, text, tmp_path / "out", mask_token=asked, max_steps=1)
    model, loaded, facts = load_converted(tmp_path / "out")
    assert facts.mask_token_id == loaded.mask_token_id == expected_id
    assert loaded.mask_token == (asked or own_mask or "<|mask|>")
    assert len(model.get_input_embeddings().weight) == num_rows


@pytest.mark.parametrize(
    ("save_dtype", "source_dtype", "expected"),
    [
        ("source", torch.bfloat16, torch.bfloat16),
        ("source", torch.float32, torch.float32),
        ("float32", torch.bfloat16, torch.float32),
        ("bfloat16", torch.float32, torch.bfloat16),
    ],
)
def test_final_weights_have_the_type_asked_for_and_checkpoints_the_master_weights(
    tmp_path, text, save_dtype, source_dtype, expected
):
    directory = tmp_path / "model"
    FAMILIES["qwen3"]().to(source_dtype).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    run(directory, text, tmp_path / "out", save_dtype=save_dtype, max_steps=2)
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {expected}
    assert {tensor.dtype for tensor in weights(tmp_path / "out" / "checkpoint-2").values()} == {torch.float32}
    assert load_converted(tmp_path / "out").model.dtype == torch.float32  # loading decides for itself
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(expected).removeprefix("torch.")


def test_bf16_autocast_keeps_fp32_master_weights_and_a_bf16_teacher(tmp_path, source, text):
    conversion = run(source, text, tmp_path / "bf16", bf16=True, align_weight=1.0, learning_rate=1e-5)
    assert {p.dtype for p in conversion.model.parameters()} == {torch.float32}
    before, after = weights(source), weights(tmp_path / "bf16" / "checkpoint-4")
    moved = after["model.layers.0.mlp.up_proj.weight"] - before["model.layers.0.mlp.up_proj.weight"]
    assert 0 < moved.abs().max() < 1e-4
    assert len(moved.unique()) > 100  # steps that bf16 weights would have rounded away
    exact = run(source, text, tmp_path / "fp32", align_weight=1.0, learning_rate=1e-5)
    assert logged(conversion, "loss") == pytest.approx(logged(exact, "loss"), rel=0.02)
    assert logged(conversion, "loss") != logged(exact, "loss")


# LoRA


def test_adapters_alone_are_trained_and_saved_and_are_merged_at_the_end(tmp_path, source, text):
    conversion = run(source, text, tmp_path / "out", lora_r=4, align_weight=1.0)
    for checkpoint in checkpoints(tmp_path / "out"):
        assert not (checkpoint / "model.safetensors").exists()
        names = json.loads((checkpoint / "checkpoint.json").read_text())["sizes"]
        assert {"adapter_model.safetensors", "adapter_config.json", "mask_row.safetensors"} <= set(names)
        assert (checkpoint / "adapter_model.safetensors").stat().st_size < 40_000
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert set(weights(tmp_path / "out")) == set(weights(source))
    assert type(conversion.model).__name__ == "LlamaForCausalLM"
    changed = differing(tmp_path / "out", dict(FAMILIES["llama"](vocab_size=269).state_dict()))
    before = weights(source)
    assert all(torch.equal(weights(tmp_path / "out")[name], before[name]) for name in before if "norm" in name)
    assert {name for name in changed if "proj" in name} == {name for name in before if "proj" in name}
    assert_same(dict(conversion.model.state_dict()), dict(plain.state_dict()))
    assert torch.equal(
        conversion.model(torch.arange(260, 269)[None]).logits, plain(torch.arange(260, 269)[None]).logits
    )


def test_adapters_go_where_they_are_asked_to(tmp_path, source, text):
    run(source, text, tmp_path / "out", lora_r=4, lora_target_modules=("q_proj", "v_proj"))
    before, after = weights(source), weights(tmp_path / "out")
    changed = {name.split(".")[-2] for name in before if "proj" in name and not torch.equal(after[name], before[name])}
    assert changed == {"q_proj", "v_proj"}
    with pytest.raises(UserError, match=r"--lora_target_modules: .*nowhere"):
        run(source, text, tmp_path / "other", lora_r=4, lora_target_modules=("nowhere",))


# Layers


def test_layers_are_named_by_thirds_words_or_indices():
    assert aligned_layers("all", 6) == (0, 1, 2, 3, 4, 5, 6)
    thirds = [aligned_layers(third, 11) for third in ("lower", "middle", "upper")]
    assert thirds == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)]
    assert [len(aligned_layers(third, 6)) for third in ("lower", "middle", "upper")] == [2, 3, 2]
    assert aligned_layers("3", 6) == aligned_layers((3,), 6) == (3,)
    assert aligned_layers((6, 0, 0), 6) == (0, 6)


@pytest.mark.parametrize("choice", ["top", (7,), (-1,), ()])
def test_layers_that_the_model_has_not_are_refused(choice):
    with pytest.raises(UserError, match="--align_layers"):
        aligned_layers(choice, 6)


# Data and measuring


def test_held_out_data_are_measured_as_often_as_asked_and_at_the_end(tmp_path, source, text, capsys):
    conversion = run(source, text, tmp_path / "out", max_steps=5, eval_data=str(text), eval_rows=2, eval_steps=2)
    assert f"--eval_data {text}: trained on too" in capsys.readouterr().err
    measured = [entry["step"] for entry in conversion.history if "eval_nelbo_per_token" in entry]
    assert measured == [2, 4, 5]
    assert all(entry["eval_masked_cross_entropy"] > 0 for entry in conversion.history if "eval_bits_per_byte" in entry)


def test_held_out_rows_have_as_many_mask_patterns_as_asked(tmp_path, source, text, monkeypatch):
    asked = []

    def evaluate(*args, samples_per_row, **kwargs):
        asked.append(samples_per_row)
        return evaluate_nll(*args, samples_per_row=samples_per_row, **kwargs)

    monkeypatch.setattr("decausal.training.measuring.evaluate_nll", evaluate)
    run(source, text, tmp_path / "out", eval_data=str(text), eval_rows=2, eval_samples=3)
    assert set(asked) == {3}


def test_held_out_data_may_be_another_split_of_the_same_data(tmp_path, source, text, capsys):
    for name, lines in (("train", slice(4, None)), ("test", slice(4))):
        (tmp_path / "data").mkdir(exist_ok=True)
        content = text.read_text().splitlines(keepends=True)[lines]
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(content))
    data = str(tmp_path / "data")
    measured = {"eval_data": data, "eval_split": "test", "eval_rows": 2}
    conversion = run(source, data, tmp_path / "out", **measured)
    reported = capsys.readouterr().err
    assert "trained on too" not in reported
    assert re.search(r"read .*test\.jsonl: 4 records", reported)
    assert any("eval_nelbo_per_token" in entry for entry in conversion.history)

    both = f"{data},{data}/test.jsonl"  # a file has no splits, and may stand beside data that have them
    run(source, both, tmp_path / "same", **measured | {"eval_data": both})
    assert f"--eval_data {data}/test.jsonl: trained on too" in capsys.readouterr().err


def test_measuring_changes_nothing_in_training(tmp_path, source, text):
    run(source, text, tmp_path / "plain")
    run(source, text, tmp_path / "measured", eval_data=str(text), eval_rows=2, eval_steps=1)
    assert_same(weights(tmp_path / "measured"), weights(tmp_path / "plain"))


def test_the_best_checkpoint_is_kept_and_loaded_where_asked(tmp_path, source, text):
    options = {"eval_data": str(text), "eval_rows": 2, "eval_steps": 1, "save_steps": 1, "eval_strategy": "steps"}
    options |= {
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_nelbo_per_token",
        "greater_is_better": True,
    }
    conversion = run(
        source,
        text,
        tmp_path / "out",
        max_steps=5,
        learning_rate=0.05,
        save_total_limit=1,
        freeze_embeddings=True,
        **options,
    )
    nelbo = logged(conversion, "eval_nelbo_per_token")
    best = 1 + nelbo.index(max(nelbo))  # the worst, so that it is not the last
    assert best < 5
    kept = {path.name for path in checkpoints(tmp_path / "out")}
    assert kept == {f"checkpoint-{best}"}
    assert_same(weights(tmp_path / "out"), weights(tmp_path / "out" / f"checkpoint-{best}"))


def test_only_as_many_checkpoints_are_kept_as_asked(tmp_path, source, text):
    run(source, text, tmp_path / "out", max_steps=4, save_steps=1, save_total_limit=2)
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-3", "checkpoint-4"]


def test_epochs_count_passes_over_the_rows(tmp_path, source, text):
    conversion = run(
        source, text, tmp_path / "out", max_steps=-1, num_train_epochs=0.2, data_fraction=0.5, save_steps=50
    )
    epochs = logged(conversion, "epoch")
    assert 0.2 <= epochs[-1] < 0.2 + epochs[0] + 1e-3  # whole steps, the first of which ends at epochs[0]
    assert epochs == sorted(epochs)


def test_prompts_and_completions_train_on_answers_alone(tmp_path, source):
    records = [{"prompt": f"{n} and {n} make ", "completion": f"{2 * n}"} for n in range(30)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    conversion = run(source, data, tmp_path / "out", max_length=32, max_steps=2)
    assert len(logged(conversion, "token_loss")) == 2


def test_several_sources_are_read_as_one(tmp_path, source, text):
    (tmp_path / "more.txt").write_text("more text than that\n" * 20)
    data = (str(text), str(tmp_path / "more.txt"))
    conversion = run(source, data, tmp_path / "out", max_steps=1)
    alone = run(source, text, tmp_path / "alone", max_steps=1)
    assert logged(conversion, "epoch")[0] < logged(alone, "epoch")[0]  # more rows: a step is a smaller part of them


def test_several_gpus_in_one_process_do_not_cut_batches_apart(tmp_path, monkeypatch):
    set_up = TrainingArguments.__post_init__

    def as_if_there_were_four(self):
        set_up(self)
        self._n_gpu = 4

    monkeypatch.setattr(TrainingArguments, "__post_init__", as_if_there_were_four)
    assert training_arguments({"output_dir": str(tmp_path), "use_cpu": True}).n_gpu == 1


def test_rollouts_are_refused_under_fsdp1(tmp_path, source, text, monkeypatch):
    plugin = SimpleNamespace(fsdp_version=1, activation_checkpointing=False, state_dict_type="FULL_STATE_DICT")
    monkeypatch.setattr(AcceleratorState, "fsdp_plugin", plugin, raising=False)
    options = {"layout": "block", "block_size": 4, "rows": "rollout", "kl_weight": 1.0}
    with pytest.raises(UserError, match="--rows rollout needs FSDP2"):
        run(source, text, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_zero_3_is_refused_before_a_model_is_loaded(source, tmp_path, text, monkeypatch):
    plugin = SimpleNamespace(zero_stage=3)
    monkeypatch.setattr(
        TrainingArguments, "deepspeed_plugin", property(lambda _: plugin, lambda *_: None), raising=False
    )
    monkeypatch.setattr("decausal.training.convert.load_source", None)  # not called
    with pytest.raises(UserError, match="ZeRO-3 is not accepted"):
        run(source, text, tmp_path / "out")
    assert not (tmp_path / "out").exists()
