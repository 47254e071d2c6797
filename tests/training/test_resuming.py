"""Resuming: what must stay, what may change, what a damaged file costs; and no secret in any file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import TrainingArguments

from decausal.errors import UserError
from decausal.models.facts import read_facts
from decausal.privacy import arguments_without_secrets, is_secret, secrets_set_aside, without_secrets
from decausal.training.run_directory import RUN_FILE, SEAL, STAGING, checkpoint_to_resume, checkpoints, discard, sealed
from tests.runs import assert_same, run, save_source, weights, write_text

SECRET = "hf_ThisIsATokenThatNobodyMayRead"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, its data, and a run of four steps with checkpoints at 2 and 4."""
    root = tmp_path_factory.mktemp("resuming")
    save_source(root / "model")
    write_text(root / "text.jsonl")
    run(root / "model", root / "text.jsonl", root / "out", hub_token=SECRET, seed=3)
    return root


def resumed(root: Path, output_dir: Path, **options: object) -> None:
    options = {"hub_token": SECRET, "seed": 3, "resume_from_checkpoint": "true"} | options
    data = options.pop("data", root / "text.jsonl")
    run(root / "model", data, output_dir, **options)


def copied(root: Path, tmp_path: Path) -> Path:
    """The run as if it had been killed after step 2."""
    out = shutil.copytree(root / "out", tmp_path / "out")
    shutil.rmtree(out / "checkpoint-4")
    (out / "model.safetensors").unlink()
    return out


def test_another_precision_is_said(root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = copied(root, tmp_path)
    resumed(root, out, bf16=True)
    assert f"goes on in bfloat16; {out / 'checkpoint-2'} was trained in float32" in capfd.readouterr().err


@pytest.mark.parametrize(
    "name", ["hub_token", "push_to_hub_token", "api_key", "wandb-api-key", "password", "--secret", "access_key"]
)
def test_names_of_secrets_are_known(name: str):
    assert is_secret(name)


@pytest.mark.parametrize("name", ["mask_token", "eos_token", "token_weight", "rollout_tokens", "end_token"])
def test_names_of_text_tokens_are_no_secrets(name: str):
    assert not is_secret(name)


def test_secrets_go_from_tables_texts_and_commands_and_nothing_else_does():
    values = {
        "hub_token": SECRET,
        "mask_token": "</s>",
        "more": [{"password": "x", "data": f"https://me:{SECRET}@a.org/b"}],
    }
    assert without_secrets(values) == {"mask_token": "</s>", "more": [{"data": "https://[removed]@a.org/b"}]}
    command = ["--hub_token", SECRET, f"--api_key={SECRET}", "--mask_token", "</s>", f"--data={SECRET}"]
    assert SECRET not in " ".join(arguments_without_secrets(command))
    assert arguments_without_secrets(["--mask_token", "</s>"]) == ["--mask_token", "</s>"]


def test_names_of_files_are_no_secrets():
    for name in ("hf_smollm2_converted", "task-sk-1.jsonl", "hf_data/a.txt"):
        assert without_secrets(name) == name


def test_a_secret_in_a_table_is_set_aside_while_arguments_are_written():
    values = TrainingArguments(output_dir="out", use_cpu=True, save_strategy="steps", hub_token=SECRET)
    values.fsdp_config = {"xla": False, "more": [{"api_key": "x"}]}
    before = dict(vars(values))
    with secrets_set_aside(values):
        assert values.hub_token is None
        assert values.fsdp_config["more"] == [{}]
        assert vars(values).items() >= {"save_strategy": before["save_strategy"], "output_dir": "out"}.items()
        assert type(values.save_strategy) is type(before["save_strategy"])
    assert vars(values) == before
    assert values.fsdp_config is before["fsdp_config"]


def test_no_file_of_a_run_holds_a_secret(root: Path):
    found = [path for path in (root / "out").rglob("*") if path.is_file()]
    assert {"run.yaml", "decausal.json", "training_args.bin"} <= {path.name for path in found}
    assert [path for path in found if SECRET.encode() in path.read_bytes()] == []


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "flipped": lambda piece: bytes(byte ^ 1 for byte in piece),
    "zeroed": lambda piece: bytes(len(piece)),
    "cut": lambda piece: b"",
}


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0], ids=["begin", "middle", "end"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_in_any_sealed_file_is_named_and_the_checkpoint_before_serves(
    root: Path, tmp_path: Path, damage: Callable[[bytes], bytes], place: float, caplog: pytest.LogCaptureFixture
):
    out = shutil.copytree(root / "out", tmp_path / "out")
    names = json.loads((out / "checkpoint-4" / SEAL).read_text())["sizes"]
    for path in [*(out / "checkpoint-4" / name for name in names), out / "checkpoint-4" / SEAL]:
        before = path.read_bytes()
        start = int(place * max(0, len(before) - 16))
        broken = before[:start] + damage(before[start : start + 16]) + before[start + 16 :]
        if broken == before:  # empty, or nothing but zeros there
            continue
        path.write_bytes(broken)
        with pytest.raises(UserError, match=rf"not a checkpoint to resume from: \S*{path.name} is (damaged|missing)"):
            checkpoint_to_resume(out, str(out / "checkpoint-4"))
        caplog.clear()
        assert checkpoint_to_resume(out, "true") == out / "checkpoint-2"
        assert f"{path.name} is " in caplog.text
        path.write_bytes(before)
    assert checkpoint_to_resume(out, "true") == out / "checkpoint-4"


@pytest.mark.parametrize("name", ["model.safetensors", SEAL])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(root: Path, tmp_path: Path, name: str):
    out = shutil.copytree(root / "out", tmp_path / "out")
    path = out / "checkpoint-4" / name
    path.write_bytes(path.read_bytes()[:-9] + b"\0" * 9)
    resumed(root, out)
    assert_same(weights(out), weights(root / "out"))


@pytest.mark.parametrize("name", ["optimizer.pt", SEAL])
def test_a_run_of_damaged_checkpoints_alone_does_not_begin_anew_in_silence(root: Path, tmp_path: Path, name: str):
    out = copied(root, tmp_path)
    path = out / "checkpoint-2" / name
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match=r"every checkpoint .* is damaged; .*--overwrite true"):
        resumed(root, out)


