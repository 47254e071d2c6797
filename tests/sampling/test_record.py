"""Recordings: every frame is what the sampler had, in files that play by themselves."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageSequence

from decausal.cli import main
from decausal.errors import UserError
from decausal.sampling.generate import generate
from decausal.sampling.jobs import Progress
from decausal.sampling.rows import Row
from decausal.sampling.watching.animation import Cell, Page
from decausal.sampling.watching.record import Recording
from decausal.sampling.watching.watch import colour_of_step
from tests.families import tiny_tokenizer
from tests.sampling.denoising import steps
from tests.sampling.tiny_models import converted

TOKENIZER = tiny_tokenizer()
TEXT = "if x:\n  <y"
IDS = TOKENIZER(TEXT)["input_ids"]
ORDER = [3, 1, 0, 2]
"""Positions from 2 on that are open, in the order in which they are kept."""
NAMESPACE = "{http://www.w3.org/2000/svg}"


def play(recording: Recording) -> None:
    for step in steps(IDS, ORDER):
        recording(step)
        recording(replace(step, ticket=1))  # another row, which is not drawn


def texts_at(svg: ElementTree.Element, moment: float) -> tuple[str, int]:
    """The characters without spaces, and the number of boxes, that stand there at a share of the play."""
    shown, num_boxes = [], 0
    for group in svg.iter(f"{NAMESPACE}g"):
        animation = group.find(f"{NAMESPACE}animate")
        if animation is not None:
            times = [float(time) for time in animation.attrib["keyTimes"].split(";")]
            values = animation.attrib["values"].split(";")
            assert times[0] == 0
            assert times == sorted(set(times))
            if [value for time, value in zip(times, values, strict=True) if time <= moment][-1] == "hidden":
                continue
        num_boxes += len(group.findall(f"{NAMESPACE}rect"))
        shown += [(float(t.attrib["y"]), float(t.attrib["x"]), t.text) for t in group.iter(f"{NAMESPACE}text")]
    return "".join(str(text) for _, _, text in sorted(shown)).replace(" ", ""), num_boxes


def test_an_svg_shows_each_step_in_its_time_and_needs_nothing_else(tmp_path: Path) -> None:
    with Recording(tmp_path / "a.svg", TOKENIZER) as recorder:
        play(recorder)
    assert len(recorder.frames) == 5
    source = (tmp_path / "a.svg").read_text()
    assert "script" not in source
    assert source.count("http") == 1
    svg = ElementTree.fromstring(source)
    pieces = [TOKENIZER.decode([token]) for token in IDS]
    step = 0.35 / (4 * 0.35 + 2.5)
    for frame in range(5):
        still_open = {2 + offset for offset in ORDER[frame:]}
        wanted = "".join(piece for i, piece in enumerate(pieces) if i not in still_open)
        assert texts_at(svg, (frame + 0.5) * step) == ("".join(wanted.split()), len(still_open))
    assert texts_at(svg, 0.999) == ("".join(TEXT.split()), 0)
    for number, offset in enumerate(ORDER):
        is_drawn = bool(pieces[2 + offset].strip())
        assert is_drawn == ("#{:02x}{:02x}{:02x}".format(*colour_of_step(number)) in source)


def test_a_gif_has_a_frame_for_each_step_and_rests_on_the_last(tmp_path: Path) -> None:
    with Recording(tmp_path / "a.GIF", TOKENIZER, num_columns=20) as recorder:
        play(recorder)
    with Image.open(tmp_path / "a.GIF") as image:
        assert image.info["loop"] == 0
        frames = [(frame.info["duration"], frame.convert("RGB").tobytes()) for frame in ImageSequence.Iterator(image)]
    assert [duration for duration, _ in frames] == [350] * 4 + [2500]
    assert len({pixels for _, pixels in frames}) == 5


def test_a_token_that_is_revised_is_shown_in_the_place_of_the_last_one() -> None:
    page = Page.of((Cell("ab", None), Cell("\n  c", 0), Cell("de", 1)), 3)
    assert [[(run.line, run.column, run.text) for run in own] for own in page.runs] == [
        [(0, 0, "ab")],
        [(0, 2, " "), (1, 0, "  c")],
        [(2, 0, "de")],
    ]
    assert [run.text for run in page.shown(1, "longer")] == ["l", "ong"]
    assert [run.text for run in page.shown(2, "x")] == ["x "]


def test_an_error_leaves_no_file_and_remasked_positions_are_boxes_again(tmp_path: Path) -> None:
    recorder = Recording(tmp_path / "a.svg", TOKENIZER)
    play(recorder)
    with pytest.raises(KeyboardInterrupt), recorder:
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with Recording(tmp_path / "b.svg", TOKENIZER) as recorder:
        row = Row((IDS[:2], IDS[4:]), (2,), "the row")
        recorder(Progress(0, 0, [2], IDS[2:3], row=row))
        recorder(Progress(0, 1, [3], IDS[3:4], reopened=[2]))
    assert [[cell.text is None for cell in frame[2:4]] for frame in recorder.frames] == [
        [True, True],
        [False, True],
        [True, False],
    ]


def test_models_of_both_layouts_are_recorded_to_their_last_token(tmp_path: Path) -> None:
    for facts in ({}, {"layout": "block", "block_size": 4, "shift": 0}):
        model = converted(**facts)
        with Recording(tmp_path / "a.svg", model.tokenizer) as recorder:
            written = generate(model, "def f(", max_new_tokens=10, num_steps=3, on_step=recorder)
        assert len(recorder.frames) == written.num_forwards + 1
        last = [cell.step for cell in recorder.frames[-1]]
        assert last[-10:][: len(written.ids)] == written.step_of_token
        assert all(cell.text is None for cell in recorder.frames[0][-10:])


@pytest.mark.parametrize(
    "verb", [["generate", "none", "a"], ["infill", "none", "--text", "a{gap}b"], ["edit", "none", "a"]]
)
def test_a_recording_that_cannot_be_made_is_refused_before_the_model_is_looked_for(
    verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*verb, "--record", "a.png"]) == 2
    assert "neither: give it one of these suffixes" in capsys.readouterr().err
    assert main([*verb, "--record", str(tmp_path / "no" / "a.svg")]) == 2
    assert "no directory" in capsys.readouterr().err
    assert main(["generate", "none", "a", "b", "--record", "a.svg"]) == 2
    assert "2 are given: give one" in capsys.readouterr().err
    with pytest.raises(UserError, match="neither"):
        Recording("a", TOKENIZER)
