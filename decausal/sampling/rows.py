"""The row to be written: given tokens with gaps between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice, zip_longest
from typing import Any

from decausal.errors import UserError
from decausal.models.architecture import context_length
from decausal.models.checkpoint import Converted
from decausal.sampling.borders import Border
from decausal.wording import quantity


@dataclass(frozen=True)
class Row:
    """Given tokens, a gap, given tokens, a gap, ..., given tokens.

    Attributes:
        given: Ids before, between and after the gaps: one more list than gaps.
        gaps: Open positions of each gap.
        name: What error messages call it.
        borders: The border of each gap; empty if no token crosses one.
    """

    given: tuple[list[int], ...]
    gaps: tuple[int, ...]
    name: str
    borders: tuple[Border, ...] = ()

    @classmethod
    def opened(cls, ids: Sequence[int], positions: Sequence[int], name: str) -> Row:
        """Returns a row in which some positions, in ascending order, are opened again."""
        given: list[list[int]] = [[]]
        gaps: list[int] = []
        is_open = set(positions)
        for position, token in enumerate(ids):
            if position not in is_open:
                given[-1].append(token)
            elif gaps and not given[-1]:
                gaps[-1] += 1
            else:
                gaps.append(1)
                given.append([])
        return cls(tuple(given), tuple(gaps), name)

    @property
    def length(self) -> int:
        return sum(map(len, self.given)) + sum(self.gaps)

    @property
    def has_borders(self) -> bool:
        """Whether a token of a gap holds given characters."""
        return any(border != Border() for border in self.borders)

    def spans(self) -> list[range]:
        """Returns the positions of each gap."""
        sizes = [len(self.given[0]), *chain(*zip(self.gaps, map(len, self.given[1:]), strict=True))]
        ends = list(accumulate(sizes))
        return [range(start, start + gap) for start, gap in zip(ends[::2], self.gaps, strict=False)]

    def ids(self, fill: int) -> list[int]:
        """Returns the whole row, with `fill` in the gaps."""
        pieces = zip_longest(self.given, ([fill] * gap for gap in self.gaps), fillvalue=[])
        return list(chain(*chain(*pieces)))

    def filled(self, new: Sequence[int]) -> list[int]:
        """Returns the whole row, with `new` in the gaps."""
        ids, written = self.ids(-1), iter(new)
        for span in self.spans():
            ids[span.start : span.stop] = [next(written) for _ in span]
        return ids

    def by_gap(self, values: Sequence[Any]) -> list[list[Any]]:
        """Divides values, one for each open position in order, among the gaps."""
        each = iter(values)
        return [list(islice(each, gap)) for gap in self.gaps]

    def check(self, converted: Converted) -> None:
        """Refuses a row that the model cannot read."""
        mask_token_id = converted.facts.mask_token_id
        if any(mask_token_id in ids for ids in self.given):
            token = converted.tokenizer.convert_ids_to_tokens(mask_token_id)
            raise UserError(
                f"{self.name} holds the mask token {token!r} (id {mask_token_id}), which stands for "
                "open positions: take it out, and use infill to fill a gap"
            )
        context = context_length(converted.model.config)
        if context is None or self.length <= context:
            return
        given = sum(map(len, self.given))
        if given > context:
            raise UserError(f"{self.name} has {quantity(given, 'token')}, the model's context {context}: shorten it")
        raise UserError(
            f"{self.name} has {quantity(given, 'token')} and {self.length - given} are to be written: "
            f"{self.length} exceed the model's context of {context}; write at most {context - given}, or shorten it"
        )
