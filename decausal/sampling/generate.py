"""Text to text: generate after a prompt, fill a gap between a prefix and a suffix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from decausal.data.encode import SpecialTokens
from decausal.errors import UserError
from decausal.models.architecture import context_length
from decausal.models.checkpoint import Converted
from decausal.sampling.sampler import OnStep, denoise
from decausal.sampling.settings import SamplerSettings

BATCH_SIZE = 16


@dataclass(frozen=True)
class Generation:
    """What the model wrote.

    Attributes:
        text: The new text alone, special tokens left out.
        full_text: The prompt or prefix, the new text, and the suffix.
        ids: The new tokens, the end token included where the row ended.
        step_of_token: For each of `ids` the step, from 0, in which it was kept.
        num_forwards: Forward passes that this row took part in.
        tokens_per_forward: len(ids) / num_forwards.
    """

    text: str
    full_text: str
    ids: list[int]
    step_of_token: list[int]
    num_forwards: int
    tokens_per_forward: float


def generate(
    converted: Converted,
    prompts: str | Sequence[str],
    *,
    chat: bool = False,
    batch_size: int = BATCH_SIZE,
    on_step: OnStep | None = None,
    **options: Any,
) -> Generation | list[Generation]:
    """Continues one prompt, or each of several.

    Args:
        converted: Model, tokenizer and facts. The facts' sampler settings are the defaults.
        prompts: Text. An empty prompt starts from the tokenizer's BOS or EOS token.
        chat: Treat each prompt as a user's message and put it through the tokenizer's chat template.
        batch_size: Rows denoised together; it does not change what they become.
        on_step: See `sampler.OnStep`; called for each batch in turn.
        **options: `SamplerSettings` by name, or by the names other samplers use.

    Returns:
        One Generation for one string, a list for a list.

    Raises:
        UserError: A bad setting, a prompt that does not fit or holds the mask token, no chat template, no start token.
    """
    settings = SamplerSettings().updated(**converted.facts.sampler).updated(**options)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    rows = [
        _Row(text, "", _prompt_ids(converted, text, chat), [], settings.max_new_tokens, name)
        for name, text in _named("prompt", texts)
    ]
    generations = _fill(converted, rows, settings, _end_token_ids(converted), batch_size, on_step)
    return generations[0] if isinstance(prompts, str) else generations


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
    rows = [
        _Row(before, after, _prompt_ids(converted, before), _text_ids(converted.tokenizer, after), length, name)
        for (name, before), after in zip(_named("prefix", prefixes), suffixes, strict=True)
    ]
    generations = _fill(converted, rows, settings, (), batch_size, on_step)
    return generations[0] if isinstance(prefix, str) else generations


@dataclass(frozen=True)
class _Row:
    """One row to denoise: given tokens, a gap of `num_open` positions, given tokens."""

    prefix: str
    suffix: str
    prefix_ids: list[int]
    suffix_ids: list[int]
    num_open: int
    name: str

    @property
    def length(self) -> int:
        return len(self.prefix_ids) + self.num_open + len(self.suffix_ids)

    def check(self, converted: Converted) -> None:
        """Refuses a row that the model cannot read."""
        if converted.facts.mask_token_id in (*self.prefix_ids, *self.suffix_ids):
            token = converted.tokenizer.convert_ids_to_tokens(converted.facts.mask_token_id)
            raise UserError(
                f"{self.name} holds the mask token {token!r} (id {converted.facts.mask_token_id}), which stands for "
                "open positions: take it out, and use infill to fill a gap"
            )
        context = context_length(converted.model.config)
        if context is None or self.length <= context:
            return
        given = len(self.prefix_ids) + len(self.suffix_ids)
        if given > context:
            raise UserError(f"{self.name} has {given} tokens, the model's context {context}: shorten it")
        raise UserError(
            f"{self.name} has {given} tokens and {self.num_open} are to be written: {self.length} exceed the model's "
            f"context of {context}; write at most {context - given}, or shorten it"
        )


def _fill(
    converted: Converted,
    rows: list[_Row],
    settings: SamplerSettings,
    end_token_ids: Sequence[int],
    batch_size: int,
    on_step: OnStep | None,
) -> list[Generation]:
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} is not accepted: it must be at least 1")
    for row in rows:
        row.check(converted)
    generations = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        generations += _fill_batch(converted, batch, settings.seed + start, settings, end_token_ids, on_step)
    return generations


def _fill_batch(
    converted: Converted,
    rows: list[_Row],
    first_seed: int,
    settings: SamplerSettings,
    end_token_ids: Sequence[int],
    on_step: OnStep | None,
) -> list[Generation]:
    device = next(converted.model.parameters()).device
    ids, is_open, document_ids = (tensor.to(device) for tensor in _padded(rows, converted.facts.mask_token_id))
    denoised = denoise(
        converted.model,
        converted.facts,
        ids,
        is_open,
        settings,
        document_ids=document_ids,
        row_seeds=first_seed + torch.arange(len(rows), device=device),
        end_token_ids=end_token_ids,
        on_step=on_step,
    )
    columns = (denoised.ids, denoised.step_of_token, denoised.num_forwards, denoised.tokens_per_forward)
    return [
        _generation(converted, row, *values)
        for row, *values in zip(rows, *(column.tolist() for column in columns), strict=True)
    ]


def _padded(rows: list[_Row], mask_token_id: int) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Returns ids, is_open and document_ids (-1 behind the end of a row)."""
    shape = (len(rows), max(row.length for row in rows))
    ids = torch.full(shape, mask_token_id)
    is_open = torch.zeros(shape, dtype=torch.bool)
    document_ids = torch.full(shape, -1)
    for index, row in enumerate(rows):
        gap = slice(len(row.prefix_ids), len(row.prefix_ids) + row.num_open)
        ids[index, : gap.start] = torch.tensor(row.prefix_ids, dtype=torch.long)
        ids[index, gap.stop : row.length] = torch.tensor(row.suffix_ids, dtype=torch.long)
        is_open[index, gap] = True
        document_ids[index, : row.length] = 0
    return ids, is_open, document_ids


