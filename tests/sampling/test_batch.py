"""Batch jobs: the answers of `generate`, in order, however often the job is killed and whatever the lines hold."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from decausal.cli import main
from decausal.errors import UserError
from decausal.models.checkpoint import Converted, save_converted
from decausal.sampling import ordered
from decausal.sampling.batch import BatchEngine, run_file
from decausal.sampling.generate import generate
from tests.runs import call_in_a_copy
from tests.sampling.tiny_models import converted

PROMPTS = ["def area(width, height):", "import", "x = [1, 2", "for i in", "class A:\n    ", "return"]
LAYOUTS: dict[str, dict[str, Any]] = {"bidirectional": {}, "block": {"layout": "block", "block_size": 4, "shift": 0}}
NUM_KILLED = 200  # lines of the job that is killed: it must not end before it is seen to have begun
OPTIONS = {"max_new_tokens": 8, "temperature": 1.0, "num_steps": 3, "seed": 5}


@pytest.fixture(scope="module", params=LAYOUTS)
def model(request: pytest.FixtureRequest) -> Converted:
    return converted(chat=True, **LAYOUTS[request.param])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in records))
    return path


def as_record(label: Any, generation: Any) -> dict[str, Any]:
    return {
        "id": label,
        "text": generation.text,
        "finish_reason": generation.finish_reason,
        "num_tokens": len(generation.ids),
        "num_forwards": generation.num_forwards,
    }


def test_an_engine_gives_the_answers_of_generate_in_the_order_of_the_prompts(model: Converted) -> None:
    wanted = generate(model, PROMPTS, **OPTIONS)
    found = list(BatchEngine(model, max_rows=2).run(iter(PROMPTS), **OPTIONS))
    for one, other in zip(found, wanted, strict=True):
        assert (one.text, one.full_text, one.ids) == (other.text, other.full_text, other.ids)
        assert (one.step_of_token, one.num_forwards) == (other.step_of_token, other.num_forwards)
        assert one.finish_reason == other.finish_reason


def test_prompts_are_taken_as_places_become_free(model: Converted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordered, "BEGUN_PER_PLACE", 3)
    taken = reported = 0
    most = 0

    def endless() -> Iterator[str]:
        nonlocal taken, most
        while True:
            taken += 1
            most = max(most, taken - reported)
            yield PROMPTS[taken % 6]

    engine = BatchEngine(model, max_rows=2)
    answers = engine.run(endless(), max_new_tokens=4)
    for _ in range(20):
        next(answers)
        reported += 1
    assert most <= 3 * 2 + 1
    answers.close()
    assert engine._engine.num_running == engine._engine.num_waiting == 0
    (again,) = engine.run(PROMPTS[:1], **OPTIONS)
    assert again.ids == generate(model, PROMPTS[0], **OPTIONS).ids


def test_lines_have_ids_and_settings_of_their_own_and_empty_ones_are_passed_over(
    model: Converted, tmp_path: Path
) -> None:
    records = [
        {"prompt": PROMPTS[0]},
        "",
        {"prompt": PROMPTS[1], "id": "é\ud800", "steps": 2, "gen_length": 5, "seed": 3},
        {"prompt": PROMPTS[2], "id": {"any": [1]}, "threshold": 0.5},
    ]
    reported: list[tuple[int, int]] = []
    source, target = write(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl"
    result = run_file(model, source, target, max_rows=2, on_progress=lambda *now: reported.append(now), **OPTIONS)
    assert lines(target) == [
        as_record(0, generate(model, PROMPTS[0], **OPTIONS)),
        as_record("é\ud800", generate(model, PROMPTS[1], **OPTIONS | {"num_steps": 2, "max_new_tokens": 5, "seed": 3})),
        as_record(
            {"any": [1]},
            generate(model, PROMPTS[2], max_new_tokens=8, temperature=1.0, threshold=0.5, seed=OPTIONS["seed"] + 2),
        ),
    ]
    assert reported == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert (result.num_lines, result.num_resumed, result.num_errors) == (3, 0, 0)
    assert result.num_tokens == sum(line["num_tokens"] for line in lines(target))


def test_conversations_go_through_the_chat_template_without_their_last_answer(model: Converted, tmp_path: Path) -> None:
    question = {"role": "user", "content": [{"type": "text", "text": PROMPTS[1]}]}
    asked = [{"messages": [question]}, {"messages": [question, {"role": "assistant", "content": "no"}], "seed": 5}]
    source, target = write(tmp_path / "in.jsonl", asked), tmp_path / "out.jsonl"
    run_file(model, source, target, **OPTIONS)
    wanted = as_record(0, generate(model, PROMPTS[1], chat=True, **OPTIONS))
    assert lines(target) == [wanted, wanted | {"id": 1}]
    model.tokenizer.chat_template += " "
    with pytest.raises(UserError, match="was begun with chat_template"):
        run_file(model, source, target, **OPTIONS)
    model.tokenizer.chat_template = model.tokenizer.chat_template[:-1]


BAD: list[tuple[Any, str]] = [
    ("{", "not JSON"),
    ("[" * 100_000, "nested|not JSON"),
    ([1], "must be an object"),
    ({"id": 3}, "no 'prompt' or 'messages'"),
    ({"prompt": "a", "messages": []}, "both 'prompt' and 'messages'"),
    ({"messages": []}, "nothing to answer"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "nothing to answer"),
    ({"messages": [{"role": "user", "content": "a\ud800"}]}, "surrogate pair"),
    ({"messages": [{"role": "user"}]}, "message 1 has no content"),
    ({"prompt": "a", "tools": []}, "unknown field 'tools'"),
    ({"prompt": 3}, "'prompt' must be a text"),
    ({"prompt": "a\ud800"}, "surrogate pair"),
    ({"prompt": "a", "promt": "b"}, "unknown field 'promt'; did you mean 'prompt'"),
    ({"prompt": "a", "temperature": -1}, "temperature=-1 is not accepted"),
    ({"prompt": "a", "steps": 2, "num_steps": 3}, "given twice"),
    ({"prompt": "a" * 100}, "context"),
    ({"prompt": "<|mask|>"}, "mask token"),
]


def test_bad_lines_are_recorded_in_their_places_or_stop_the_job_with_their_number(
    model: Converted, tmp_path: Path
) -> None:
    mask = model.tokenizer.convert_ids_to_tokens(model.facts.mask_token_id)
    bad = [{"prompt": mask} if each == {"prompt": "<|mask|>"} else each for each, _ in BAD]
    mixed = [record for each in bad for record in (each, {"prompt": "import", "seed": 5})]
    source, target = write(tmp_path / "in.jsonl", mixed), tmp_path / "out.jsonl"
    result = run_file(model, source, target, on_error="record", **OPTIONS)
    assert result.num_errors == len(BAD)
    found = lines(target)
    good = as_record(None, generate(model, "import", **OPTIONS))
    for index, ((_, says), wrong, right) in enumerate(zip(BAD, found[::2], found[1::2], strict=True)):
        assert any(part in wrong["error"] for part in says.split("|")), wrong
        assert right == good | {"id": 2 * index + 1}
    # Each of them alone stops: what stands before it is written, and the mended file is continued.
    with pytest.raises(UserError, match=r"in\.jsonl line 3: .*fix it"):
        run_file(
            model, write(source, [{"prompt": "import"}, "", "{", {"prompt": "return"}]), tmp_path / "b.jsonl", **OPTIONS
        )
    assert len(lines(tmp_path / "b.jsonl")) == 1
    write(source, [{"prompt": "import"}, "", {"prompt": "for"}, {"prompt": "return"}])
    assert run_file(model, source, tmp_path / "b.jsonl", **OPTIONS).num_resumed == 1
    wanted = generate(model, ["import", "for", "return"], **OPTIONS)
    assert lines(tmp_path / "b.jsonl") == [as_record(index, each) for index, each in enumerate(wanted)]


def test_a_job_cut_off_at_any_byte_is_continued_to_the_same_answers(model: Converted, tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", [{"prompt": text} for text in PROMPTS[:3]]), tmp_path / "out.jsonl"
    run_file(model, source, target, **OPTIONS)
    whole = target.read_bytes()
    for length in (0, 1, len(whole) // 2, whole.index(b"\n"), whole.index(b"\n") + 1, len(whole) - 1, len(whole)):
        target.write_bytes(whole[:length])
        result = run_file(model, source, target, **OPTIONS)
        assert result.num_resumed == whole[:length].count(b"\n")
        assert target.read_bytes() == whole


def test_answers_of_another_job_are_not_touched(model: Converted, tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", [{"prompt": "import"}]), tmp_path / "out.jsonl"
    target.write_text("mine")
    with pytest.raises(UserError, match="not of a job"):
        run_file(model, source, target, **OPTIONS)
    assert target.read_text() == "mine"
    target.unlink()
    run_file(model, source, target, **OPTIONS)
    before = target.read_bytes()
    with pytest.raises(UserError, match=r"begun with temperature 1\.0, now 0\.5: give the same"):
        run_file(model, source, target, **OPTIONS | {"temperature": 0.5})
    with pytest.raises(UserError, match=r"has 1 line and .* only 0"):
        run_file(model, write(tmp_path / "empty.jsonl", []), target, **OPTIONS)
    with pytest.raises(UserError, match=r"cannot read .*none\.jsonl"):
        run_file(model, tmp_path / "none.jsonl", target)
    with pytest.raises(UserError, match="on_error='ignore' is not accepted"):
        run_file(model, source, target, on_error="ignore")
    assert target.read_bytes() == before


def test_two_runs_do_not_write_the_same_file(model: Converted, tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", [{"prompt": "import"}]), tmp_path / "out.jsonl"

    def again(done: int, total: int) -> None:
        with pytest.raises(UserError, match="another run is writing"):
            run_file(model, source, target, **OPTIONS)

    run_file(model, source, target, on_progress=again, **OPTIONS)
    assert len(lines(target)) == 1


def test_a_killed_process_is_continued_by_the_same_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = converted()
    save_converted(tmp_path / "model", *model)
    texts = [PROMPTS[index % 6] for index in range(NUM_KILLED)]
    source, target = write(tmp_path / "in.jsonl", [{"prompt": text} for text in texts]), tmp_path / "out.jsonl"
    flags = [tmp_path / "model", source, target, "--max_new_tokens", "8", "--steps", "8", "--temperature", "1"]
    process = call_in_a_copy("batch", *flags, "--max_rows", "3")
    while not (target.exists() and target.stat().st_size > 500) and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    num_before = target.read_bytes().count(b"\n")
    assert 0 < num_before < len(texts)
    with target.open("ab") as file:
        file.write(b'{"id": 9')  # as a kill in the middle of a write leaves it
    assert main(["batch", *map(str, flags), "--max_rows", "64"]) == 0
    assert f"{NUM_KILLED} answers in {target}, {num_before} of them from before" in capsys.readouterr().err
    wanted = generate(model, texts, max_new_tokens=8, num_steps=8, temperature=1.0, batch_size=64)
    assert lines(target) == [as_record(index, each) for index, each in enumerate(wanted)]
