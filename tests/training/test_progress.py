"""A run says how fast it is and how long it will take."""

from __future__ import annotations

import re

import pytest
import torch

from decausal.training.meters import TokenMeter
from decausal.training.progress import Pace, duration, log_line
from tests.runs import run, save_source, write_text


def test_the_rate_counts_training_alone_and_the_time_left_all():
    now, meter = [0.0], TokenMeter()
    pace = Pace(meter, lambda: now[0])
    pace.begin(10)
    for seconds in (1, 3):
        now[0] += seconds
        meter.add({"clean": torch.tensor(90.0), "generated": torch.tensor(10.0)})
        pace.take_step()
    now[0] += 6  # a measurement
    pace.skip()
    assert pace.tokens_per_second() == pytest.approx(200 / 4)
    assert pace.seconds_left(12, 20) == pytest.approx(10 / 2 * 8)
    now[0] += 1
    meter.add({"clean": torch.tensor(7.0)})
    pace.take_step()
    assert pace.tokens_per_second() == pytest.approx(7)  # since the last reading


@pytest.mark.parametrize(("seconds", "text"), [(0.0, "0:00"), (59.6, "1:00"), (3599.0, "59:59"), (3723.0, "1:02:03")])
def test_durations_read_like_a_clock(seconds, text):
    assert duration(seconds) == text


def test_a_log_is_one_line():
    assert log_line(3, 10, {"loss": 2.34567, "note": "x"}, "5 tokens/s") == "step 3/10  loss 2.346  note x  5 tokens/s"


@pytest.mark.parametrize("is_bar", [False, True], ids=["lines", "bar"])
def test_a_run_shows_each_log_with_tokens_per_second_and_the_time_left(tmp_path, capsys, is_bar):
    source, text = save_source(tmp_path / "model"), write_text(tmp_path / "text.jsonl")
    run(source, text, tmp_path / "out", save_strategy="no", disable_tqdm=not is_bar)
    shown = capsys.readouterr()
    lines = re.findall(r"step (\d)/4  loss .* token_loss .*  [\d,]+ tokens/s, [\d:]+ left", shown.out)
    assert lines == ["1", "2", "3", "4"]
    assert re.search(r"^trained 4 steps in \d+:\d\d$", shown.out, re.MULTILINE)
    assert ("tokens/s" in shown.err) == is_bar
    assert "{'loss'" not in shown.out + shown.err
