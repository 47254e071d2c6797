"""A small model from nothing: its optimiser, and a run that resumes bit for bit."""

from __future__ import annotations

import copy
import json
from itertools import islice

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from decausal.data import streamed_rows
from decausal.data.rows import load_rows
from decausal.data.tasks import examples
from decausal.errors import UserError
from decausal.evaluation.tasks import evaluate_tasks
from decausal.models.adapt import load_source
from decausal.training import pretrain as room
from decausal.training.muon import MuonWithAdamW
from decausal.training.pretrain import pretrain
from decausal.training.run_directory import checkpoints
from decausal.training.settings.pretraining import PretrainSettings
from tests.families import FAMILIES
from tests.runs import assert_same, kept_from_others, weights

SHAPE = {
    "vocab_size": 270,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_length": 32,
}
TRAINING = {
    "max_steps": 6,
    "save_steps": 2,
    "logging_steps": 1,
    "gradient_accumulation_steps": 2,
    "warmup_steps": 1,
    "lr_scheduler_kwargs": {"num_decay_steps": 2, "min_lr_ratio": 0.1},
    "disable_tqdm": True,
    "use_cpu": True,
}


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question\n" * 100)
    return str(tmp_path / "text.txt")


def run(text, output_dir, *, streaming=False, streaming_window=4096, **training):
    streamed = {"streaming": streaming, "streaming_window": streaming_window}
    settings = PretrainSettings(data=text, eval_data=text, **SHAPE, **streamed)
    return pretrain(settings, TRAINING | training | {"output_dir": str(output_dir)})


