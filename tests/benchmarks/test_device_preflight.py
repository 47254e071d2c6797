"""What a GPU would be asked to do is counted without one, and what would fail or wait there is reported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tests.device  # noqa: F401 - puts benchmarks/ on the path

from counting import OneDevice  # isort: skip
from device_preflight import Check, main, outcome_of  # isort: skip
from models import SHAPES, Shape  # isort: skip
from paper_steps import KINDS, META  # isort: skip

TINY = Shape(32, 2, 48, 2, 1, 16, 96, batch_size=2, length=128)


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setattr("device_preflight.lacking", lambda: "a test")
    monkeypatch.setattr(
        sys, "argv", ["device_preflight.py", "--model", "tiny", "--rows", "2", "--length", "128", *words]
    )
    return main()


def test_all_steps_and_passes_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.json"
    assert run(monkeypatch, "--keys", "64", "--json", str(file)) == 0
    found = json.loads(file.read_text())
    assert found.keys() >= {"hardware", "versions", "commit", "command", "date"}
    by_name = {check["name"]: check for check in found["checks"]}
    assert all(any(name.startswith(kind) for name in by_name) for kind in (*KINDS, "block decoding", "verified"))
    assert all(check["kernels"] > 0 < check["peak_bytes"] for check in by_name.values())
    assert by_name["aligned"]["bytes"] > by_name["plain"]["bytes"]
    out = capsys.readouterr().out
    assert "all on meta, since no tensors claim to be on CUDA: a test" in out
    assert out.count("| none |") == len(by_name)


@pytest.mark.parametrize(
    ("work", "wrong"),
    [
        (lambda: torch.zeros(2, device=META).sum().item(), "meta tensors"),
        (lambda: torch.zeros(2, device=META)[torch.zeros(2, dtype=torch.long)], "reads a tensor of cpu"),
        (lambda: torch.tensor([1.0], device=META), "copied from the host"),
    ],
    ids=["a number is read", "an index of the host", "numbers of the host"],
)
def test_what_would_wait_or_fail_is_reported(
    work: Any, wrong: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tally(device: torch.device) -> Any:
        with OneDevice(device):
            work()

    check = Check("bad", False, tally)
    assert wrong in outcome_of(check, can_claim=False)["wrong"]
    monkeypatch.setattr("device_preflight.checks", lambda _: [check])
    assert run(monkeypatch) == 1
    assert f"{wrong}" in capsys.readouterr().out


def test_the_command_runs_a_pass_on_what_claims_to_be_cuda_where_it_can(tmp_path: Path) -> None:
    """In a process of its own: what is registered for CUDA stays."""
    script, file = Path(__file__).parents[2] / "benchmarks" / "device_preflight.py", tmp_path / "found.json"
    words = ["--model", "embedded", "--rows", "2", "--length", "128", "--keys", "64", "--json", str(file)]
    words += ["--only", "block decoding, 1 row", "aligned, 2 views"]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=True)
    found = json.loads(file.read_text())["checks"]
    where = "meta" if "all on meta" in done.stdout else "claimed CUDA"
    assert [check["device"] for check in found] == [where, where]
    assert all(check["kernels"] > 0 for check in found)
