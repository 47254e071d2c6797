"""Text that no tokenizer can hold is refused on one line, whichever argument brings it."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from decausal.errors import UserError
from decausal.sampling.model import DiffusionModel
from decausal.verbs import edit, generate
from tests.sampling.tiny_models import converted

HALF = "the end \ud83d of"
FROM_A_SHELL = b"caf\xe9".decode("utf-8", "surrogateescape")  # how Python gives a verb what is not UTF-8


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    return DiffusionModel(converted())


CALLS: dict[str, Callable[[Any, str], Any]] = {
    "prompt": lambda model, text: model.generate(text, max_new_tokens=2),
    "second prompt": lambda model, text: model.generate(["import", text], max_new_tokens=2),
    "stop": lambda model, text: model.generate("import", max_new_tokens=2, stop=text),
    "stops": lambda model, text: model.generate("import", max_new_tokens=2, stop=["a", text]),
    "prefix": lambda model, text: model.infill(text, "end", 2),
    "suffix": lambda model, text: model.infill("the", text, 2),
    "searched": lambda model, text: model.infill("the", text, max_gap=2),
    "gaps": lambda model, text: model.fill(["the", 2, text, 2, "end"]),
    "edit": lambda model, text: model.edit(text, num_tokens=1),
    "confidences": lambda model, text: model.confidences(text),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_half_a_surrogate_pair_is_refused(model: DiffusionModel, call: Callable[[Any, str], Any]) -> None:
    with pytest.raises(UserError, match=r"half a surrogate pair \(character 9\)"):
        call(model, HALF)
    with pytest.raises(UserError, match=r"byte 0xe9 that is not UTF-8 \(character 4\)"):
        call(model, FROM_A_SHELL)


@pytest.mark.parametrize("verb", [generate, edit])
def test_standard_input_that_is_not_utf8_is_refused(verb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"caf\xe9")))
    monkeypatch.setattr(verb, "check_model", lambda *_: None)
    with pytest.raises(UserError, match=r"standard input is not UTF-8 at byte 3: convert it first"):
        verb.run(["nowhere"])