CHANGES = {
    "seed": ({"seed": 4}, "--seed 4: .* was trained with 3"),
    "learning rate": ({"learning_rate": 0.5}, "--learning_rate 0.5: .* was trained with 0.001"),
    "optimizer": ({"optim": "sgd"}, "--optim .*sgd: .* was trained with"),
    "loss": ({"align_weight": 1.0}, "--align_weight 1.0: .* was trained with 0.0"),
    "batch": ({"per_device_train_batch_size": 4}, "would read 4 rows, .* it read 2"),
    "accumulation": ({"gradient_accumulation_steps": 2}, "would read 4 rows, .* it read 2"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_what_changes_what_is_trained_is_refused_with_the_reason(root: Path, tmp_path: Path, kind: str):
    options, reported = CHANGES[kind]
    out = copied(root, tmp_path)
    with pytest.raises(UserError, match=reported):
        resumed(root, out, **options)
    resumed(root, out)  # nothing was lost
    assert_same(weights(out), weights(root / "out"))


def test_other_data_are_refused_and_the_same_data_elsewhere_are_not(root: Path, tmp_path: Path):
    out = copied(root, tmp_path)
    with pytest.raises(UserError, match="the data give other rows"):
        resumed(root, out, data=write_text(tmp_path / "other.jsonl", num_documents=39))
    resumed(root, out, data=shutil.copy(root / "text.jsonl", tmp_path / "moved.jsonl"))
    assert_same(weights(out), weights(root / "out"))


def test_what_changes_no_training_may_change(root: Path, tmp_path: Path):
    out = copied(root, tmp_path)
    resumed(root, out, per_device_train_batch_size=1, gradient_accumulation_steps=2, logging_steps=3)
    assert sealed(out / "checkpoint-4")["rows_per_step"] == 2


@pytest.mark.parametrize("text", ["", "max_st", "- 1", "a: [1"], ids=["empty", "cut", "list", "broken"])
def test_a_broken_run_file_stops_no_resume(root: Path, tmp_path: Path, text: str):
    out = copied(root, tmp_path)
    (out / RUN_FILE).write_text(text)
    resumed(root, out)
    assert_same(weights(out), weights(root / "out"))


@pytest.mark.parametrize("text", ["", "- 1", "a: [1"], ids=["empty", "list", "broken"])
def test_a_broken_run_file_beside_an_old_checkpoint_is_named(root: Path, tmp_path: Path, text: str):
    out = copied(root, tmp_path)
    seal = json.loads((out / "checkpoint-2" / SEAL).read_text())
    (out / "checkpoint-2" / SEAL).write_text(json.dumps({name: seal[name] for name in ("is_resumable", "sizes")}))
    (out / RUN_FILE).write_text(text)
    with pytest.raises(UserError, match=f"{RUN_FILE} .*; remove it to continue"):
        resumed(root, out)


def test_a_killed_removal_leaves_no_partial_checkpoint(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = shutil.copytree(root / "out", tmp_path / "out")

    class KilledError(BaseException):
        pass

    def killed(path: Path, **_: object) -> None:
        if Path(path).exists():
            (Path(path) / "model.safetensors").unlink()
            raise KilledError

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KilledError):
        discard(out / "checkpoint-2")
    monkeypatch.undo()
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-4"] == [p.name for p in checkpoints(out)]
    assert (out / STAGING).exists()  # which the next run clears


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("shift", True),
        ("layout", 5),
        ("block_size", "4"),
        ("sampler", []),
        ("recipe", "x"),
        ("mask_token_id", 1.5),
        ("schema_version", "1"),
    ],
)
def test_facts_of_the_wrong_type_are_named(root: Path, tmp_path: Path, name: str, value: object):
    record = json.loads((root / "out" / "decausal.json").read_text()) | {name: value}
    (tmp_path / "decausal.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=f"has {name} .*; expected"):
        read_facts(tmp_path)