def _generation(
    converted: Converted, row: _Row, ids: list[int], steps: list[int], num_forwards: int, tokens_per_forward: float
) -> Generation:
    gap = range(len(row.prefix_ids), len(row.prefix_ids) + row.num_open)
    written = [position for position in gap if steps[position] >= 0]
    new_ids = [ids[position] for position in written]
    text = _text_after(converted.tokenizer, row.prefix_ids, new_ids)
    return Generation(
        text=text,
        full_text=row.prefix + text + row.suffix,
        ids=new_ids,
        step_of_token=[steps[position] for position in written],
        num_forwards=num_forwards,
        tokens_per_forward=tokens_per_forward,
    )


def _text_after(tokenizer: Any, before: list[int], new: list[int]) -> str:
    """Decodes `new` as it reads behind `before`: some tokenizers drop the space in front of a text's first word."""
    whole = tokenizer.decode(before + new, skip_special_tokens=True)
    start = tokenizer.decode(before, skip_special_tokens=True)
    return whole[len(start) :] if whole.startswith(start) else tokenizer.decode(new, skip_special_tokens=True)


def _named(noun: str, texts: list[str]) -> list[tuple[str, str]]:
    """Names texts for error messages: "the prompt", or "prompt 3" of several, counted from 1."""
    if len(texts) == 1:
        return [(f"the {noun}", texts[0])]
    return [(f"{noun} {number}", text) for number, text in enumerate(texts, start=1)]


def _prompt_ids(converted: Converted, text: str, chat: bool = False) -> list[int]:
    tokenizer = converted.tokenizer
    if chat:
        if not tokenizer.chat_template:
            raise UserError("chat=True needs a chat template, and this model's tokenizer has none: leave chat out")
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    # As documents are encoded for training: what the tokenizer puts before a text, never what it puts behind one.
    before = [] if chat else SpecialTokens(tokenizer).prefix
    ids = [*before, *_text_ids(tokenizer, text)]
    if ids:
        return ids
    for start in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if start is not None:
            return [start]
    if converted.facts.shift == 0:
        return []
    raise UserError(
        "the prompt is empty and this model's tokenizer has neither a BOS nor an EOS token to start from: "
        "with shift 1 the first token cannot be predicted, so give some text"
    )


def _text_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _end_token_ids(converted: Converted) -> tuple[int, ...]:
    """The tokenizer's EOS first, then what else the model's generation settings count as an end."""
    generation_config = getattr(converted.model, "generation_config", None)
    listed = getattr(generation_config, "eos_token_id", None)
    ends = [converted.tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])]
    return tuple(dict.fromkeys(end for end in ends if end is not None))
