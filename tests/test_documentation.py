"""The examples of the documentation run."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from decausal.config import resolve
from decausal.models.adapt import adapt
from decausal.models.checkpoint import Converted, save_converted
from decausal.training.settings import ConversionSettings
from tests.families import FAMILIES, tiny_tokenizer
from tests.runs import ROOT
from tests.sampling.stand_ins import conversion_facts

PAGES = ("docs/api.md",)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose entry DIR is a tiny converted model."""
    root = tmp_path_factory.mktemp("documentation")
    model, tokenizer = FAMILIES["qwen3"](max_position_embeddings=256), tiny_tokenizer(chat=True)
    facts = conversion_facts(adapt(model, tokenizer), shift=1)
    save_converted(root / "DIR", *Converted(model, tokenizer, facts))
    return root


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs_from_its_top_to_its_end(
    page: str, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / page).read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) >= 2
    monkeypatch.chdir(converted)
    names: dict[str, Any] = {}
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], page, "exec"), names)  # errors name the line of the page


def test_the_code_that_the_page_on_extending_shows_is_in_the_package() -> None:
    text = (ROOT / "docs" / "extend.md").read_text()
    source = "".join(path.read_text() for path in (ROOT / "decausal").rglob("*.py"))
    lines = {line.strip() for line in source.splitlines()}
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for line in "".join(blocks).splitlines():
        assert not line or line.split("  #")[0].strip() in lines, line
    (recipe,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert resolve(ConversionSettings, yaml.safe_load(recipe), [])


def test_the_reference_is_what_the_code_says() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "generate_reference.py"))
    for name, page in script["PAGES"].items():
        told = "out of date: run python docs/generate_reference.py"
        assert (ROOT / "docs" / "reference" / name).read_text() == page(), f"docs/reference/{name} is {told}"
