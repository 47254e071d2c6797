"""Generate on block checkpoints: text, counts, stop texts, the live view and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import decausal
from decausal.cli import main
from decausal.diffusion.layout import Layout
from decausal.errors import UserError
from decausal.models.adapt import adapt
from decausal.models.checkpoint import Converted, save_converted
from decausal.sampling.generate import generate
from decausal.sampling.jobs import Progress
from decausal.sampling.watching.followed import Followed
from decausal.sampling.watching.watch import Watch
from tests.families import FAMILIES, tiny_tokenizer
from tests.sampling.stand_ins import conversion_facts

PROMPTS = ["def area(width, height):", "import", "x = [1, 2", "the rain in spain"]
SETTINGS = {
    "static": {"num_steps": 2},
    "threshold": {"threshold": 0.6, "confidence": "margin"},
    "bounded": {"entropy_bound": 0.5},
    "first alone": {"threshold": 0.3, "first_token_from_clean": True},
    "sampled": {"threshold": 0.5, "temperature": 1.0, "top_p": 0.9},
}


def converted(block_size: int = 4, shift: int = 1) -> Converted:
    model, tokenizer = FAMILIES["qwen3"](), tiny_tokenizer()
    mask_token_id = adapt(model, tokenizer, layout=Layout("block", block_size))
    model.get_output_embeddings().weight.data *= 4
    return Converted(
        model, tokenizer, conversion_facts(mask_token_id, layout="block", block_size=block_size, shift=shift)
    )


@pytest.fixture(scope="module")
def model() -> Converted:
    return converted()


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_row_does_not_depend_on_its_batch(model: Converted, options: dict[str, Any]) -> None:
    together = generate(model, PROMPTS, max_new_tokens=11, seed=5, **options)
    in_twos = generate(model, PROMPTS, max_new_tokens=11, seed=5, batch_size=2, **options)
    alone = [generate(model, prompt, max_new_tokens=11, seed=5 + i, **options) for i, prompt in enumerate(PROMPTS)]
    assert together == in_twos == alone
    for row, prompt in zip(together, PROMPTS, strict=True):
        assert row.full_text == prompt + row.text
        assert row.text == model.tokenizer.decode(row.ids, skip_special_tokens=True)
        assert row.tokens_per_forward == len(row.ids) / row.num_forwards
        first = len(model.tokenizer(prompt)["input_ids"])
        assert row.block_of_token == [(first + place) // 4 for place in range(len(row.ids))]


def test_observing_a_row_does_not_change_it_and_the_last_frame_is_the_result(model: Converted) -> None:
    plain = generate(model, PROMPTS, max_new_tokens=9, batch_size=2, num_steps=2)
    reported: list[Progress] = []
    seen = generate(model, PROMPTS, max_new_tokens=9, batch_size=2, num_steps=2, on_step=reported.append)
    assert seen == plain
    for index, generation in enumerate(seen):
        own = [progress for progress in reported if progress.ticket == index]
        assert [progress.step for progress in own] == list(range(generation.num_forwards))
        followed = Followed(own[0].row)
        for progress in own:
            followed.take(progress)
        first = len(model.tokenizer(PROMPTS[index])["input_ids"])
        assert followed.kept[first : followed.length] == generation.ids
        assert [followed.step_of[first + place] for place in range(len(generation.ids))] == generation.step_of_token


def test_the_live_view_shows_block_models(model: Converted, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(width=60)
    with console.capture() as capture, Watch(model.tokenizer, console) as watch:
        generate(model, PROMPTS[0], max_new_tokens=8, on_step=watch)
    assert "8 of 8 positions" in capture.get()


@pytest.mark.parametrize("layout", ["block", "bidirectional"])
def test_text_ends_before_a_stop_text(model: Converted, layout: str) -> None:
    given = model
    if layout == "bidirectional":
        given = Converted(*model[:2], conversion_facts(model.facts.mask_token_id, shift=1))
    whole = generate(given, PROMPTS[0], max_new_tokens=16, temperature=2.0)
    stop = whole.text[5:7]
    row = generate(given, PROMPTS[0], max_new_tokens=16, temperature=2.0, stop=[stop, "no such text"])
    assert row.text == whole.text[: whole.text.index(stop)]
    assert row.ids == whole.ids[: len(row.ids)]
    assert stop in given.tokenizer.decode(row.ids)
    assert stop not in given.tokenizer.decode(row.ids[:-1])
    assert row.finish_reason == "stop"
    assert len(row.ids) == len(row.step_of_token)


def test_bad_input_is_reported_by_the_prompts_name(model: Converted) -> None:
    with pytest.raises(UserError, match="prompt 2 has 70 tokens"):
        generate(model, ["x", "x" * 70], max_new_tokens=4)
    with pytest.raises(
        UserError, match="the prompt has 2 tokens and 63 are to be written: 65 exceed the model's context of 64"
    ):
        generate(model, "xy", max_new_tokens=63)
    with pytest.raises(UserError, match="remask"):
        generate(model, "x", max_new_tokens=4, remask=True)
    with pytest.raises(UserError, match="batch_size=0"):
        generate(model, "x", batch_size=0)
    assert generate(model, []) == []


def test_steps_beyond_the_block_are_one_per_token(model: Converted) -> None:
    most, more = (generate(model, "x", max_new_tokens=8, num_steps=number) for number in (4, 400))
    assert most == more
    assert most.num_forwards == 8


def test_block_checkpoints_generate_by_name_and_from_the_command_line(
    tmp_path: Path, model: Converted, capsys: pytest.CaptureFixture[str]
) -> None:
    save_converted(tmp_path / "model", *model)
    loaded = decausal.load(tmp_path / "model")
    expected = generate(model, PROMPTS[:2], max_new_tokens=8, entropy_bound=0.5)
    assert loaded.generate(PROMPTS[:2], max_new_tokens=8, entropy_bound=0.5) == expected
    flags = ["--max_new_tokens", "8", "--entropy_bound", "0.5", "--json", "--stop", "never there", "--stop", "nor this"]
    assert main(["generate", str(tmp_path / "model"), *PROMPTS[:2], *flags]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == [vars(generation) for generation in expected]
    assert main(["generate", str(tmp_path / "model"), "x", "--threshold", "0.5", "--num_steps", "2"]) == 2
    assert "exclude each other" in capsys.readouterr().err


def test_infilling_a_block_model_is_refused_with_the_reason(model: Converted) -> None:
    with pytest.raises(UserError, match="layout 'block'"):
        decausal.sampling.model.DiffusionModel(model).infill("a", "b", length=4)
