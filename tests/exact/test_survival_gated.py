"""Identity 9 for gated runs: whatever a kill or a full disk leaves of the last save, a plain resume has the same files.

`test_survival.py` stops a run at every call. Here are those calls in which a gated run differs: the source's files, the
draft, and the facts that come last.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from decausal.models.facts import DRAFT, FACTS_FILE
from tests.faults import Fault, faults_of, put_back, state_of
from tests.runs import GATED, run, save_source, write_text

SETTINGS: dict[str, Any] = GATED | {"lora_r": 2, "max_steps": 1, "save_steps": 1}
LAST_SAVE = ("config.json", "model.safetensors", f"{DRAFT}/adapter_model.safetensors", FACTS_FILE)


def train(root: Path, output_dir: Path, **options: Any) -> None:
    run(root / "model", root / "text.jsonl", output_dir, **SETTINGS | options)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, its data, and a run that nothing disturbed."""
    root = tmp_path_factory.mktemp("survival_gated")
    save_source(root / "model")
    write_text(root / "text.jsonl")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(root, root / "whole")
    torch.set_num_threads(threads)
    return root


@pytest.fixture(scope="module")
def faults(root: Path) -> list[Fault]:
    """Of the last save alone: the run's checkpoint is whole before it."""
    put_back({name: part for name, part in state_of(root / "whole").items() if _is_before_the_save(name)}, root / "out")
    return faults_of(lambda: train(root, root / "out", resume_from_checkpoint="true"), root / "out", root / "report")


def _is_before_the_save(name: str) -> bool:
    return name.startswith("checkpoint-") or name in ("run.yaml", "log.jsonl", "report.html")


@pytest.mark.parametrize("name", LAST_SAVE)
def test_whatever_is_left_of_the_save_a_plain_resume_has_the_undisturbed_files(
    root: Path, faults: list[Fault], name: str, tmp_path: Path
) -> None:
    number, fault = next(
        (i, each) for i, each in enumerate(faults) if each.call == "open" and each.path.startswith(name)
    )
    assert fault.full is not None
    assert "No space left on device" in fault.message
    later = faults[number + 1].killed
    half = later | {fault.path: (later[fault.path] or b"")[:100]}
    for state in (fault.killed, fault.full, half):
        assert FACTS_FILE not in state
        put_back(state, tmp_path)
        train(root, tmp_path, resume_from_checkpoint="true")
        assert state_of(tmp_path).keys() == state_of(root / "whole").keys()
        for path in (root / "whole").glob(f"{DRAFT}/*.safetensors"):
            assert (tmp_path / DRAFT / path.name).read_bytes() == path.read_bytes()
        assert (tmp_path / "model.safetensors").read_bytes() == (root / "model" / "model.safetensors").read_bytes()
        shutil.rmtree(tmp_path)
