"""Writes the texts that the harness asks for, with the engine for the model."""

from __future__ import annotations

import json
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from decausal.errors import UserError
from decausal.evaluation.continuations.scored import in_parts
from decausal.models.checkpoint import Converted
from decausal.sampling.engines import engine_for
from decausal.sampling.filling.infilling import fill
from decausal.sampling.jobs import Job, run
from decausal.sampling.rows import Row
from decausal.sampling.settings import SamplerSettings
from decausal.sampling.settings.of_model import settings_for
from decausal.sampling.stopping import end_token_ids, text_before_stop
from decausal.sampling.texts import ids_after

Request = tuple[str, dict[str, Any]]
HONOURED = ("until", "do_sample", "temperature", "top_k", "top_p", "min_p", "max_gen_toks", "seed", "infill")


@dataclass
class Spent:
    """What texts took so far.

    Attributes:
        num_tokens: New tokens, end tokens included.
        num_forwards: Forward passes; each text counts those that it took part in.
        seconds: Time of writing.
    """

    num_tokens: int = 0
    num_forwards: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any] | None:
        """Returns the figures and their ratios; None if nothing was written."""
        if not self.num_tokens:
            return None
        return asdict(self) | {
            "tokens_per_forward": self.num_tokens / max(self.num_forwards, 1),
            "tokens_per_second": self.num_tokens / self.seconds,
        }


