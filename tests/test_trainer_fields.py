"""The record of transformers' training arguments says what their class says."""

from __future__ import annotations

import json

import pytest
from transformers import TrainingArguments

from decausal import trainer_fields
from decausal.trainer_fields import RECORD, record_of_installed
from tests.runs import ROOT

RECORDED = json.loads((ROOT / "decausal" / RECORD).read_text())


@pytest.fixture
def read_anew():
    trainer_fields.trainer_fields.cache_clear()
    yield trainer_fields.trainer_fields
    trainer_fields.trainer_fields.cache_clear()


def test_the_record_is_of_the_version_that_is_tested():
    assert f"transformers=={RECORDED['transformers']}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_what_is_read_is_what_the_installed_class_has(read_anew):
    installed = record_of_installed()["fields"]
    found = read_anew()
    assert list(found) == list(installed)
    assert {name: field.default for name, field in found.items()} == {
        name: json.loads(json.dumps(default)) for name, (_, default) in installed.items()
    }
    if RECORDED["transformers"] == trainer_fields.installed_version():
        assert RECORDED["fields"] == json.loads(json.dumps(installed))


def test_under_another_version_the_class_itself_is_asked(read_anew, monkeypatch):
    recorded = read_anew()
    monkeypatch.setattr(trainer_fields, "installed_version", lambda: "0.0")
    monkeypatch.setitem(TrainingArguments.__annotations__, "max_steps", "bool")
    read_anew.cache_clear()
    asked = read_anew()
    assert asked.pop("max_steps").hint is bool
    assert asked == {name: field for name, field in recorded.items() if name != "max_steps"}
