"""Draft shapes as data: how many tokens a pass of verified decoding drafts after each number of right drafts.

A pass reads a row's last known token and its d pending drafts. If j of these turn out right, the model itself adds a
token after them. Group j, g_j masks that the same pass read after j drafts, has drafted the tokens after that. A shape
gives g_0 to g_d for every d. All shapes write the same text. They differ in queries and tokens per pass.

Acceptances a_1, a_2, ... are the probabilities that draft i is right if those before it are; A_k = a_1 ... a_k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

import numpy as np

_ALMOST_ALL = 1 - 1e-7
"""The chain restarts with a small probability after each pass, so that its long-run shares solve one linear system."""
_MOST_IMPROVEMENTS = 20


@dataclass(frozen=True)
class DraftShape:
    """The groups of masks of each pass.

    Attributes:
        name: Its name in reports.
        groups: For d = 0, 1, ... pending drafts, the d + 1 lengths of the groups after 0 to d of them.
        takes_turns: Whether rows draft only while no row of the pass verifies, so that no pass has to be wide enough
            for both.

    Raises:
        ValueError: There are not d + 1 lengths for d drafts, or a group is longer than what can be pending.
    """

    name: str
    groups: tuple[tuple[int, ...], ...]
    takes_turns: bool = False

    def __post_init__(self) -> None:
        if any(len(lengths) != d + 1 for d, lengths in enumerate(self.groups)):
            raise ValueError(f"{self.groups}: d drafts have d + 1 groups")
        if self.longest_group > self.most_pending:
            raise ValueError(f"{self.groups}: {self.longest_group} drafts are more than can be verified")

    @property
    def most_pending(self) -> int:
        """The most drafts that a pass verifies."""
        return len(self.groups) - 1

    @property
    def longest_group(self) -> int:
        """The most tokens drafted at once."""
        return max(map(max, self.groups))

    def num_masks(self, num_pending: int, shift: int = 1) -> int:
        """Returns the masks that a row with so many drafts reads. Under shift 0, a group of g tokens takes g + 1."""
        return sum(length + 1 - shift for length in self.groups[num_pending] if length)

    def num_queries(self, num_pending: int, shift: int = 1) -> int:
        """Returns the queries of a row: the last known token, the drafts, and all masks."""
        return 1 + num_pending + self.num_masks(num_pending, shift)


def autoregressive() -> DraftShape:
    """Returns the shape without drafts: one token with every pass."""
    return DraftShape("autoregressive", ((0,),))


def quadratic(m: int) -> DraftShape:
    """Returns the shape with m masks after every number of right drafts: each pass verifies m drafts and makes m new
    ones."""
    return _named("quadratic", m, tuple((m,) * (d + 1) for d in range(m + 1)))


def strided(m: int) -> DraftShape:
    """Returns the shape with m masks only after all drafts: after a refusal a pass only drafts. Source: I-DLM (arXiv
    2604.11035)."""
    return _named("strided", m, tuple((0,) * d + (m,) for d in range(m + 1)))


def linear(m: int) -> DraftShape:
    """Returns the shape in which one pass drafts and the next one verifies. Source: Orthrus (arXiv 2605.12825)."""
    return _named("linear", m, tuple((0,) * d + (m if d == 0 else 0,) for d in range(m + 1)), takes_turns=True)


def _named(name: str, m: int, groups: tuple[tuple[int, ...], ...], takes_turns: bool = False) -> DraftShape:
    return DraftShape(f"{name} {m}", groups, takes_turns) if m else autoregressive()


def ragged(acceptances: Sequence[float], budget: int, shift: int = 1) -> DraftShape:
    """Returns the shape with the most tokens per pass, if no pass has more than `budget` queries.

    The number of pending drafts is the state of a chain, and the groups are its actions. Policy iteration finds the
    groups with the highest mean reward, and a knapsack distributes each state's masks.

    Args:
        acceptances: a_1 to a_m; m bounds the groups.
        budget: Queries of a row, at least 1.
        shift: The model's shift."""
    most = min(len(acceptances), budget - 1)
    if most < 1:
        return autoregressive()
    reached = _reached(acceptances)[: most + 1]
    worth = np.zeros(most + 1)
    groups: list[tuple[int, ...]] = []
    for _ in range(_MOST_IMPROVEMENTS):
        better = _best_groups(reached, worth, budget, shift)
        if better == groups:
            break
        groups = better
        moves = _moves(groups, reached)
        worth = np.linalg.solve(np.eye(most + 1) - _ALMOST_ALL * moves, np.cumsum(reached))
        worth -= worth[0]
    return DraftShape(f"ragged {budget}", tuple(groups))


def _best_groups(reached: np.ndarray, worth: np.ndarray, budget: int, shift: int) -> list[tuple[int, ...]]:
    """Returns, for each number of pending drafts, the lengths with the highest expected value.

    Args:
        reached: A_0 to A_m.
        worth: The value of having 0 to m pending drafts.
        budget: Queries of a row.
        shift: The model's shift."""
    costs = np.arange(len(worth)) + (1 - shift) * (np.arange(len(worth)) > 0)
    left = np.arange(budget + 1) - costs[:, None]  # by a group's length and the number of masks

    def dealt(before: np.ndarray, chance: float) -> tuple[np.ndarray, np.ndarray]:
        """Returns the best value with one more group and at most so many masks, and that group's length."""
        options = np.where(left >= 0, before[left.clip(0)] + chance * worth[:, None], -np.inf)
        return options.max(0), options.argmax(0)

    groups, inner = [], []
    before = np.zeros(budget + 1)
    for d in range(len(worth)):
        num_masks = budget - 1 - d
        lengths = [int(dealt(before, reached[d])[1][num_masks])]
        for length_of in reversed(inner):
            num_masks -= costs[lengths[-1]]
            lengths.append(int(length_of[num_masks]))
        groups.append(tuple(reversed(lengths)))
        if d + 1 < len(worth):
            before, length_of_group = dealt(before, reached[d] - reached[d + 1])
            inner.append(length_of_group)
    return groups


def _reached(acceptances: Sequence[float]) -> np.ndarray:
    """A_0 to A_m."""
    return np.array(list(accumulate(acceptances, mul, initial=1.0)))


def _moves(groups: Sequence[Sequence[int]], reached: np.ndarray) -> np.ndarray:
    """Returns the probabilities with which a row goes from d pending drafts to other numbers."""
    moves = np.zeros((len(groups), len(groups)))
    for d, lengths in enumerate(groups):
        chances = [*(reached[:d] - reached[1 : d + 1]), reached[d]]  # of exactly 0 to d right drafts
        np.add.at(moves[d], list(lengths), chances)
    return moves


def shares_of_pending(shape: DraftShape, acceptances: Sequence[float]) -> list[float]:
    """Returns the long-run shares of passes that begin with 0, 1, ... pending drafts."""
    size = shape.most_pending + 1
    moves = _moves(shape.groups, _reached(acceptances[: shape.most_pending]))
    first = (1 - _ALMOST_ALL) * np.eye(size)[0]
    return np.linalg.solve(np.eye(size) - _ALMOST_ALL * moves.T, first).tolist()


def tokens_per_pass(shape: DraftShape, acceptances: Sequence[float], shares: Sequence[float] | None = None) -> float:
    """Returns the long-run mean number of tokens of a pass for a row. `shares` are those of pending drafts."""
    shares = shares_of_pending(shape, acceptances) if shares is None else shares
    return float(np.dot(shares, np.cumsum(_reached(acceptances[: shape.most_pending]))))
