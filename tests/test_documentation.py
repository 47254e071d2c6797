"""The documentation says what the code does: its examples run, and what it names is there."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from decausal.config import read_recipe, resolve, take_flag
from decausal.diffusion.layout import Layout
from decausal.models.adapt import adapt
from decausal.models.checkpoint import Converted, save_converted
from decausal.training.settings import ConversionSettings
from decausal.verbs.flags import leading_positional
from tests.families import FAMILIES, tiny_tokenizer
from tests.runs import ROOT
from tests.sampling.stand_ins import conversion_facts

DOCS = ROOT / "docs"
ALL = [path for folder in (ROOT, ROOT / "benchmarks", ROOT / "examples") for path in folder.glob("*.md")]
ALL += sorted(DOCS.rglob("*.md"))
READ = [ROOT / "README.md", *sorted(path for path in DOCS.rglob("*.md") if path.name != "log.md")]


def blocks(text: str, language: str) -> list[re.Match[str]]:
    return list(re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


def commands(text: str) -> list[list[str]]:
    """Returns the words of every command, without comments."""
    lines = text.replace("\\\n", " ")
    return [words for line in re.split(r"\n(?=\S)", lines) if (words := shlex.split(line, comments=True))]


def run_python(page: Path) -> None:
    names: dict[str, Any] = {}
    text = page.read_text()
    for block in blocks(text, "python"):
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], page, "exec"), names)  # errors name the line of the page


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose entries DIR and BLOCKS are tiny converted models."""
    root = tmp_path_factory.mktemp("documentation")
    for name, layout in (("DIR", Layout("bidirectional")), ("BLOCKS", Layout("block", 4))):
        model, tokenizer = FAMILIES["qwen3"](max_position_embeddings=256), tiny_tokenizer(chat=True)
        mask_token_id = adapt(model, tokenizer, layout=layout)
        facts = conversion_facts(mask_token_id, shift=1, layout=layout.kind, block_size=layout.block_size)
        save_converted(root / name, *Converted(model, tokenizer, facts))
    return root


@pytest.mark.parametrize("name", ["api.md", "sampling.md"])
def test_the_python_of_a_page_runs_from_its_top_to_its_end(
    name: str, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(converted)
    assert len(blocks((DOCS / name).read_text(), "python")) >= 2
    run_python(DOCS / name)


@pytest.mark.parametrize("page", [page for page in READ if page.parent.name != "reference"], ids=lambda page: page.name)
def test_what_the_python_of_a_page_imports_is_there(page: Path) -> None:
    for block in blocks(page.read_text(), "python"):
        for node in ast.walk(ast.parse(block[1])):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("decausal"):
                module = import_module(str(node.module))
                assert not [name.name for name in node.names if not hasattr(module, name.name)], node.module


def test_the_code_that_the_page_on_extending_shows_is_in_the_package() -> None:
    source = "".join(path.read_text() for path in (ROOT / "decausal").rglob("*.py"))
    lines = {line.strip() for line in source.splitlines()}
    page = (DOCS / "extend.md").read_text()
    shown = blocks(page, "python")
    assert len(shown) == 3
    for line in "".join(block[1] for block in shown).splitlines():
        assert not line or line.split("  #")[0].strip() in lines, line
    (recipe,) = blocks(page, "yaml")
    assert resolve(ConversionSettings, yaml.safe_load(recipe[1]), [])


def test_the_reference_is_what_the_code_says() -> None:
    script = runpy.run_path(str(DOCS / "generate_reference.py"))
    for name, page in script["PAGES"].items():
        reported = "out of date: run python docs/generate_reference.py"
        assert (DOCS / "reference" / name).read_text() == page(), f"docs/reference/{name} is {reported}"


@pytest.mark.parametrize("page", READ, ids=lambda page: page.name)
def test_every_conversion_that_a_page_shows_has_settings_that_exist(page: Path) -> None:
    shown = [
        words
        for block in blocks(page.read_text(), "bash")
        for words in commands(block[1])
        if words[:2] == ["decausal", "convert"]
    ]
    for words in shown:
        _, flags = leading_positional(words[2:])
        flags, recipe = take_flag(flags, "recipe", "repr-align")
        assert resolve(ConversionSettings, read_recipe(recipe), flags), words


def test_the_page_of_papers_has_every_paper_that_the_code_cites() -> None:
    sources = [*(ROOT / "decausal").rglob("*.py"), *(ROOT / "decausal").rglob("*.yaml")]
    cited = {number for path in sources for number in re.findall(r"\b\d{4}\.\d{5}\b", path.read_text())}
    listed = set(re.findall(r"arxiv\.org/abs/(\d{4}\.\d{5})", (DOCS / "papers.md").read_text()))
    assert len(cited) > 10
    assert cited <= listed


def test_the_page_of_identities_and_the_tests_cite_each_other() -> None:
    rows = re.findall(r"^\| (\d+) \| .* \| (.*) \|$", (DOCS / "identities.md").read_text(), re.MULTILINE)
    page = {(int(number), name) for number, names in rows for name in re.findall(r"`(\w+\.py)`", names)}
    cited = set()
    for path in (ROOT / "tests" / "exact").glob("test_*.py"):
        head = path.read_text().split('"""')[1].split(":")[0]
        numbers = re.findall(r"\d+", head) if head.startswith("Identit") else []
        assert numbers, f"{path.name} cites no identity at its top"
        cited |= {(int(number), path.name) for number in numbers}
    assert page == cited
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))


def heading_anchors(page: Path) -> set[str]:
    """Returns the anchors that a forge gives to the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ALL, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in heading_anchors(path), target


def defined_in(path: Path) -> set[str]:
    """Returns the functions, classes and constants of a module, and methods as Class.method."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
    return names


def test_the_page_of_the_architecture_names_files_and_functions_that_exist() -> None:
    page = (DOCS / "architecture.md").read_text()
    named = re.findall(r"`([\w./]+(?:\.py|/))(?::([\w.]+))?`", page)
    assert len(named) > 60
    for file, name in named:
        path = next((root / file for root in (ROOT / "decausal", ROOT) if (root / file).exists()), None)
        assert path is not None, file
        assert not name or name in defined_in(path), f"{file}:{name}"


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "architecture.md"], ids=lambda page: page.name)
def test_the_tree_of_rooms_is_that_of_the_package(page: Path) -> None:
    (tree,) = re.findall(r"^```\w*\n(decausal/\n.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    inside = tree.split("\n", 1)[1].split("\nbenchmarks/")[0]
    shown = {
        name.rstrip("/")
        for line in inside.splitlines()
        for name in re.findall(r"(?<![\w/])[\w]+(?:/|\.py)(?=\s)", line)
    }
    rooms = {path.name for path in (ROOT / "decausal").iterdir() if (path / "__init__.py").exists()}
    assert rooms <= shown
    found = {path.name for path in (ROOT / "decausal").rglob("*")}
    assert shown <= found
