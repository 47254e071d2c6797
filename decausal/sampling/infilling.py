"""Fill a gap between a prefix and a suffix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from decausal.errors import UserError
from decausal.models.checkpoint import Converted
from decausal.sampling.generate import Generation, generation
from decausal.sampling.rows import BATCH_SIZE, Row, fill_rows, named, prompt_ids, text_ids
from decausal.sampling.sampler import OnStep
from decausal.sampling.settings import SamplerSettings


def infill(
    converted: Converted,
    prefix: str | Sequence[str],
    suffix: str | Sequence[str],
    length: int,
    *,
    batch_size: int = BATCH_SIZE,
    on_step: OnStep | None = None,
    **options: Any,
) -> Generation | list[Generation]:
    """Writes `length` tokens between a prefix and a suffix, seeing both.

    Args:
        converted: Model, tokenizer and facts.
        prefix: Text before the gap, or one per row. Where it is empty the row starts from BOS or EOS.
        suffix: Text after the gap, as many as prefixes.
        length: Tokens in the gap.
        batch_size: As in `generate`.
        on_step: As in `generate`.
        **options: As in `generate`.

    Returns:
        One Generation for strings, a list for lists.

    Raises:
        UserError: As `generate`; length below 1; a causal layout, under which the gap cannot see the suffix.
    """
    if converted.facts.layout == "causal":
        raise UserError(
            "this model has layout 'causal': a gap cannot see the suffix behind it; infill needs layout 'bidirectional'"
        )
    if isinstance(prefix, str) != isinstance(suffix, str):
        raise UserError("infill needs prefix and suffix both as one string, or both as lists of the same length")
    if not isinstance(length, int) or length < 1:
        raise UserError(f"length={length!r} is not accepted: the gap must be an integer of at least 1 token")
    settings = SamplerSettings().updated(**converted.facts.sampler).updated(**options, max_new_tokens=length)
    prefixes = [prefix] if isinstance(prefix, str) else list(prefix)
    suffixes = [suffix] if isinstance(suffix, str) else list(suffix)
    if len(prefixes) != len(suffixes):
        raise UserError(f"infill got {len(prefixes)} prefixes and {len(suffixes)} suffixes: give as many of each")
    names = named("prefix", prefixes)
    rows = [
        Row((prompt_ids(converted, before), text_ids(converted.tokenizer, after)), (length,), name)
        for name, before, after in zip(names, prefixes, suffixes, strict=True)
    ]
    filled = fill_rows(converted, rows, settings, batch_size=batch_size, on_step=on_step)
    texts = zip(prefixes, suffixes, rows, filled, strict=True)
    generations = [generation(converted, *each) for each in texts]
    return generations[0] if isinstance(prefix, str) else generations
