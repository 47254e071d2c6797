"""The findings of a comparison: tokens to reach the reference's best, and what parallel decoding costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev

from decausal.compare.records import Measurement, Score
from decausal.compare.settings import SPECULATIVE, STATIC, Schedule
from decausal.compare.training import RunResult
from decausal.reporting import share_of_the_way
from decausal.wording import quantity

SHARES = (0.5, 0.8, 0.9, 0.97)
"""Shares of the AR model's accuracy that serve as milestones."""


@dataclass(frozen=True)
class Spread:
    """A mean over seeds, and the deviation over seeds (None for one seed)."""

    mean: float
    deviation: float | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(fmean(values), stdev(values) if len(values) > 1 else None, tuple(map(float, values)))

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.deviation is None else f"{self.mean:.3f} ± {self.deviation:.3f}"


@dataclass(frozen=True)
class Curve:
    """A run's quality under one schedule, by the tokens it had trained on."""

    tokens: tuple[float, ...]
    quality: tuple[float, ...]

    @classmethod
    def of(cls, measurements: Sequence[Measurement], threshold: Schedule, counted: str) -> Curve:
        """Takes the points at which `threshold` was measured. `counted` names the kind of tokens."""
        scored = [(found, found.score(threshold)) for found in measurements]
        points = [(float(getattr(found.tokens, counted)), score.quality) for found, score in scored if score]
        return cls(tuple(tokens for tokens, _ in points), tuple(quality for _, quality in points))

    def best(self, *, higher_is_better: bool) -> tuple[float, float]:
        """Returns the best quality after the start of training, and the tokens at which it was first reached."""
        trained = [point for point in zip(self.tokens, self.quality, strict=True) if point[0] > 0]
        sign = -1 if higher_is_better else 1
        tokens, quality = min(trained, key=lambda point: sign * point[1])
        return quality, tokens

    def tokens_to(self, target: float, *, higher_is_better: bool) -> float | None:
        """Returns where the line through the measurements, from the start on, reaches `target`, or None."""
        sign = 1 if higher_is_better else -1
        points = list(zip(self.tokens, self.quality, strict=True))
        for before, now in pairwise(points):
            if sign * now[1] >= sign * target:
                share = share_of_the_way(before[1], now[1], target)
                return before[0] + share * (now[0] - before[0])
        return None


@dataclass(frozen=True)
class Reaching:
    """Tokens that an arm needed to reach the reference's best quality, seed by seed.

    Attributes:
        arm, reference: Names of the two arms.
        seeds: The seeds that both have.
        starts: The quality before training.
        targets: The reference's best quality.
        reference_tokens: The tokens at which the reference first reached it.
        arm_tokens: The tokens at which the arm reached it; None if it never did.
    """

    arm: str
    reference: str
    seeds: tuple[int, ...]
    starts: tuple[float, ...]
    targets: tuple[float, ...]
    reference_tokens: tuple[float, ...]
    arm_tokens: tuple[float | None, ...]

    @property
    def ratios(self) -> tuple[float | None, ...]:
        """The arm's tokens divided by the reference's."""
        return tuple(
            None if own is None else own / of_reference
            for own, of_reference in zip(self.arm_tokens, self.reference_tokens, strict=True)
        )

    @property
    def mean_ratio(self) -> float | None:
        """The geometric mean over seeds; None unless the arm reached it with every seed."""
        ratios = [ratio for ratio in self.ratios if ratio is not None]
        if len(ratios) < len(self.seeds) or min(ratios) <= 0:
            return None
        return math.exp(fmean(math.log(ratio) for ratio in ratios))

    def sentence(self, unit: str) -> str:
        """Returns the finding in words."""
        best, when = fmean(self.targets), fmean(self.reference_tokens)
        start = (
            f"{self.reference}'s best {unit} was {best:.3f} (mean over {quantity(len(self.seeds), 'seed')}), first at "
            f"{when:,.0f} training tokens"
        )
        if self.starts == self.targets:
            return f"{start}: no better than before any training, so there is nothing for {self.arm} to reach."
        start += "."
        reached = [tokens for tokens in self.arm_tokens if tokens is not None]
        if not reached:
            return f"{start} {self.arm} did not reach it with any seed."
        by_seed = ", ".join("never" if ratio is None else f"{ratio:.2f}" for ratio in self.ratios)
        if self.mean_ratio is None:
            return (
                f"{start} {self.arm} reached it with {len(reached)} of {quantity(len(self.seeds), 'seed')}; its "
                f"tokens over the reference's, by seed: {by_seed}."
            )
        return (
            f"{start} {self.arm} reached it at {fmean(reached):,.0f}: {self.mean_ratio:.2f} times the tokens "
            f"(geometric mean; by seed {by_seed})."
        )


@dataclass(frozen=True)
class ParallelLoss:
    """What an arm loses at the end if decoded in parallel instead of one token per forward.

    Attributes:
        arm: Its name.
        threshold: The parallel schedule.
        lost: The accuracy of the static schedule minus that of the parallel one, seed by seed.
        standard_error: Standard error over prompts of the mean over seeds, pair by pair; None for fewer than two
            prompts.
        tokens_per_forward: Tokens per forward under that schedule, the mean over seeds.
    """

    arm: str
    threshold: float | str
    lost: Spread
    standard_error: float | None
    tokens_per_forward: float

    @property
    def schedule(self) -> str:
        """The parallel schedule in words."""
        return "self-speculation" if self.threshold == SPECULATIVE else f"threshold {self.threshold:g}"

    def sentence(self) -> str:
        error = "" if self.standard_error is None else f", standard error over prompts {self.standard_error:.3f}"
        way = "loses" if self.lost.mean >= 0 else "gains"
        by_seed = ", ".join(f"{value:+.3f}" for value in self.lost.values)
        return (
            f"{self.arm} {way} {abs(self.lost.mean):.3f} of accuracy from one token per forward to "
            f"{self.schedule}, at {self.tokens_per_forward:.2f} tokens per forward (lost by seed {by_seed}{error})."
        )


