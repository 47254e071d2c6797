"""What a model writes while it is trained."""

from __future__ import annotations

import json

import pytest

from decausal.errors import UserError
from decausal.sampling.model import load
from decausal.training.sample_prompts import SamplePrompt, read_sample_prompts
from decausal.training.step_records import read_records
from tests.runs import run, save_source, write_text

BLOCKS = {"layout": "block", "block_size": 4}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_source(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.mark.parametrize("options", [{}, BLOCKS, {"lora_r": 2}], ids=["bidirectional", "blocks", "adapters"])
def test_samples_are_what_the_model_writes_at_that_step_and_change_nothing(tmp_path, source, text, capsys, options):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the rain\n\nit falls\n")
    sampled = {"sample_prompts": str(prompts), "sample_tokens": 8, "eval_steps": 2}
    conversion = run(source, text, tmp_path / "out", **options, **sampled)
    plain = run(source, text, tmp_path / "plain", **options)
    records = read_records(tmp_path / "out" / "samples.jsonl")
    assert [(record["step"], record["prompt"]) for record in records] == [
        (step, prompt) for step in (2, 4) for prompt in ("the rain", "it falls")
    ]
    model = load(tmp_path / "out")
    for record in records[2:]:
        assert record["text"] == model.generate(record["prompt"], max_new_tokens=8).text
    assert capsys.readouterr().out.count("sample, step") == 4
    losses, expected = ([entry["loss"] for entry in made.history if "loss" in entry] for made in (conversion, plain))
    assert losses == expected


def test_a_resumed_run_keeps_its_samples_and_writes_none_twice(tmp_path, source, text):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "the rain"}) + "\n")
    options = {"sample_prompts": str(prompts), "sample_tokens": 4, "eval_steps": 1, "save_steps": 2}
    run(source, text, tmp_path / "out", **options)
    whole = read_records(tmp_path / "out" / "samples.jsonl")
    run(source, text, tmp_path / "out", **options, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert [record["step"] for record in whole] == [1, 2, 3, 4]
    assert read_records(tmp_path / "out" / "samples.jsonl") == whole


def test_prompts_are_read_line_by_line_and_as_records(tmp_path):
    (tmp_path / "a.txt").write_text("one \n\n  two\u2028and more\n")
    assert read_sample_prompts(tmp_path / "a.txt") == [SamplePrompt("one "), SamplePrompt("  two\u2028and more")]
    message = {"messages": [{"role": "user", "content": "hello"}]}
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": ""}) + "\n\n" + json.dumps(message))
    assert read_sample_prompts(tmp_path / "b.jsonl") == [SamplePrompt(""), SamplePrompt("hello", chat=True)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "it holds no prompt"),
        ("\n".join("x" * 33), "holds 33 prompts"),
        ('{"prompt": 3}', "line 1 is neither"),
        ('{"prompt": "a"}\n{"text": "b"}', "line 2 is neither"),
        ("[1]", "line 1 is neither"),
        ('{"messages": []}', "line 1 is neither"),
        ("nonsense", "line 1 is neither"),
        (b"\xff", "not UTF-8 text"),
    ],
)
def test_files_that_hold_no_prompts_are_refused(tmp_path, content, message):
    path = tmp_path / ("prompts.txt" if message.startswith(("it", "holds", "no")) else "prompts.jsonl")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        read_sample_prompts(path)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"prompt": "rain " * 40}, "prompt 1: with --sample_tokens 8 it makes"),
        ({"messages": [{"role": "user", "content": "hello"}]}, "prompt 1: chat=True needs a chat template"),
    ],
)
def test_prompts_that_the_model_cannot_continue_are_refused_before_the_run(tmp_path, source, text, prompt, message):
    (tmp_path / "prompts.jsonl").write_text(json.dumps(prompt))
    with pytest.raises(UserError, match=message):
        run(source, text, tmp_path / "out", sample_prompts=str(tmp_path / "prompts.jsonl"), sample_tokens=8)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"nowhere\.txt: No such file"):
        run(source, text, tmp_path / "out", sample_prompts=str(tmp_path / "nowhere.txt"))
