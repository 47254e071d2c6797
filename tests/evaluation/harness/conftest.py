"""Models and tasks that all tests of the harness share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.evaluation.harness.small_tasks import write_models, write_tasks


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("models"))