@dataclass(frozen=True)
class ArmSummary:
    """An arm over its seeds: its final quality under each schedule, and what it used."""

    arm: str
    tokens: dict[str, Spread]
    steps: Spread
    seconds: Spread
    final: tuple[tuple[Schedule, Spread, Spread | None], ...]  # threshold, quality, tokens per forward

    @classmethod
    def of(cls, results: Sequence[RunResult]) -> ArmSummary:
        last = [result.measurements[-1] for result in results]
        names = ("clean", "supervised", "generated", "total")
        final = []
        for threshold in (score.threshold for score in results[0].final):
            scores = [score for result in results if (score := result.final_score(threshold)) is not None]
            speeds = [score.tokens_per_forward for score in scores if score.tokens_per_forward is not None]
            final.append(
                (threshold, Spread.of([score.quality for score in scores]), Spread.of(speeds) if speeds else None)
            )
        return cls(
            results[0].arm,
            {name: Spread.of([float(getattr(found.tokens, name)) for found in last]) for name in names},
            Spread.of([float(found.step) for found in last]),
            Spread.of([found.seconds for found in last]),
            tuple(final),
        )


def reaching(
    results: Sequence[RunResult], reference: str, threshold: Schedule, counted: str, *, higher_is_better: bool
) -> list[Reaching]:
    """Returns, for each arm except the reference, the tokens to the reference's best over the common seeds."""
    curves = {(result.arm, result.seed): Curve.of(result.measurements, threshold, counted) for result in results}
    found = []
    for arm in dict.fromkeys(result.arm for result in results):
        seeds = [seed for name, seed in curves if name == arm and (reference, seed) in curves]
        if arm == reference or not seeds:
            continue
        best = [curves[reference, seed].best(higher_is_better=higher_is_better) for seed in seeds]
        own = [
            curves[arm, seed].tokens_to(target, higher_is_better=higher_is_better)
            for seed, (target, _) in zip(seeds, best, strict=True)
        ]
        found.append(
            Reaching(
                arm,
                reference,
                tuple(seeds),
                tuple(curves[reference, seed].quality[0] for seed in seeds),
                tuple(target for target, _ in best),
                tuple(tokens for _, tokens in best),
                tuple(own),
            )
        )
    return found


def parallel_losses(results: Sequence[RunResult]) -> list[ParallelLoss]:
    """Returns what each arm loses under each schedule except the static one, where both were measured."""
    found = []
    for arm in dict.fromkeys(result.arm for result in results):
        of_arm = [result for result in results if result.arm == arm]
        for threshold in (score.threshold for score in of_arm[0].final):
            pairs = [(result.final_score(STATIC), result.final_score(threshold)) for result in of_arm]
            pairs = [(static, other) for static, other in pairs if static is not None and other is not None]
            if threshold is None or threshold == STATIC or not pairs:
                continue
            found.append(
                ParallelLoss(
                    arm,
                    threshold,
                    Spread.of([static.quality - other.quality for static, other in pairs]),
                    _paired_error(pairs),
                    fmean(other.tokens_per_forward or 0.0 for _, other in pairs),
                )
            )
    return found


def _paired_error(pairs: Sequence[tuple[Score, Score]]) -> float | None:
    """Returns the standard error over prompts of the mean difference. A prompt's difference is its mean over seeds."""
    by_seed = [
        [int(before) - int(after) for before, after in zip(static.right, other.right, strict=True)]
        for static, other in pairs
    ]
    by_prompt = [fmean(differences) for differences in zip(*by_seed, strict=True)]
    return stdev(by_prompt) / math.sqrt(len(by_prompt)) if len(by_prompt) > 1 else None


@dataclass(frozen=True)
class Milestone:
    """Tokens to a share of the AR model's quality, by seed; None if a seed never reached it."""

    arm: str
    share: float
    tokens: tuple[float | None, ...]


def milestones(
    results: Sequence[RunResult], ar: Score, threshold: Schedule, counted: str, shares: Sequence[float] = SHARES
) -> list[Milestone]:
    """Returns the tokens that each arm needed to shares of the AR model's accuracy."""
    found = []
    for arm in dict.fromkeys(result.arm for result in results):
        curves = [Curve.of(result.measurements, threshold, counted) for result in results if result.arm == arm]
        for share in shares:
            reached = tuple(curve.tokens_to(share * ar.quality, higher_is_better=True) for curve in curves)
            found.append(Milestone(arm, share, reached))
    return found


def ar_name(ar: Score) -> str:
    """Returns how a table names the AR model's figure: of a text it is no bound, as the arms' NELBO is."""
    return "AR model (exact likelihood)" if ar.threshold is None else "AR model"


def ending_sentence(arm: ArmSummary, ar: Score, unit: str) -> str:
    """Returns how near an arm ends to the AR model, under each schedule."""
    parts = []
    for threshold, quality, speed in arm.final:
        share = f", {quality.mean / ar.quality:.1%} of the AR model's" if ar.quality > 0 else ""
        share += " exact likelihood" if share and threshold is None else ""
        at = "" if threshold is None or speed is None else f" at {speed.mean:.2f} tokens per forward"
        how = " by self-speculation" if threshold == SPECULATIVE else ""
        parts.append(f"{quality.mean:.3f}{share}{at}{how}")
    return f"{arm.arm} ends with {unit} {'; '.join(parts)}."
