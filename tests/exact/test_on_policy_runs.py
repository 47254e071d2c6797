"""Identity 9 for runs on rollouts: resumed equals uninterrupted, micro-batches change nothing, rollouts are fresh."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from decausal.config import read_recipe
from decausal.devices import ON_CUDA
from decausal.errors import UserError
from decausal.sampling.model import load
from decausal.training.rollouts import Decoding
from tests.exact.test_resume import StopAt, StoppedError
from tests.families import CHAT_TOKENS, NO_DROPOUT, tiny_tokenizer
from tests.runs import T, assert_same, logged, run, save_source, weights, write_text
from tests.sampling.tape import Tapes

ON_POLICY = {
    "layout": "block",
    "block_size": 4,
    "shift": 0,
    "rows": "rollout",
    "token_weight": 0.0,
    "kl_weight": 1.0,
    "rollout_tokens": 7,
    "rollout_threshold": 0.01,
    "states_per_rollout": 2,
}
WARM = {"token_weight": 1.0, "token_stop_step": 2, "kl_start_step": 2, "warm_start_steps": 2, "align_weight": 1.0}
WARM |= {"align_stop_step": 2, "causal_kl_weight": 0.5}
PLAIN_SGD = {"optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0, "lr_scheduler_type": "constant"}


@pytest.fixture(autouse=True)
def _one_thread():
    """Bit for bit needs the same sums in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_source(tmp_path / "model", "qwen3")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.jsonl")


# Steps 0 and 1 are warm start; each rollout batch serves four steps: two, each of its rollouts twice.
@pytest.mark.parametrize("stop", [1, 2, 3, 6], ids=["warm", "seam", "mid_buffer", "second_buffer"])
def test_resumed_equals_uninterrupted_across_the_seam_and_in_mid_buffer(tmp_path, text, stop):
    source = save_source(tmp_path / "model", "gpt2", **dict.fromkeys(NO_DROPOUT, 0.1))
    options = ON_POLICY | WARM | {"rollout_prompts": 4, "rollout_updates": 2, "max_steps": 7, "save_steps": 1}
    whole = run(source, text, tmp_path / "whole", **options)
    with pytest.raises(StoppedError):
        run(source, text, tmp_path / "stopped", callbacks=[StopAt(stop)], **options)
    resumed = run(source, text, tmp_path / "stopped", resume_from_checkpoint="true", **options)
    assert_same(weights(tmp_path / "stopped"), weights(tmp_path / "whole"))
    assert logged(whole, "rollout_staleness") == [0, 1, 2, 3, 0]
    assert logged(resumed, "rollout_staleness") == logged(whole, "rollout_staleness")
    assert logged(resumed, "loss") == logged(whole, "loss")


def test_a_run_that_ended_in_mid_buffer_can_be_made_longer(tmp_path, source, text):
    options = ON_POLICY | {"rollout_prompts": 8, "lr_scheduler_type": "constant"}
    run(source, text, tmp_path / "out", max_steps=2, **options)
    longer = run(source, text, tmp_path / "out", max_steps=5, resume_from_checkpoint="true", **options)
    assert len(logged(longer, "kl_loss")) == 5
    assert logged(longer, "rollout_staleness") == [0, 1, 2, 3, 0]


def test_four_micro_batches_of_one_equal_one_batch_of_four(tmp_path, source, text):
    options = ON_POLICY | PLAIN_SGD | {"max_steps": 2, "rollout_prompts": 8, "causal_kl_weight": 1.0}
    for size, accumulation in ((4, 1), (1, 4)):
        run(
            source,
            text,
            tmp_path / str(size),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            **options,
        )
    assert_same(weights(tmp_path / "1"), weights(tmp_path / "4"), atol=1e-6)


def test_every_rollout_is_made_by_the_weights_of_the_step_that_trains_on_it(tmp_path, source, text, monkeypatch):
    made, trained = [], []
    roll_out = Decoding.roll_out

    def recorded(self, model, tasks):
        modes = [module.training for module in model.modules()]
        rollouts = roll_out(self, model, tasks)
        assert [module.training for module in model.modules()] == modes
        made.append(next(model.parameters()).detach().clone())
        return rollouts

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            trained.append(next(model.parameters()).detach().clone())

    monkeypatch.setattr(Decoding, "roll_out", recorded)
    run(source, text, tmp_path / "out", callbacks=[Watch()], **ON_POLICY)
    assert len(made) == len(trained) == 4
    assert all(map(torch.equal, made, trained))
    assert not torch.equal(made[0], made[1])


def test_rollouts_whose_passes_are_recorded_train_the_same(tmp_path, source, text, monkeypatch):
    run(source, text, tmp_path / "plain", **ON_POLICY)
    tapes = Tapes()
    monkeypatch.setattr("decausal.training.rollouts.choices", lambda _: ON_CUDA)
    monkeypatch.setattr("decausal.training.rollouts.CudaGraphs", lambda _: tapes)
    run(source, text, tmp_path / "recorded", **ON_POLICY)
    assert tapes.num_replayed > tapes.num_recorded > 0
    assert_same(weights(tmp_path / "recorded"), weights(tmp_path / "plain"))


