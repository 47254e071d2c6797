"""A model's own answers as training data: what is trained of the file is what the model wrote, token for token."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from decausal.cli import main
from decausal.data.documents import read_documents
from decausal.data.prompts import load_prompts
from decausal.data.rows import load_rows
from decausal.errors import UserError
from decausal.models.checkpoint import Converted
from decausal.models.embedded import embedded_model_path
from decausal.sampling.answers import AnswersResult, load_writer, write_answers
from decausal.sampling.blocks.prefix_cache import PAGE, PrefixCache
from tests.runs import call_in_a_copy
from tests.sampling.tiny_models import converted

EXAMPLES = list(read_documents("tasks-heldout:addition+words:6"))
GIVEN = [{"prompt": each["prompt"], "completion": "no"} for each in EXAMPLES]
ASKED = [
    {"messages": [{"role": "user", "content": each["prompt"]}, {"role": "assistant", "content": "no"}]}
    for each in EXAMPLES
]
TEMPLATE = (
    "{% if tools %}1 {% endif %}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
MOST = 30  # tokens that are enough for some of the answers
DRAWN = {"temperature": 3.0, "max_new_tokens": MOST, "seed": 3}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that does write text, and ends it."""
    directory = tmp_path_factory.mktemp("source") / "model"
    shutil.copytree(embedded_model_path("tiny-tasks"), directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def writer(source: Path) -> Converted:
    return load_writer(source)


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def documents(path: Path, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """What each record gives in training: the tokens before those that are trained, and those."""
    rows = load_rows(path, tokenizer, 200, cache_dir=path.parent / "cache")
    found = []
    for row in (rows[index] for index in range(len(rows))):
        for number in range(int(row["document_ids"].max()) + 1):
            here = row["document_ids"] == number
            ids, is_trained = row["clean_ids"][here], row["is_maskable"][here]
            first = int(is_trained.int().argmax())
            assert is_trained[first : first + int(is_trained.sum())].all(), "they stand in one piece"
            found.append((ids[:first].tolist(), ids[is_trained].tolist()))
    return found


@torch.no_grad()
def greedy(writer: Converted, ids: list[int], count: int, ends: set[int]) -> list[int]:
    """What transformers' own model writes, one whole row for each token."""
    found: list[int] = []
    while len(found) < count and not ends & set(found):
        scores = writer.model(torch.tensor([ids + found])).logits[0, -1]
        scores[writer.facts.mask_token_id] = -torch.inf
        found.append(int(scores.argmax()))
    return found


@pytest.mark.parametrize("records", [ASKED, GIVEN], ids=["conversations", "texts"])
def test_what_is_trained_are_the_tokens_that_the_source_writes_behind_its_prompts(
    writer: Converted, tmp_path: Path, records: list[dict[str, Any]]
) -> None:
    tokenizer = writer.tokenizer
    data, target = write(tmp_path / "in.jsonl", records), tmp_path / "new" / "out.jsonl"
    result = write_answers(writer, data, target, max_new_tokens=MOST, max_rows=4)
    prompts = load_prompts(data, tokenizer, 200, 1)
    ends = {tokenizer.eos_token_id}
    wanted = {
        tuple(prompts[index].tolist()): greedy(writer, prompts[index].tolist(), MOST, ends)
        for index in range(len(prompts))
    }
    found = documents(target, tokenizer)
    assert len(found) == result.num_written == len(lines(target)) == len(GIVEN)
    assert 0 < result.num_cut < len(GIVEN), "else this test says less"
    assert result.num_tokens == sum(map(len, wanted.values()))
    for (before, trained), line in zip(sorted(found), sorted_by_prompt(lines(target), prompts), strict=True):
        ids = wanted[tuple(before)]
        assert trained == ids
        assert line["num_tokens"] == len(trained)
        assert (line["finish_reason"] == "end") == (trained[-1] in ends), "what was cut off trains no end"


def sorted_by_prompt(found: list[dict[str, Any]], prompts: Any) -> list[dict[str, Any]]:
    return sorted(found, key=lambda line: prompts[line["id"]].tolist())


def test_a_prompts_answers_have_seeds_of_their_own_and_depend_on_nothing_else(
    writer: Converted, tmp_path: Path
) -> None:
    data = write(tmp_path / "in.jsonl", GIVEN)
    write_answers(writer, data, tmp_path / "several.jsonl", num_answers=3, max_rows=2, **DRAWN)
    write_answers(writer, data, tmp_path / "few.jsonl", num_answers=3, num_prompts=2, max_rows=5, **DRAWN)
    several, few = lines(tmp_path / "several.jsonl"), lines(tmp_path / "few.jsonl")
    assert few == [line for line in several if line["id"] < 6]
    assert len({line["completion"] for line in few if line["id"] < 3}) > 1
    for line in few:
        assert line["prompt"] == GIVEN[line["id"] // 3]["prompt"]
    write_answers(writer, data, tmp_path / "other.jsonl", num_prompts=1, **DRAWN | {"seed": 4})
    assert lines(tmp_path / "other.jsonl")[0]["completion"] == several[1]["completion"]


def test_answers_that_are_too_long_are_left_out_where_that_is_asked_for(writer: Converted, tmp_path: Path) -> None:
    data = write(tmp_path / "in.jsonl", ASKED)
    kept = write_answers(writer, data, tmp_path / "kept.jsonl", num_answers=4, **DRAWN)
    dropped = write_answers(writer, data, tmp_path / "dropped.jsonl", num_answers=4, truncated="drop", **DRAWN)
    assert kept.num_cut
    assert (dropped.num_cut, dropped.num_shortened) == (0, 0)
    assert dropped.num_dropped == kept.num_cut + kept.num_shortened
    assert lines(tmp_path / "dropped.jsonl") == [
        line for line in lines(tmp_path / "kept.jsonl") if line["finish_reason"] == "end"
    ]


def test_any_number_of_processes_tokenises_the_prompts_of_one_job(source: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "in.jsonl", [*ASKED, *ASKED])
    flags = ["--data", str(data), "--temperature", "3", "--max_new_tokens", "8", "--seed", "3"]
    for number in (1, 2):
        target = ["--output", str(tmp_path / f"{number}.jsonl"), "--dataset_num_proc", str(number)]
        assert main(["answers", str(source), *flags, *target]) == 0
    whole = (tmp_path / "1.jsonl").read_bytes()
    assert (tmp_path / "2.jsonl").read_bytes() == whole
    (tmp_path / "1.jsonl").write_bytes(whole[: len(whole) // 2])
    continued = ["--output", str(tmp_path / "1.jsonl"), "--dataset_num_proc", "2"]
    assert main(["answers", str(source), *flags, *continued]) == 0
    assert (tmp_path / "1.jsonl").read_bytes() == whole


@pytest.mark.parametrize("truncated", ["keep", "drop"])
def test_a_job_cut_off_at_any_byte_is_continued_to_the_same_file(
    writer: Converted, tmp_path: Path, truncated: str
) -> None:
    options = DRAWN | {"num_answers": 2, "truncated": truncated}
    reported: list[tuple[int, int]] = []
    data, target = write(tmp_path / "in.jsonl", ASKED), tmp_path / "out.jsonl"
    first = write_answers(writer, data, target, **options)
    whole = target.read_bytes()
    assert whole.count(b"\n") == first.num_written
    for length in (0, 1, len(whole) // 2, whole.index(b"\n") + 1, len(whole) - 1, len(whole)):
        target.write_bytes(whole[:length])
        write_answers(writer, data, target, on_progress=lambda *now: reported.append(now), **options)
        assert target.read_bytes() == whole
        assert reported[-1] == (12, 12)


def test_a_killed_process_is_continued_by_the_same_command(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "in.jsonl", ASKED * 10)
    flags = [source, "--data", data, "--output_dir", tmp_path / "out", "--max_new_tokens", "30"]
    target = tmp_path / "out" / "answers.jsonl"
    process = call_in_a_copy("answers", *flags, "--max_rows", "3")
    while not (target.exists() and target.stat().st_size > 500) and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with target.open("ab") as file:
        file.write(b'{"id": 9')
    assert main(["answers", *map(str, flags), "--max_rows", "64"]) == 0
    said = capsys.readouterr().err
    assert "from before" in said
    assert "tokens/s" in said
    assert main(["answers", *map(str, flags[:3]), "--output", str(tmp_path / "b.jsonl"), *map(str, flags[5:])]) == 0
    assert target.read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_the_directory_of_a_job_is_data_without_the_jobs_settings(
    writer: Converted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_answers(writer, write(tmp_path / "in.jsonl", ASKED), tmp_path / "out" / "answers.jsonl", **DRAWN)
    assert (tmp_path / "out" / "answers.jsonl.settings.json").is_file()
    found = load_rows(tmp_path / "out", writer.tokenizer, 200, cache_dir=tmp_path / "cache")
    assert found.num_documents == len(lines(tmp_path / "out" / "answers.jsonl"))
    assert "skipped answers.jsonl.settings.json (a job's settings)" in capsys.readouterr().err


def test_a_verified_model_writes_what_its_weights_write_from_left_to_right(tmp_path: Path) -> None:
    drafting = converted(layout="block", block_size=4, causal_context=True, causal_groups=True)
    causal = Converted(
        drafting.model,
        drafting.tokenizer,
        replace(drafting.facts, layout="causal", block_size=None, causal_context=False, causal_groups=False),
    )
    data, options = write(tmp_path / "in.jsonl", [{"prompt": "the rain"}, {"prompt": "in"}]), {"max_new_tokens": 12}
    result = write_answers(drafting, data, tmp_path / "drafted.jsonl", **options)
    assert result.num_tokens
    write_answers(causal, data, tmp_path / "causal.jsonl", **options)
    assert lines(tmp_path / "drafted.jsonl") == lines(tmp_path / "causal.jsonl")


def test_beginnings_that_prompts_share_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drafting = converted(layout="block", block_size=4, causal_context=True, causal_groups=True)
    data = write(tmp_path / "in.jsonl", [{"prompt": "the rain in the inn " * 3 + word} for word in ("a", "b", "c")])
    options = {"max_new_tokens": 4, "max_rows": 1}
    loads: list[int] = []
    load = PrefixCache.load

    def count(cache: PrefixCache, ids: Sequence[int], row: int) -> int:
        loads.append(load(cache, ids, row))
        return loads[-1]

    monkeypatch.setattr(PrefixCache, "load", count)
    write_answers(drafting, data, tmp_path / "alone.jsonl", **options)
    assert loads == []
    write_answers(drafting, data, tmp_path / "shared.jsonl", prefix_cache_tokens=64, **options)
    assert loads[0] == 0
    assert min(loads[1:]) >= PAGE
    assert lines(tmp_path / "shared.jsonl") == lines(tmp_path / "alone.jsonl")


def test_a_denoising_model_answers_with_its_own_sampler(tmp_path: Path) -> None:
    model, data = converted(), write(tmp_path / "in.jsonl", [{"prompt": "the rain"}] * len(GIVEN))
    result = write_answers(model, data, tmp_path / "out.jsonl", num_steps=3, **DRAWN | {"max_new_tokens": 8})
    assert result.num_written + result.num_lost == len(GIVEN)


def test_what_stands_beside_a_conversation_stays(writer: Converted, tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "w"}}]
    record = ASKED[0] | {"tools": tools, "system": "be brief"}
    write_answers(
        writer, write(tmp_path / "in.jsonl", [record]), tmp_path / "out.jsonl", max_length=64, max_new_tokens=2
    )
    (line,) = lines(tmp_path / "out.jsonl")
    assert line["tools"] == tools
    assert [message["role"] for message in line["messages"]] == ["system", "user", "assistant"]


def test_prompts_that_leave_no_room_are_left_out_and_reported(writer: Converted, tmp_path: Path) -> None:
    data = write(tmp_path / "in.jsonl", [{"prompt": "the rain " * 40}, *GIVEN[:1]])
    with pytest.warns(UserWarning, match=r"left out 1 of 2 prompts: .* --max_length 256 less 10 new tokens"):
        result = write_answers(writer, data, tmp_path / "out.jsonl", max_new_tokens=10)
    assert result.num_wanted == 1


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"truncated": "cut"}, "truncated='cut' is not accepted"),
    ({"num_answers": 2}, "writes the same answer 2 times: give --temperature"),
    ({"threshold": 0.5}, "threshold is for converted models"),
    ({"speculative": True}, "speculative is for converted models"),
    ({"stop": ["a"]}, "stop and stop_token_ids would end answers"),
    ({"max_new_tokens": 256}, "leaves no room for a prompt"),
    ({"max_length": 257}, "over the model's context"),
]


@pytest.mark.parametrize(("options", "says"), REFUSED)
def test_bad_settings_are_refused_and_leave_nothing_behind(
    writer: Converted, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    data = write(tmp_path / "in.jsonl", GIVEN)
    with pytest.raises(UserError, match=says):
        write_answers(writer, data, tmp_path / "new" / "out.jsonl", **{"max_new_tokens": 8} | options)
    assert not (tmp_path / "new").exists()


def test_bad_data_and_other_jobs_are_refused_in_a_line(writer: Converted, tmp_path: Path) -> None:
    target, options = tmp_path / "out.jsonl", {"max_new_tokens": 8}
    data = write(tmp_path / "in.jsonl", GIVEN)
    with pytest.raises(UserError, match="all of its documents are empty"):
        write_answers(writer, write(tmp_path / "empty.jsonl", [{"prompt": ""}]), target, **options)
    (tmp_path / "mixed").mkdir()
    for name, records in (("a.jsonl", ASKED), ("b.jsonl", GIVEN)):
        write(tmp_path / "mixed" / name, records)
    with pytest.raises(UserError, match="one kind at a time"):
        write_answers(writer, tmp_path / "mixed", target, **options)
    plain = load_writer("tiny")
    plain.tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"in\.jsonl:1: 'messages' need a chat template"):
        write_answers(plain, write(tmp_path / "in.jsonl", ASKED), target, **options)
    assert not target.exists()
    data = write(tmp_path / "in.jsonl", GIVEN)
    write_answers(writer, data, target, **options)
    before = target.read_bytes()
    for changes, says in (
        ({"temperature": 0.5}, r"begun with temperature 0\.0, now 0\.5"),
        ({"max_length": 255}, "begun with max_length 256, now 255"),
        ({"truncated": "drop"}, "begun with truncated 'keep', now 'drop'"),
    ):
        with pytest.raises(UserError, match=says):
            write_answers(writer, data, target, **options | changes)
    with pytest.raises(UserError, match="begun with data"):
        write_answers(writer, write(tmp_path / "in.jsonl", GIVEN[1:]), target, **options)
    assert target.read_bytes() == before


def test_the_last_line_says_all_that_was_left_out() -> None:
    from decausal.verbs.answers import _summary

    result = AnswersResult(9, 1, 4, 1, 2, 3, 1, 1, "too long", 100, 4.0)
    said = _summary(result, Path("out.jsonl"), 48)
    assert said == (
        "4 answers written to out.jsonl, 1 from before, 1 cut at 48 tokens, trained without an end, 2 shortened to "
        "where their text encodes to the same tokens, 3 left out that were cut at 48 tokens, 1 left out that are "
        "empty or encode to other tokens, 1 refused (too long), 100 tokens at 25.0 tokens/s"
    )


def test_what_was_written_trains_the_lossless_recipe(source: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "in.jsonl", ASKED)
    flags = ["--data", str(data), "--max_new_tokens", "30"]
    assert main(["answers", str(source), *flags, "--output_dir", str(tmp_path / "out")]) == 0
    trained = [*("--recipe", "lossless", "--lora_r", "2", "--max_length", "100", "--use_cpu", "true")]
    trained += [*("--max_steps", "1", "--data", str(tmp_path / "out"), "--output_dir", str(tmp_path / "trained"))]
    assert main(["convert", str(source), *trained, "--disable_tqdm", "true"]) == 0
    assert main(["answers", str(tmp_path / "trained"), *flags, "--output", str(tmp_path / "again.jsonl")]) == 0
    assert lines(tmp_path / "again.jsonl") == lines(tmp_path / "out" / "answers.jsonl")
