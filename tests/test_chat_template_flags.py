"""`--chat_template` and `--chat_template_kwargs` reach the prompts of every verb that puts text through a template."""

from __future__ import annotations

import io
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from decausal.cli import main
from decausal.models.adapt import adapt
from decausal.models.checkpoint import Converted, save_converted
from decausal.sampling.model import load
from decausal.serving.metrics import Metrics
from decausal.serving.server import models_of
from decausal.serving.settings import ServeSettings
from decausal.verbs.flags import template_options
from tests.families import FAMILIES, tiny_tokenizer
from tests.sampling.stand_ins import conversion_facts

OTHER = "{{ opening }}{% for m in messages %}{{ m.content }}{% endfor %}"
VERBS = (["generate", "DIR", "hat", "--chat"], ["batch", "DIR", "in.jsonl", "out.jsonl", "--chat"], ["chat", "DIR"])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.manual_seed(0)
    model, tokenizer = FAMILIES["qwen3"](max_position_embeddings=256), tiny_tokenizer(chat=True)
    save_converted(tmp_path / "DIR", *Converted(model, tokenizer, conversion_facts(adapt(model, tokenizer), shift=1)))
    (tmp_path / "other.jinja").write_text(OTHER)
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "hat"}) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answer(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hat\n"))
    assert main([*arguments, "--max_new_tokens", "8"]) == 0
    shown = capsys.readouterr().out
    if arguments[0] == "batch":
        text = json.loads(Path("out.jsonl").read_text())["text"]
        Path("out.jsonl").unlink()
        return text
    return shown.strip()


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb[0])
def test_a_verb_puts_its_prompts_through_the_template_that_it_is_given(
    verb: list[str], here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--chat_template", "other.jinja", "--chat_template_kwargs", '{"opening": "the rain "}']
    found = answer([*verb, *given], monkeypatch, capsys)
    # of the bare text: this template adds nothing else to it
    expected = load(here / "DIR").generate("the rain hat", max_new_tokens=8).text
    assert found == expected.strip() if verb[0] != "batch" else found == expected
    assert found != answer(verb, monkeypatch, capsys)


def test_the_server_renders_by_the_template_that_it_is_given(here: Path) -> None:
    settings = ServeSettings(chat_template="other.jinja", chat_template_kwargs={"opening": "the rain "})
    (model,) = models_of("DIR", settings, Metrics())
    try:
        messages = [{"role": "user", "content": "hat"}]
        rendered = model.converted.tokenizer.apply_chat_template(messages, tokenize=False)
        assert rendered == "the rain hat"
    finally:
        model.worker.stop()


def test_a_batch_is_not_continued_under_another_template(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*VERBS[1], "--max_new_tokens", "2"]) == 0
    assert main([*VERBS[1], "--max_new_tokens", "2", "--chat_template", "other.jinja"]) == 2
    assert "was begun with chat_template" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [*VERBS, ["serve", "DIR"], ["eval", "nll", "DIR", "--data", "in.jsonl"]])
@pytest.mark.parametrize(
    ("flags", "reported"),
    [
        (["--chat_template", "missing.jinja"], "--chat_template missing.jinja: No such file"),
        (["--chat_template", "in.jsonl"], "in.jsonl is not a chat template"),
        (["--chat_template_kwargs", "{"], "not JSON"),
        (["--chat_template_kwargs", "[1]"], "not an object"),
    ],
)
def test_what_is_no_template_and_no_value_is_reported(
    verb: list[str], flags: list[str], reported: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*verb, *flags]) == 2
    assert reported in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS[:2], ids=lambda verb: verb[0])
def test_a_template_without_chat_is_refused(verb: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*verb[:-1], "--chat_template", "other.jinja"]) == 2
    assert "--chat_template is for --chat" in capsys.readouterr().err


def test_prompts_are_only_looked_through_for_a_template_that_is_given() -> None:
    """A file of prompts may be large, and the job itself reads it."""
    asked = []

    def is_used() -> bool:
        asked.append(True)
        return True

    assert template_options(Namespace(chat_template=None, chat_template_kwargs=None), is_used) == {}
    assert not asked
    values = {"enable_thinking": False}
    found = template_options(Namespace(chat_template=None, chat_template_kwargs=values), is_used)
    assert found == {"chat_template_kwargs": values}
    assert asked
