"""The tutorials run from top to end, on tiny models in place of those that they name."""

from __future__ import annotations

from pathlib import Path

import pytest

from decausal.cli import main
from decausal.models.checkpoint import read_facts
from tests.families import FAMILIES, tiny_tokenizer
from tests.runs import ROOT, write_text
from tests.serving.running import converted, running
from tests.test_documentation import blocks, commands

TUTORIALS = ROOT / "docs" / "tutorials"
SMALL = ["--max_steps=2", "--max_length=64", "--per_device_train_batch_size=2", "--bf16=false"]
SHORT = ["--rollout_prompts=2", "--rollout_tokens=4", "--rollout_tokens_start=4"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a tutorial runs: an AR model for tiny, and text for stdlib."""
    FAMILIES["qwen3"](max_position_embeddings=128).save_pretrained(tmp_path / "ar")
    tiny_tokenizer().save_pretrained(tmp_path / "ar")
    write_text(tmp_path / "text.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("decausal.data.rows.HF_HOME", str(tmp_path / "cache"))
    return tmp_path


def steps(page: str) -> list[list[str]]:
    """Returns the commands of a tutorial up to its last section, which is for models of one's own."""
    text = (TUTORIALS / page).read_text().split("## Your own model")[0]
    return [words for block in blocks(text, "bash") for words in commands(block[1])]


def make_small(words: list[str]) -> list[str]:
    """Returns a command with tiny models and data, and as few steps and examples as will do."""
    names = {"tiny": "ar", "tiny-tasks": "ar", "stdlib": "text.jsonl", "stdlib-heldout": "text.jsonl"}
    found = [names.get(word, word) for word in words[1:]]
    if found[0] == "convert":
        found += SMALL + (SHORT if "opdlm" in found else [])
    if found[:2] == ["eval", "tasks"]:
        found += ["--tasks=brackets", "--num_examples=2", "--max_new_tokens=4"]
    if found[:2] == ["eval", "nll"]:
        found += ["--num_rows=2", "--max_length=40"]
    return found


@pytest.mark.parametrize(
    ("page", "directory", "layout"),
    [("convert.md", "tiny-diffusion", "bidirectional"), ("distil.md", "tasks-blocks", "block")],
)
def test_the_commands_of_a_tutorial_run(folder: Path, page: str, directory: str, layout: str) -> None:
    shown = steps(page)
    assert len(shown) >= 5
    for words in shown:
        assert words[0] == "decausal"
        assert main(make_small(words)) == 0, words
    facts = read_facts(folder / directory)
    assert (facts.layout, facts.shift) == (layout, 1)


def test_the_tutorial_on_serving_gets_its_answers(capsys: pytest.CaptureFixture[str]) -> None:
    ((*serve, directory),) = steps("serve.md")
    assert serve == ["decausal", "serve"]
    assert directory == "decausal-demo/aligned"
    page = (TUTORIALS / "serve.md").read_text()
    with running([converted()]) as server:
        names: dict[str, object] = {}
        for block in blocks(page, "python"):
            exec(block[1].replace("http://127.0.0.1:8000", server.url), names)
    printed = capsys.readouterr().out.splitlines()
    assert [line[0] for line in printed[-3:]] == ["0", "1", "2"]
