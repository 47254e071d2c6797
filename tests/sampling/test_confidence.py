"""Confidence against definitions written out in fp64."""

from __future__ import annotations

import pytest
import torch

from decausal.sampling.confidence import CONFIDENCES, confidence

LOGITS = torch.randn(64, 17, generator=torch.Generator().manual_seed(1)) * 3
PROBABILITIES = LOGITS.double().softmax(-1)
GREEDY = LOGITS.argmax(-1)
ANY = torch.arange(64) % 17


def test_probability_is_the_softmax_of_the_token() -> None:
    expected = PROBABILITIES[torch.arange(64), ANY]
    torch.testing.assert_close(confidence(LOGITS, ANY, "probability").double(), expected, rtol=1e-5, atol=1e-7)


def test_margin_of_the_most_probable_token_is_first_minus_second() -> None:
    first, second = PROBABILITIES.topk(2).values.unbind(-1)
    torch.testing.assert_close(confidence(LOGITS, GREEDY, "margin").double(), first - second, rtol=1e-5, atol=1e-6)


def test_margin_of_any_other_token_is_negative() -> None:
    is_other = ANY != GREEDY
    assert (confidence(LOGITS, ANY, "margin")[is_other] < 0).all()


def test_entropy_of_the_most_probable_token_is_the_exponential_of_negative_entropy() -> None:
    entropy = -(PROBABILITIES * PROBABILITIES.log()).sum(-1)
    torch.testing.assert_close(confidence(LOGITS, GREEDY, "entropy").double(), (-entropy).exp(), rtol=1e-5, atol=1e-7)


def test_entropy_confidence_never_exceeds_the_probability_of_the_token() -> None:
    assert (confidence(LOGITS, ANY, "entropy") <= confidence(LOGITS, ANY, "probability")).all()


@pytest.mark.parametrize("kind", CONFIDENCES)
def test_certainty_is_one_and_banned_tokens_do_not_count(kind: str) -> None:
    logits = torch.full((1, 5), -torch.inf)
    logits[0, 3] = 2.0
    assert confidence(logits, torch.tensor([3]), kind).item() == 1.0


@pytest.mark.parametrize(("kind", "value"), [("probability", 0.25), ("margin", 0.0), ("entropy", 0.25)])
def test_uniform_over_four(kind: str, value: float) -> None:
    assert confidence(torch.zeros(1, 4), torch.tensor([2]), kind).item() == pytest.approx(value, abs=1e-6)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="margin"):
        confidence(LOGITS, ANY, "certainty")
