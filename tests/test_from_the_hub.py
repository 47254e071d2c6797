"""Models and data by their names on the hub: the real clients against a hub on this machine.

The command lines run in processes whose environment names that hub, since it is read at import.
"""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.command_line import CommandLine, Ended
from tests.exchange.public_forms import publish
from tests.families import EOS_ID, FAMILIES
from tests.gguf_model import write_gguf
from tests.local_hub import TOKEN, LocalHub, local_hub
from tests.runs import assert_same, save_source, weights, write_text

RUN = ["--max_length", "48", "--max_steps", "4", "--use_cpu", "true", "--per_device_train_batch_size", "2"]
MODEL = "owner/tiny-model"
CONFIGS = """\
---
configs:
- config_name: chat
  data_files: chat.jsonl
- config_name: questions
  data_files: questions.jsonl
---
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[LocalHub]:
    root = tmp_path_factory.mktemp("hub")
    model = save_source(root / "models" / MODEL, chat=True)
    texts = root / "datasets" / "owner" / "texts"
    texts.mkdir(parents=True)
    records = [json.loads(line) for line in write_text(texts / "all.jsonl").read_text().splitlines()]
    (texts / "all.jsonl").unlink()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records[:30]), texts / "train.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records[30:]), texts / "test.parquet")
    talks = root / "datasets" / "owner" / "talks"
    talks.mkdir()
    (talks / "README.md").write_text(CONFIGS)
    write_lines(talks / "questions.jsonl", [{"prompt": "the", "completion": record["text"]} for record in records])
    chats = [[{"role": "user", "content": "the"}, {"role": "assistant", "content": "rain"}]] * 20
    write_lines(talks / "chat.jsonl", [{"messages": messages} for messages in chats])
    for name in ("owner/gated", "owner/private"):
        shutil.copytree(model, root / "models" / name)
        shutil.copytree(texts, root / "datasets" / name)
    (root / "models" / "owner" / "notes").mkdir()
    (root / "models" / "owner" / "notes" / "README.md").write_text("no model")
    with local_hub(root) as hub:
        hub.gated, hub.private = {"owner/gated"}, {"owner/private"}
        yield hub


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


def command_line(url: str, home: Path, **variables: str) -> CommandLine:
    online = {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_TOKEN": "", "NO_PROXY": "127.0.0.1,localhost"}
    return CommandLine(home, **online | {"HF_ENDPOINT": url, "HF_HOME": str(home)} | variables)


@pytest.fixture(scope="module")
def decausal(hub, home) -> Iterator[CommandLine]:
    with command_line(hub.url, home) as line:
        yield line


@pytest.fixture
def logged_in(home) -> Iterator[None]:
    """What `hf auth login` leaves."""
    (home / "token").write_text(TOKEN)
    yield
    (home / "token").unlink()


@pytest.fixture(scope="module")
def converted(decausal, home) -> Path:
    """The model and the data set of the hub."""
    return convert(decausal, MODEL, "owner/texts", home / "converted")


def convert(line: CommandLine, model: object, data: object, output_dir: Path, *flags: str) -> Path:
    ended = line("convert", model, "--data", data, "--output_dir", output_dir, *RUN, *flags)
    assert ended.code == 0, ended
    return output_dir


def facts(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "decausal.json").read_text())


def test_model_and_data_of_the_hub_convert_as_those_of_directories(decausal, hub, converted, tmp_path):
    local = hub.root / "models" / MODEL, hub.root / "datasets" / "owner" / "texts" / "train.parquet"
    assert_same(weights(converted), weights(convert(decausal, *local, tmp_path / "local")))


def test_the_facts_name_the_model_its_commit_and_the_data(hub, converted):
    found = facts(converted)
    assert (found["source"], found["source_revision"]) == (MODEL, hub.commit("models", MODEL))
    assert found["recipe"]["data"] == "owner/texts"


@pytest.mark.parametrize(
    ("data", "file", "flags"),
    [
        ("owner/talks:chat", "talks/chat.jsonl", ()),
        ("owner/talks:questions", "talks/questions.jsonl", ()),
        ("owner/texts", "texts/test.parquet", ("--dataset_split", "test")),
    ],
)
def test_a_part_of_a_data_set_is_what_its_file_holds(decausal, hub, tmp_path, data, file, flags):
    of_hub = convert(decausal, MODEL, data, tmp_path / "hub", *flags)
    of_file = convert(decausal, MODEL, hub.root / "datasets" / "owner" / file, tmp_path / "file")
    assert_same(weights(of_hub), weights(of_file))


def test_a_gguf_file_of_the_hub_is_converted_and_recorded_with_its_commit(decausal, hub, tmp_path):
    packed = hub.root / "models" / "owner" / "packed"
    packed.mkdir()
    write_gguf(packed / "tiny-Q8_0.gguf", FAMILIES["llama"](hidden_size=64, bos_token_id=EOS_ID))
    out = convert(decausal, "owner/packed/tiny-Q8_0.gguf", "owner/texts", tmp_path / "out", "--recipe", "mdm")
    found = facts(out)
    assert (found["source"], found["source_revision"]) == (
        "owner/packed/tiny-Q8_0.gguf",
        hub.commit("models", "owner/packed"),
    )
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"


def test_a_resumed_run_stays_with_the_commit_that_it_began_with(decausal, hub, tmp_path):
    moving = shutil.copytree(hub.root / "models" / MODEL, hub.root / "models" / "owner" / "moving")
    out = convert(decausal, "owner/moving", "owner/texts", tmp_path / "out", "--save_steps", "2")
    whole, commit = weights(out), facts(out)["source_revision"]
    save_source(moving, chat=True, intermediate_size=40)
    assert hub.commit("models", "owner/moving") != commit
    again = ["--save_steps", "2", "--resume_from_checkpoint", str(out / "checkpoint-2")]
    convert(decausal, "owner/moving", "owner/texts", out, *again)
    assert_same(weights(out), whole)
    assert facts(out)["source_revision"] == commit


def test_a_converted_model_of_the_hub_is_trained_on_at_the_commit_that_the_stage_began_with(
    decausal, hub, converted, tmp_path
):
    first = hub.root / "models" / "owner" / "first"
    shutil.copytree(converted, first, ignore=shutil.ignore_patterns("checkpoint-*"))
    commit = hub.commit("models", "owner/first")
    flags = ("--align_weight", "1", "--save_steps", "2")
    out = convert(decausal, "owner/first", "owner/texts", tmp_path / "out", *flags)
    whole, found = weights(out), facts(out)
    assert (found["source"], found["source_revision"]) == (MODEL, hub.commit("models", MODEL))
    assert (found["recipe"]["model_name_or_path"], found["recipe"]["revision"]) == ("owner/first", commit)
    assert found["earlier_stages"] == [facts(converted)["recipe"]]
    (first / "generation_config.json").write_text("{}")
    assert hub.commit("models", "owner/first") != commit
    again = ("--resume_from_checkpoint", str(out / "checkpoint-2"))
    convert(decausal, "owner/first", "owner/texts", out, *flags, *again)
    assert_same(weights(out), whole)
    assert facts(out)["recipe"]["revision"] == commit


def test_a_data_set_is_streamed_as_its_file_and_resumes(decausal, hub, home, tmp_path):
    local = hub.root / "datasets" / "owner" / "texts" / "train.parquet"
    flags = ["--streaming", "true", "--streaming_window", "2", "--save_steps", "2"]
    whole = weights(convert(decausal, MODEL, local, tmp_path / "local", *flags))
    out = convert(decausal, MODEL, "owner/texts", tmp_path / "out", *flags)
    assert_same(weights(out), whole)
    for file in (home / "decausal" / "rows").glob("*/*.rows"):
        file.unlink()
    convert(decausal, MODEL, "owner/texts", out, *flags, "--resume_from_checkpoint", str(out / "checkpoint-2"))
    assert_same(weights(out), whole)


def test_what_is_pushed_is_private_and_loads_by_its_id(decausal, hub, converted, logged_in, tmp_path):
    flags = ["--format", "hf", "--output_dir", tmp_path / "out", "--push_to_hub", "owner/mine", "--private"]
    ended = decausal("export", converted, *flags)
    assert ended.code == 0, ended
    assert f"pushed: {hub.url}/owner/mine" in ended.out
    assert hub.private >= {"owner/mine"}
    pushed = hub.root / "models" / "owner" / "mine"
    assert_same(weights(pushed), weights(converted))
    card = (pushed / "README.md").read_text()
    assert f"base_model: {MODEL}\n" in card
    assert "datasets:\n- owner/texts\n" in card
    assert hub.commit("models", MODEL) in card
    written = [decausal("generate", model, "the rain", "--max_new_tokens", "4") for model in ("owner/mine", converted)]
    assert [ended.code for ended in written] == [0, 0], written
    assert written[0].out == written[1].out
    checked = decausal("doctor", "owner/mine")
    assert checked.code == 0, checked
    output_dir = ["--output_dir", tmp_path / "again"]
    teacher = ["--teacher_model_name_or_path", "owner/mine"]
    assert "already converted" in reported(
        decausal("convert", MODEL, "--data", "owner/texts", *teacher, *output_dir, *RUN)
    )
    assert "decausal's form already" in reported(decausal("import", "owner/mine", *output_dir))


def test_a_public_checkpoint_is_imported_without_its_code(decausal, hub, tmp_path):
    public = hub.root / "models" / "owner" / "dream"
    publish(public, "Dream")
    (public / "modeling_dream.py").write_text("raise SystemExit('run')")
    for model, name in (("owner/dream", "hub"), (public, "directory")):
        ended = decausal("import", model, "--output_dir", tmp_path / name)
        assert ended.code == 0, ended
    assert_same(weights(tmp_path / "hub"), weights(tmp_path / "directory"))
    found = facts(tmp_path / "hub")
    assert (found["source"], found["source_revision"]) == ("owner/dream", hub.commit("models", "owner/dream"))
    assert not [request for request in hub.asked if "modeling_dream" in request]


def test_who_is_logged_in_reads_what_is_private(decausal, logged_in, tmp_path):
    convert(decausal, "owner/private", "owner/private", tmp_path / "out")


def test_a_push_of_a_stranger_is_refused_and_leaves_the_export(decausal, converted, tmp_path):
    flags = ["--format", "hf", "--output_dir", tmp_path / "out", "--push_to_hub", "owner/theirs"]
    assert "check login and rights: log in with `hf auth login`" in reported(decausal("export", converted, *flags))
    assert_same(weights(tmp_path / "out"), weights(converted))


def reported(ended: Ended) -> str:
    """The one line of an error."""
    assert ended.code == 2, ended
    assert ended.err.startswith("decausal: error: ")
    assert ended.err.count("\n") == 1
    return ended.err


@pytest.fixture
def refused(tmp_path) -> Callable[..., str]:
    def refuse(line: CommandLine, model: object, data: object, *flags: str) -> str:
        out = tmp_path / "out"
        message = reported(line("convert", model, "--data", data, "--output_dir", out, *RUN, *flags))
        assert not out.exists()
        return message

    return refuse


NO_SUCH = "none of that name, or a private one; check the name, or log in with `hf auth login`"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("owner/nowhere", NO_SUCH),
        ("nowhere", NO_SUCH),
        ("owner/private", NO_SUCH),
        ("owner/gated", "it is gated; ask for access on its page, then log in with `hf auth login`"),
        ("owner/notes", "it holds no config.json"),
        ("owner/na--me", "is not a hub id"),
    ],
)
def test_a_model_that_the_hub_does_not_give(decausal, refused, model, reason):
    message = refused(decausal, model, "owner/texts")
    assert model in message
    assert reason in message


def test_a_revision_that_a_model_has_not(decausal, refused):
    assert "give a branch, tag or commit" in refused(decausal, MODEL, "owner/texts", "--revision", "v2")


@pytest.mark.parametrize(
    ("data", "flags", "reason"),
    [
        ("owner/nowhere", (), NO_SUCH),
        ("owner/private", (), NO_SUCH),
        ("owner/gated", (), "gated data set on the hub. You must be authenticated to access it.); log in"),
        ("owner/talks:poems", (), "'poems' not found. Available: ['chat', 'questions']"),
        ("owner/talks", (), "available configs: ['chat', 'questions']); write owner/talks:CONFIG"),
        ("owner/texts", ("--dataset_split", "dev"), "Unknown split \"dev\". Should be one of ['train', 'test']"),
    ],
)
def test_data_that_the_hub_does_not_give(decausal, refused, data, flags, reason):
    message = refused(decausal, MODEL, data, *flags)
    assert data.partition(":")[0] in message
    assert reason.lower() in message.replace("dataset on the Hub", "data set on the hub").lower()


def test_what_is_no_converted_model_is_not_downloaded_to_say_so(decausal, hub):
    before = len(hub.asked)
    assert f"{MODEL} on the hub is not a decausal checkpoint" in reported(decausal("generate", MODEL, "the rain"))
    assert not [request for request in hub.asked[before:] if "safetensors" in request]
    assert NO_SUCH in reported(decausal("generate", "owner/nowhere", "the rain"))


def test_without_a_connection_what_was_downloaded_is_used(hub, home, converted, refused, tmp_path):
    before = len(hub.asked)
    with command_line(hub.url, home, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1") as offline:
        assert_same(weights(convert(offline, MODEL, "owner/texts", tmp_path / "again")), weights(converted))
        assert facts(tmp_path / "again")["source_revision"] == facts(converted)["source_revision"]
        assert "HF_HUB_OFFLINE is set; unset it" in refused(offline, "owner/other", "owner/texts")
        assert "HF_HUB_OFFLINE is set" in refused(offline, MODEL, "owner/other")
    assert len(hub.asked) == before


def test_a_hub_that_cannot_be_reached_is_reported_at_once(hub, home, converted, refused, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with command_line(url, home) as line:
        for model, data in ((MODEL, "owner/texts"), (hub.root / "models" / MODEL, "owner/texts")):
            message = refused(line, model, data)
            assert f"{url} cannot be reached" in message
            assert "check the connection, or set HF_HUB_OFFLINE=1" in message
        ended = line("export", converted, "--format", "hf", "--output_dir", tmp_path / "pushed", "--push_to_hub", "a/b")
        assert "cannot be reached" in reported(ended)
        assert "it is whole, and can be uploaded again" in ended.err


def test_a_lossless_conversion_may_refer_to_its_base_on_the_hub(decausal, hub, logged_in, tmp_path):
    flags = ("--recipe", "lossless", "--lora_r", "2", "--reference_base", "true")
    directory = convert(decausal, MODEL, "owner/talks:questions", tmp_path / "draft", *flags)
    reference = f"{MODEL}@{hub.commit('models', MODEL)}"
    assert facts(directory)["base_reference"] == reference
    assert not (directory / "model.safetensors").exists()
    assert not (directory / "config.json").exists()
    written = decausal("generate", directory, "the rain", "--max_new_tokens", "6", "--json")
    assert written.code == 0, written
    flags = ("--format", "hf", "--output_dir", tmp_path / "exported", "--push_to_hub", "owner/drafts")
    exported = decausal("export", directory, *flags)
    assert exported.code == 0, exported
    assert {path.name for path in (tmp_path / "exported").iterdir()} == {"README.md", "decausal.json", "draft"}
    pushed = {path.name for path in (hub.root / "models" / "owner" / "drafts").iterdir()}
    assert {"README.md", "decausal.json", "draft"} <= pushed
    assert "model.safetensors" not in pushed
    for model in (tmp_path / "exported", "owner/drafts"):
        again = decausal("generate", model, "the rain", "--max_new_tokens", "6", "--json")
        assert again.code == 0, again
        assert json.loads(again.out)["ids"] == json.loads(written.out)["ids"]
