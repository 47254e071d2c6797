"""A canary, given as every secret there is, is in no byte of a run's directory, of what is printed, or of an export."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

from decausal.cli import main
from decausal.privacy import is_secret
from tests.runs import save_source, write_text

CANARY = "canary7f3ab2notsecretlooking"  # of no form by which it could be known: where it stands must tell
ENVIRONMENT = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
    "COMET_API_KEY",
    "MLFLOW_TRACKING_PASSWORD",
    "OPENAI_API_KEY",
    "AWS_SECRET_ACCESS_KEY",
)
SECRET_ARGUMENTS = [field.name for field in fields(TrainingArguments) if is_secret(field.name)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run that was given the canary in every way, the files it left, and what it said."""
    root = tmp_path_factory.mktemp("canary")
    save_source(root / "model", chat=True)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        values = json.loads((root / "model" / name).read_text())
        values |= {"api_key": CANARY, "more": [{"auth_token": CANARY, "kept": 1}], "home": f"https://me:{CANARY}@a.org"}
        (root / "model" / name).write_text(json.dumps(values))
    (root / "secret").write_text(CANARY)
    (root / "model" / "notes.txt").symlink_to(root / "secret")
    recipe = dict.fromkeys(SECRET_ARGUMENTS, CANARY) | {"layout": "block", "block_size": 4, "shift": 0}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        for name in ENVIRONMENT:
            patch.setenv(name, CANARY)
        yield root


def convert(root: Path, output_dir: Path, *flags: str) -> int:
    common = {"data": write_text(root / "text.jsonl"), "max_steps": 2, "save_steps": 1, "max_length": 24}
    common |= {"use_cpu": "true", "per_device_train_batch_size": 2, "output_dir": output_dir}
    arguments = [part for name, value in common.items() for part in (f"--{name}", str(value))]
    return main(["convert", str(root / "model"), *arguments, *flags])


def holding(directory: Path) -> list[str]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert len(files) > 5
    return [str(path.relative_to(directory)) for path in files if CANARY.encode() in path.read_bytes()]


def test_no_byte_of_a_run_or_of_an_export_is_the_canarys(
    root: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert "hub_token" in SECRET_ARGUMENTS
    by_flag = [part for name in SECRET_ARGUMENTS for part in (f"--{name}", CANARY)]
    assert convert(root, root / "by-flag", *by_flag, "--layout", "block", "--block_size", "4", "--shift", "0") == 0
    assert convert(root, root / "by-yaml", "--recipe", str(root / "recipe.yaml")) == 0
    assert main(["convert", "--recipe", str(root / "by-yaml" / "run.yaml"), "--print_config", "true", *by_flag]) == 0
    for name in ("by-flag", "by-yaml"):
        assert holding(root / name) == []
        for form in ("hf", "sdar"):
            out = root / f"{name}-{form}"
            assert main(["export", str(root / name), "--format", form, "--output_dir", str(out)]) == 0
            assert holding(out) == []
    (root / "by-flag" / "vocab.txt").symlink_to(root / "secret")
    for form in ("hf", "sdar"):
        assert main(["export", str(root / "by-flag"), "--format", form, "--output_dir", str(root / "linked")]) == 2
    nested = json.dumps({"more": [{"api_key": CANARY}]})
    assert convert(root, root / "twice", "--hub_token", CANARY, "--hub_token", CANARY) == 0
    for wrong in (
        ["--hub_tokens", CANARY],
        ["--gradient_checkpointing_kwargs", nested],
        ["--chat_template_kwargs", nested],
    ):
        assert convert(root, root / "wrong", *wrong) == 2
    said = capfd.readouterr()
    assert CANARY not in said.out + said.err
    assert CANARY not in caplog.text
    assert "hold secrets (api_key, auth_token, home), which are neither used nor recorded" in caplog.text
    assert json.loads((root / "by-flag" / "config.json").read_text())["more"] == [{"kept": 1}]