def test_adapters_off_are_the_teacher_that_a_second_copy_would_be(tmp_path, source, text):
    options = ON_POLICY | {"lora_r": 2, "lora_dropout": 0.1, "align_weight": 1.0, "kl_top_k": 8}
    run(source, text, tmp_path / "one", **options)
    run(source, text, tmp_path / "two", teacher_model_name_or_path=str(source), **options)
    assert_same(weights(tmp_path / "one"), weights(tmp_path / "two"))


def test_a_larger_teacher_of_the_same_tokenizer_serves(tmp_path, source, text):
    teacher = save_source(tmp_path / "teacher", "llama", hidden_size=48, vocab_size=300)
    conversion = run(source, text, tmp_path / "out", teacher_model_name_or_path=str(teacher), **ON_POLICY)
    assert len(logged(conversion, "kl_loss")) == 4


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("recipe", ["opdlm", "align-distill"])
def test_its_recipes_convert_and_what_comes_out_writes(tmp_path, source, text, recipe, lora):
    sizes = {"per_device_train_batch_size": 2, "rollout_prompts": 4, "rollout_tokens": 8, "rollout_tokens_start": 4}
    settings = read_recipe(recipe)
    # A run of 4 steps has room for a warm start of 2.
    warm_start = {name: 2 for name, value in settings.items() if value == settings.get("warm_start_steps")}
    conversion = run(source, text, tmp_path / "out", **(settings | sizes | warm_start | {"lora_r": lora}))
    assert logged(conversion, "kl_loss")
    assert logged(conversion, "rollout_length")
    assert ("alignment_loss" in conversion.history[0]) == (recipe == "align-distill")
    generation = load(tmp_path / "out").generate("the rain", max_new_tokens=8)
    assert len(generation.ids) <= 8


def test_the_number_of_new_tokens_grows_to_its_end_and_fills_the_last_block(tmp_path, source, text):
    options = ON_POLICY | {"rollout_tokens": 12, "rollout_tokens_start": 2, "rollout_curriculum": 2}
    lengths = logged(run(source, text, tmp_path / "out", **options), "rollout_length")
    assert len(lengths) == 4
    assert lengths[0] < lengths[1] < lengths[2]
    assert 2 <= lengths[0] < 2 + 4
    assert 12 <= lengths[2] < 12 + 4


def test_an_epoch_is_one_pass_over_the_prompts(tmp_path, source):
    data = write_text(tmp_path / "few.jsonl", 6)
    conversion = run(source, data, tmp_path / "out", max_steps=-1, num_train_epochs=2, **ON_POLICY)
    assert conversion.history[-1]["step"] == 6
    assert conversion.history[-1]["epoch"] == 2


def refused(tmp_path, source, data, **options) -> str:
    with pytest.raises(UserError) as caught:
        run(source, data, tmp_path / "out", **(ON_POLICY | options))
    assert not (tmp_path / "out").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "bidirectional", "block_size": None}, "--rows rollout needs --layout block"),
        ({"rollout_prompts": 3}, "--rollout_prompts 3 is not a multiple of the 2 rows of an optimizer step"),
        ({"warm_start_steps": 4}, "--warm_start_steps 4: the whole run of 4 steps is warm start"),
        ({"kl_top_k": 269}, "--kl_top_k 269: the vocabulary has 268 tokens"),
        ({"kl_tail_bucket": True}, "--kl_tail_bucket needs --kl_top_k"),
        ({"jsd_beta": 1.0}, "--jsd_beta 1.0: must lie between 0 and 1"),
        ({"prompt_fraction": 0.0}, "--prompt_fraction 0.0: must lie between 0 and 1"),
        ({"rollout_threshold": 1.5}, "--rollout_threshold 1.5"),
        ({"rollout_tokens": 0}, "--rollout_tokens 0"),
        ({"rows": "corpus", "warm_start_steps": 2}, "--warm_start_steps is for --rows rollout"),
        ({"kl_weight": 0.0}, "leaves nothing to train on"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings_are_refused_before_anything_is_written(tmp_path, source, text, options, message):
    assert message in refused(tmp_path, source, text, **options)


def test_data_without_a_prompt_that_fits_is_refused(tmp_path, source):
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "x" * (T - 3), "completion": "y"}) + "\n")
    (tmp_path / "empty.jsonl").write_text("")
    assert f"the longest has {T - 3} tokens" in refused(tmp_path, source, tmp_path / "long.jsonl")
    assert "no text in" in refused(tmp_path, source, tmp_path / "empty.jsonl")


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path, source, text):
    teacher = save_source(tmp_path / "teacher", "llama")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(teacher)
    message = refused(tmp_path, source, text, teacher_model_name_or_path=str(teacher))
    assert "its vocabulary is not that of" in message
    assert "'more'" in message
    assert CHAT_TOKENS[0] not in message


def test_a_teacher_of_another_shape_is_refused_where_states_are_aligned(tmp_path, source, text):
    teacher = save_source(tmp_path / "teacher", "llama", hidden_size=48)
    message = refused(tmp_path, source, text, teacher_model_name_or_path=str(teacher), align_weight=1.0)
    assert "2 layers of width 48, the student 2 of 32" in message
