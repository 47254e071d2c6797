"""`decausal export` and `decausal import` as people call them, and the commands of their page."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from decausal.cli import main
from decausal.models.facts import read_facts
from tests.exchange.checkpoints import MASK_ID, save_block_model

PAGE = Path(__file__).parents[2] / "docs" / "exchange.md"


def call(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_block_model(tmp_path / "converted")
    return tmp_path / "converted"


def test_what_is_exported_imports_again(directory, tmp_path, capsys):
    assert call("export", directory, "--format", "sdar", "--output_dir", tmp_path / "sdar") == 0
    reported = capsys.readouterr()
    assert f"exported: {tmp_path / 'sdar'}\n" in reported.out
    assert "note: SGLang and LMDeploy take token 151669" in reported.out
    assert call("import", tmp_path / "sdar", "--output_dir", tmp_path / "back") == 0
    reported = capsys.readouterr()
    assert f"imported as SDAR: {tmp_path / 'back'}\nlayout block of 4, shift 0, mask token {MASK_ID}\n" in reported.out
    assert not reported.err
    assert read_facts(tmp_path / "back") == read_facts(directory)


def test_the_launch_commands_are_printed_where_engines_can_serve(directory, tmp_path, capsys, monkeypatch):
    for room in ("mask_token", "sdar"):
        monkeypatch.setattr(f"decausal.exchange.{room}.ENGINE_MASK_TOKEN_ID", MASK_ID)
    assert call("export", directory, "--format", "sdar", "--output_dir", tmp_path / "sdar") == 0
    reported = capsys.readouterr().out
    assert f"python3 -m sglang.launch_server --model-path {tmp_path / 'sdar'} " in reported
    assert f"lmdeploy serve api_server {tmp_path / 'sdar'} " in reported


def test_the_card_takes_name_license_and_figures(directory, tmp_path, capsys):
    (tmp_path / "nll.json").write_text(json.dumps({"bits_per_byte": 0.5}))
    flags = ["--name", "Mine", "--license", "mit", "--evaluation", tmp_path / "nll.json"]
    assert call("export", directory, "--format", "hf", "--output_dir", tmp_path / "out", *flags) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card
    assert "# Mine" in card
    assert "| `bits_per_byte` | 0.5 |" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize("verb", ["export", "import"])
def test_errors_are_one_line_with_exit_code_2_and_nothing_is_left(verb, tmp_path, capsys):
    flags = ["--format", "hf"] if verb == "export" else []
    assert call(verb, tmp_path / "nothing", "--output_dir", tmp_path / "out", *flags) == 2
    reported = capsys.readouterr()
    assert reported.err.startswith("decausal: error: ")
    assert reported.err.count("\n") == 1
    assert not reported.out
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_format_names_the_known_ones(directory, tmp_path, capsys):
    assert call("export", directory, "--format", "gguf", "--output_dir", tmp_path / "out") == 2
    assert "'sdar', 'hf'" in capsys.readouterr().err


def test_the_pages_commands_run(directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory.rename(tmp_path / "DIR")
    (tmp_path / "nll.json").write_text(json.dumps({"bits_per_byte": 0.5}))
    first, *others = re.findall(r"(?<!-->\n)```bash\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    commands = [line for line in f"{first}{others[0]}".splitlines() if " export " in line or " import " in line]
    assert len(commands) == 4
    for number, command in enumerate(commands):
        words = shlex.split(command, comments=True)[1:]
        if words[0] == "import":
            words[1] = "made0"
        words[words.index("OUT")] = f"made{number}"
        assert main(words) == 0
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 1
    # The tiny model's vocabulary is too small for engines, so no command is there to be shown.
    exec(blocks[0].replace('.commands["SGLang"]', ".notes"), {})
