"""The demo replaces what a demo made, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from decausal.demo.output import MARK, refuse_foreign_files, remove_reports
from decausal.errors import UserError


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """What an earlier demo left."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"seed": 0} | MARK))
    for arm in ("plain", "aligned"):
        (tmp_path / arm).mkdir()
        for name in ("config.json", "model.safetensors", "run.yaml", "merges.txt", ".lock"):
            (tmp_path / arm / name).touch()
    for name in ("report.html", "report.json", "report.png"):
        (tmp_path / name).touch()
    return tmp_path


def refused(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        refuse_foreign_files(directory)
    return str(caught.value)


def test_an_earlier_demo_is_accepted_and_foreign_files_beside_it_too(earlier: Path) -> None:
    (earlier / "notes.txt").touch()
    refuse_foreign_files(earlier)
    remove_reports(earlier)
    assert sorted(path.name for path in earlier.iterdir()) == ["aligned", "notes.txt", "plain", "run.yaml"]


@pytest.mark.parametrize("name", ["notes.txt", "weights.pt", "figures"])
def test_a_foreign_file_among_the_models_is_refused_by_name(earlier: Path, name: str) -> None:
    path = earlier / "aligned" / name
    path.mkdir() if name == "figures" else path.touch()
    assert str(path) in refused(earlier)
    assert path.exists()


@pytest.mark.parametrize("name", ["report.html", "plain", "run.yaml"])
def test_a_name_of_ours_that_no_demo_made_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert str(tmp_path / name) in refused(tmp_path)


def test_the_directory_of_a_conversion_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model_name_or_path: tiny\n")
    assert "no demo made it" in refused(tmp_path)


def test_a_directory_that_does_not_exist_is_accepted(tmp_path: Path) -> None:
    refuse_foreign_files(tmp_path / "new")
