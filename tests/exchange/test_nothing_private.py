"""What is handed on holds no file from elsewhere, no code's name, no secret; and its texts are as they were."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from decausal.errors import UserError
from decausal.exchange.converted_files import facts_to_hand_on
from decausal.exchange.plain import export_plain
from decausal.models.adapt import adapt
from decausal.models.checkpoint import Converted, save_converted
from decausal.models.facts import read_facts
from decausal.privacy import without_paths_in
from tests.families import FAMILIES, tiny_tokenizer
from tests.sampling.stand_ins import conversion_facts

SECRET = "hf_ThisIsATokenThatNobodyMayRead"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    model, tokenizer = FAMILIES["qwen3"](), tiny_tokenizer()
    facts = conversion_facts(adapt(model, tokenizer), shift=1)
    recipe = {"hub_token": SECRET, "data": "/home/me/a.txt", "sampler": {"stop": "</s>"}, "mask_token": "<|/m|>"}
    facts = replace(facts, recipe=recipe, sampler={"stop": "</s>"})
    save_converted(tmp_path / "in", *Converted(model, tokenizer, facts))
    return tmp_path / "in"


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer_extra.json", "chat_template.jinja"])
def test_a_link_to_a_file_elsewhere_is_refused_and_nothing_is_written(directory: Path, tmp_path: Path, name: str):
    (tmp_path / "secret").write_text(SECRET)
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=f"{name} is a link to a file outside"):
        export_plain(directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_of_the_hubs_cache_and_inside_the_directory_are_followed(directory: Path, tmp_path: Path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0"
    snapshot.parent.mkdir(parents=True)
    directory.rename(snapshot)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    (snapshot / "tokenizer.json").rename(blobs / "1")
    (snapshot / "tokenizer.json").symlink_to(blobs / "1")
    export_plain(snapshot, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (blobs / "1").read_bytes()


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("key", ["token", "use_auth_token", "api_key", "hub_token", "DB_PASSWORD"])
def test_a_secret_in_a_sources_settings_is_refused_by_name(directory: Path, tmp_path: Path, name: str, key: str):
    values = json.loads((directory / name).read_text())
    (directory / name).write_text(json.dumps(values | {"more": [{key: "no form by which to know it"}]}))
    with pytest.raises(UserError, match=f"{name} holds a secret, '{key}'"):
        export_plain(directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # Switches and tokens of text are none.
    harmless = {key: True, "audio_token": "<a>", "eos_token": "</s>"}
    (directory / name).write_text(json.dumps(values | {"more": [harmless]}))
    export_plain(directory, tmp_path / "out")


def test_names_of_code_are_not_handed_on(directory: Path, tmp_path: Path):
    for name in ("config.json", "tokenizer_config.json"):
        values = json.loads((directory / name).read_text()) | {"auto_map": {"AutoConfig": "theirs.Config"}}
        (directory / name).write_text(json.dumps(values))
    export_plain(directory, tmp_path / "out")
    assert "theirs" not in "".join(path.read_text() for path in (tmp_path / "out").glob("*.json"))


def test_no_secret_and_no_path_is_handed_on_and_stops_stay(directory: Path, tmp_path: Path):
    record = json.loads((directory / "decausal.json").read_text())
    record["recipe"]["hub_token"] = SECRET  # as an earlier version wrote it
    (directory / "decausal.json").write_text(json.dumps(record))
    export_plain(directory, tmp_path / "out")
    texts = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert SECRET.encode() not in texts
    assert b"/home/me" not in texts
    facts = read_facts(tmp_path / "out")
    assert facts.sampler == {"stop": "</s>"}
    assert facts.recipe["sampler"] == {"stop": "</s>"}
    assert facts.recipe["mask_token"] == "<|/m|>"
    assert facts_to_hand_on(facts) == facts


def test_a_command_in_a_report_shows_no_secret():
    assert SECRET not in without_paths_in(["--hub_token", SECRET, f"--api_key={SECRET}", "--data", "/home/me/a.txt"])
