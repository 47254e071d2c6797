"""What leaves this machine with a model names nobody's directories, and every hub id."""

from __future__ import annotations

from pathlib import Path

import pytest

from decausal.compare.settings import CompareSettings
from decausal.exchange.plain import export_plain
from decausal.exchange.sdar import export_sdar
from decausal.models.facts import read_facts
from decausal.privacy import without_paths, without_paths_in
from tests.exchange.checkpoints import save_block_model


@pytest.mark.parametrize("export", [export_plain, export_sdar])
def test_an_export_holds_no_path_of_this_machine_and_the_model_keeps_its_own(export, tmp_path: Path) -> None:
    home = tmp_path / "home" / "me"
    recipe = {
        "model_name_or_path": f"{home}/models/base",
        "data": f"{home}/a.jsonl,owner/texts:part,tasks:addition@7",
        "eval_data": None,
        "deepspeed": {"config": f"{home}/zero.json"},
        "lora_target_modules": r".*\.(q|v)_proj",
        "max_steps": 3,
    }
    facts = save_block_model(tmp_path / "in", facts={"source": f"{home}/models/base", "recipe": recipe})
    export(tmp_path / "in", tmp_path / "out")
    written = [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".json", ".md", ".yaml", ".py")]
    assert written
    for path in written:
        assert str(tmp_path) not in path.read_text(encoding="utf-8"), path
    assert read_facts(tmp_path / "in") == facts
    assert "owner/texts" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    if export is export_plain:
        handed_on = read_facts(tmp_path / "out")
        assert handed_on.source == "base"
        assert handed_on.recipe == {
            **recipe,
            "model_name_or_path": "base",
            "data": "a.jsonl,owner/texts:part,tasks:addition@7",
            "deepspeed": {"config": "zero.json"},
        }


def test_only_paths_are_shortened() -> None:
    for value in ("tiny", "Qwen/Qwen3-0.6B", "https://a.org/b/c", "a/b\nc/d", 3, None, True, 0.5, ["x", 1]):
        assert without_paths(value) == value
    assert without_paths(Path("/home/me/model")) == "model"
    assert without_paths(["/home/me/*.jsonl", "../up/b.txt", "~/c"]) == ["*.jsonl", "b.txt", "c"]


def test_a_command_is_the_same_but_for_its_paths() -> None:
    flags = ["/home/me/base", "--recipes", "mdm,/home/me/own.yaml", "--output_dir=/home/me/out", "--seeds", "0,1"]
    shown = without_paths_in([*flags, "--set", "mdm.data=/home/me/my texts.txt"])
    assert shown == "base --recipes mdm,own.yaml --output_dir=out --seeds 0,1 --set 'mdm.data=my texts.txt'"
    assert without_paths(CompareSettings().output_dir) == CompareSettings().output_dir