def test_it_learns_loads_in_plain_transformers_and_says_how_it_was_made(tmp_path, text):
    trained = run(text, tmp_path / "ar", max_steps=30, save_steps=30, bf16=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ar")
    assert kept_from_others(tmp_path / "ar") == []
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ar")
    assert model.dtype == torch.bfloat16
    assert (tokenizer.eos_token_id, tokenizer.mask_token_id) == (0, 1)
    ids = torch.tensor([tokenizer("to be or not to be, that is the question\n" * 2)["input_ids"][:32]])
    loss = model.float()(ids, labels=ids).loss.item()
    assert loss < 4 < torch.log(torch.tensor(270.0))
    assert trained.heldout.nll_per_token < 4
    card = (tmp_path / "ar" / "README.md").read_text()
    assert f"{trained.heldout.bits_per_byte:.4f} bits per byte" in card
    assert "--vocab_size 270" in card


def test_on_tasks_it_writes_single_characters_and_its_card_says_how_many_answers_are_right(tmp_path):
    settings = PretrainSettings(
        data="tasks:lookup+words:60",
        eval_data="tasks-heldout:lookup+words:6",
        tokenizer="characters",
        attn_implementation="eager",
        **SHAPE | {"max_length": 96, "max_position_embeddings": 256},
    )
    trained = pretrain(settings, TRAINING | {"max_steps": 2, "output_dir": str(tmp_path / "ar")})
    model, tokenizer = load_source(tmp_path / "ar")
    assert len(tokenizer) == len(model.get_input_embeddings().weight) == 100
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 256
    problems = list(islice(examples(["lookup", "words"], "heldout"), 6))
    assert trained.tasks == evaluate_tasks((model, tokenizer), problems)
    card = (tmp_path / "ar" / "README.md").read_text()
    for stated in ("single characters", "context of 256", "--tokenizer characters", "| lookup | 0.000 | 0.000 | 3 |"):
        assert stated in card


def test_bpe_is_trained_on_prompts_and_completions_too(tmp_path):
    settings = PretrainSettings(data="tasks:reversing:40", eval_data=None, **SHAPE)
    pretrain(settings, TRAINING | {"max_steps": 1, "output_dir": str(tmp_path / "ar")})
    assert len(AutoTokenizer.from_pretrained(tmp_path / "ar").tokenize("reverse ")) < len("reverse ")


@pytest.mark.parametrize("tokenizer", ["bpe", "characters"])
@pytest.mark.parametrize("field", ["data", "eval_data"])
def test_conversations_are_refused(tmp_path, text, tokenizer, field):
    turns = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    data = {"data": text, "eval_data": text, field: str(tmp_path / "chat.jsonl")}
    settings = PretrainSettings(tokenizer=tokenizer, **data, **SHAPE)
    with pytest.raises(UserError, match=r"chat.jsonl:1: a conversation, and pretraining reads plain text, or prompts"):
        pretrain(settings, TRAINING | {"max_steps": 1, "output_dir": str(tmp_path / "ar")})
    assert not list(tmp_path.glob("ar/*"))  # before any training


class StopAt(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


STREAMED = {"streaming": True, "streaming_window": 4}


@pytest.mark.parametrize("streamed", [{}, STREAMED], ids=["packed", "streamed"])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, text, monkeypatch, streamed):
    monkeypatch.setattr(streamed_rows, "CACHE_DIR", tmp_path / "cache")
    run(text, tmp_path / "whole", **streamed)
    trainer_of = room._trainer

    def stopping(*args):
        trainer = trainer_of(*args)
        trainer.add_callback(StopAt())
        return trainer

    with monkeypatch.context() as patched:
        patched.setattr(room, "_trainer", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(text, tmp_path / "stopped", **streamed)
    assert [path.name for path in checkpoints(tmp_path / "stopped")] == ["checkpoint-2", "checkpoint-4"]
    run(text, tmp_path / "stopped", resume_from_checkpoint="true", **streamed)
    last = "checkpoint-6"
    assert_same(weights(tmp_path / "stopped" / last), weights(tmp_path / "whole" / last))
    assert_same(weights(tmp_path / "stopped"), weights(tmp_path / "whole"))
    assert len(list(tmp_path.glob("cache/*"))) == (1 if streamed else 0), "the resumed run reads the same windows"


def test_streamed_rows_in_one_window_train_as_packed_ones(tmp_path, text, monkeypatch):
    """Then they are shuffled as packed ones are, and any difference is one of the rows."""
    monkeypatch.setattr(streamed_rows, "CACHE_DIR", tmp_path / "cache")
    one_window = len(load_rows(text, _tokenizer_of(run(text, tmp_path / "packed")), SHAPE["max_length"]))
    run(text, tmp_path / "streamed", streaming=True, streaming_window=one_window)
    assert_same(weights(tmp_path / "streamed"), weights(tmp_path / "packed"))


def _tokenizer_of(trained):
    return AutoTokenizer.from_pretrained(trained.output_dir)


def test_of_streamed_data_the_tokenizer_is_trained_on_the_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "TOKENIZER_CHARACTERS", 400)
    for name, words in (("a", "question " * 20), ("b", "question " * 60), ("c", "absolute " * 60)):
        (tmp_path / f"{name}.txt").write_text(words)
    data = tuple(str(tmp_path / f"{name}.txt") for name in "abc")
    read = {
        streaming: "".join(room._texts(PretrainSettings(data=data, streaming=streaming))) for streaming in (False, True)
    }
    assert read[True].count("question ") == 80 == read[False].count("question ")
    assert ("absolute" in read[True], "absolute" in read[False]) == (False, True)


def test_streaming_needs_the_length_of_the_run(tmp_path, text):
    with pytest.raises(UserError, match="--streaming true needs --max_steps"):
        run(text, tmp_path / "ar", max_steps=-1, num_train_epochs=1, streaming=True)


@pytest.mark.parametrize(
    ("shape", "reported"),
    [
        ({"num_attention_heads": 6}, "not a multiple of --num_attention_heads"),
        ({"num_key_value_heads": 3}, "not a multiple of --num_key_value_heads"),
        ({"hidden_size": 12, "num_attention_heads": 4, "num_key_value_heads": 1}, "must be even"),
        ({"vocab_size": 100}, "--vocab_size 100: must be at least 258"),
        ({"num_hidden_layers": 0}, "--num_hidden_layers 0"),
        ({"max_position_embeddings": 16}, "--max_position_embeddings 16: must be at least 32"),
    ],
)
def test_impossible_shapes_are_refused(shape, reported):
    with pytest.raises(UserError, match=reported):
        PretrainSettings(**(SHAPE | shape))


# The optimiser


def separate(model: nn.Module, muon_rate: float, rate: float, decay: float) -> list[torch.optim.Optimizer]:
    """torch's two optimisers, distinguished by name."""
    matrices = [
        p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name and "lm_head" not in name
    ]
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    return [
        torch.optim.Muon(matrices, lr=muon_rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def step(model: nn.Module, optimizers: list[torch.optim.Optimizer], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("family", ["qwen3", "llama"])  # tied and untied
def test_one_optimiser_steps_as_the_two_it_joins(family):
    joined = FAMILIES[family]()
    apart = copy.deepcopy(joined)
    one, two = [MuonWithAdamW(joined, 0.02, 0.01, 0.1)], separate(apart, 0.02, 0.01, 0.1)
    for seed in range(3):
        step(joined, one, seed)
        step(apart, two, seed)
    assert_same(dict(joined.named_parameters()), dict(apart.named_parameters()))


def test_a_schedule_moves_the_rates_of_both_parts():
    model = FAMILIES["llama"]()
    optimizer = MuonWithAdamW(model, 0.02, 0.01, 0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: 0.0 if number else 1.0)
    step(model, [optimizer], 0)
    scheduler.step()
    before = copy.deepcopy(model)
    step(model, [optimizer], 1)
    assert_same(dict(model.named_parameters()), dict(before.named_parameters()))


def test_its_state_survives_saving_and_loading(tmp_path):
    model = FAMILIES["llama"]()
    optimizer = MuonWithAdamW(model, 0.02, 0.01, 0.1)
    step(model, [optimizer], 0)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    copied = copy.deepcopy(model)
    loaded = MuonWithAdamW(copied, 0.5, 0.5, 0.5)
    loaded.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for seed in (1, 2):
        step(model, [optimizer], seed)
        step(copied, [loaded], seed)
    assert_same(dict(copied.named_parameters()), dict(model.named_parameters()))