class Writer:
    """Continues contexts. The model's sampler settings hold unless the harness's `gen_kwargs` replace them.

    Args:
        converted: Model, tokenizer and facts.
        max_rows: Rows in one forward pass.
        options: `SamplerSettings` by name, which override the facts'.

    Attributes:
        spent: Tokens, passes and seconds of all texts so far.

    Raises:
        UserError: A bad setting.
    """

    def __init__(self, converted: Converted, max_rows: int, options: dict[str, Any]) -> None:
        self._converted, self._max_rows = converted, max_rows
        self._settings = settings_for(converted.facts, **options)
        self._options = {name: value for name, value in options.items() if name != "seed"}
        self.spent = Spent()

    def settings_by_name(self) -> dict[str, Any]:
        """Returns the settings that differ from the defaults of all models."""
        plain = asdict(SamplerSettings())
        return {name: value for name, value in asdict(self._settings).items() if value != plain[name]}

    def write(
        self, requests: Sequence[Request], context_ids: Callable[[str, int], list[int]], default_length: int
    ) -> Iterator[tuple[int, str]]:
        """Yields (index, text) of each request as it ends.

        Args:
            requests: Contexts with the harness's `gen_kwargs`.
            context_ids: Returns a context's tokens, with room for the given number of new ones.
            default_length: New tokens for requests without a number.

        Raises:
            UserError: A key of `gen_kwargs` is not supported.
        """
        holes = [index for index, (_, gen_kwargs) in enumerate(requests) if "infill" in gen_kwargs]
        yield from self._fill(holes, requests, default_length)
        seen: Counter[str] = Counter()
        jobs, numbers = [], []
        for index, (context, gen_kwargs) in enumerate(requests):
            if "infill" in gen_kwargs:
                continue
            numbers.append(index)
            settings = self._asked(gen_kwargs, default_length)
            # A function of the text and of how often it was requested, so that a resumed run draws the same.
            seed = settings.seed + zlib.crc32(context.encode("utf-8", "surrogatepass")) + seen[context]
            seen[context] += 1
            ids = context_ids(context, settings.max_new_tokens)
            row = Row((ids, []), (settings.max_new_tokens,), f"request {index + 1}")
            row.check(self._converted)
            jobs.append(Job(row, settings, seed, end_token_ids(self._converted)))
        if not jobs:
            return
        engine, start = self._engine(jobs), time.perf_counter()
        for index, ended in run(engine, jobs):
            job = jobs[index]
            self._count(len(ended.ids), ended.num_forwards, time.perf_counter() - start)
            yield numbers[index], text_before_stop(self._converted.tokenizer, job.row.given[0], ended.ids, job.settings)
            start = time.perf_counter()  # the caller's time does not count

    def _count(self, num_tokens: int, num_forwards: int, seconds: float) -> None:
        self.spent.num_tokens += num_tokens
        self.spent.num_forwards += num_forwards
        self.spent.seconds += seconds

    def _fill(
        self, holes: Sequence[int], requests: Sequence[Request], default_length: int
    ) -> Iterator[tuple[int, str]]:
        """Yields (index, text) of requests with text after a hole."""
        by_options: dict[str, list[int]] = defaultdict(list)
        for index in holes:
            before, gen_kwargs = requests[index]
            asked = {name: value for name, value in gen_kwargs.items() if name not in ("infill", "until")}
            options = self._hole_options(asked, default_length)
            if options.get("temperature"):  # each text has its own batch, so that its draws depend on the text only
                options["seed"] += zlib.crc32(before.encode("utf-8", "surrogatepass"))
            by_options[json.dumps(options, sort_keys=True)].append(index)
        for options, members in by_options.items():
            for part in in_parts(members, self._max_rows):
                texts = [self._with_hole(*requests[index]) for index in part]
                start = time.perf_counter()
                found = fill(self._converted, texts, batch_size=self._max_rows, **json.loads(options))
                seconds = (time.perf_counter() - start) / len(found)
                for filling in found:
                    self._count(sum(map(len, filling.ids)), filling.num_forwards, seconds)
                yield from ((index, filling.texts[0]) for index, filling in zip(part, found, strict=True))

    def _hole_options(self, gen_kwargs: dict[str, Any], default_length: int) -> dict[str, Any]:
        settings = self._asked(gen_kwargs, default_length)
        asked = {name: getattr(settings, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        given = {name: value for name, value in asked.items() if value}
        return {**self._options, **given, "max_gap": settings.max_new_tokens, "seed": settings.seed}

    def _with_hole(self, before: str, gen_kwargs: dict[str, Any]) -> list[str | int | None]:
        as_long_as = gen_kwargs["infill"]["as_long_as"]
        length = None if as_long_as is None else max(1, len(ids_after(self._converted.tokenizer, as_long_as)))
        return [before, length, gen_kwargs["infill"]["suffix"]]

    def _engine(self, jobs: Sequence[Job]) -> Any:
        block_size = self._converted.facts.block_size or 1
        longest = max(job.row.length for job in jobs)
        return engine_for(
            self._converted,
            max_rows=min(self._max_rows, len(jobs)),
            max_length=-(-longest // block_size) * block_size,
            is_autoregressive=self._converted.facts.layout == "causal",
        )

    def _asked(self, gen_kwargs: dict[str, Any], default_length: int) -> SamplerSettings:
        if unknown := sorted(set(gen_kwargs) - {*HONOURED, *_LENGTHS}):
            raise UserError(
                f"gen_kwargs holds '{unknown[0]}', which a converted model does not support; accepted: "
                f"{', '.join(HONOURED)}. Sampler settings are the model's: --model_args pretrained=DIR,threshold=0.9"
            )
        asked = normalize_gen_kwargs(gen_kwargs, default_length)
        options = {name: asked[name] for name in ("top_k", "top_p", "min_p", "seed") if asked.get(name) is not None}
        if asked["do_sample"]:
            options["temperature"] = asked["temperature"] or 1.0
        elif "temperature" in gen_kwargs or "do_sample" in gen_kwargs:
            options["temperature"] = 0.0
        until = asked.get("until") or []
        stop = [text for text in ([until] if isinstance(until, str) else until) if text]
        return self._settings.updated(max_new_tokens=int(asked["max_gen_toks"]), stop=stop, **options)


_LENGTHS = ("max_new_tokens", "max_tokens", "max_completion_tokens")
