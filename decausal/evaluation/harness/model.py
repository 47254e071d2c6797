"""A converted model for lm-evaluation-harness."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from decausal.devices import best_device
from decausal.errors import UserError
from decausal.evaluation.continuations.causal import score_causally
from decausal.evaluation.continuations.greedy import written_greedily
from decausal.evaluation.continuations.nelbo import score_by_nelbo
from decausal.evaluation.continuations.scored import Continuation, Scored
from decausal.evaluation.harness import MODEL_NAME
from decausal.evaluation.harness.estimate import Estimate
from decausal.evaluation.harness.generation import Writer
from decausal.evaluation.harness.likelihood_kind import likelihood_kind
from decausal.models.adapt import source_dtype
from decausal.models.architecture import context_length
from decausal.models.checkpoint import Converted, load_converted

log = logging.getLogger(__name__)
NUM_SAMPLES = 8


@register_model(MODEL_NAME)
class DecausalLM(HFLM):
    """A converted model, for `lm_eval --model decausal --model_args pretrained=DIR`.

    Texts become tokens by the code of the harness's own `hf` class, which this one extends. So both models of a
    comparison get the same requests. Scores come from `decausal.evaluation.continuations`, and texts are those of
    `decausal batch`.

    Args:
        pretrained: Directory of a converted model, or its id on the hub; or one that is loaded.
        dtype: "auto" (as the weights are stored), "float32", "bfloat16" or "float16".
        device: None: CUDA where there is one, else the CPU.
        batch_size: Requests in the model at once. It changes the scores only by rounding.
        max_length: Most tokens of a request. None: the model's context.
        revision: Branch, tag or commit on the hub.
        likelihood: "auto", "nelbo" or "causal", see `likelihood_kind`.
        num_samples: Mask patterns of each request, if the likelihood is a NELBO.
        seed: Seed of masks and of sampled texts.
        add_bos_token: As for `hf`.
        prefix_token_id: As for `hf`.
        **sampler: `SamplerSettings` by name, for texts that are written.

    Raises:
        UserError: No such model, a bad value, several processes.
    """

    def __init__(
        self,
        pretrained: str | Converted,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | None = None,
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        revision: str | None = None,
        likelihood: str = "auto",
        num_samples: int = NUM_SAMPLES,
        seed: int = 0,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        **sampler: Any,
    ) -> None:
        _refuse(batch_size, num_samples)
        if isinstance(pretrained, Converted):
            self.converted, pretrained = pretrained, pretrained.facts.source
        else:
            dtype = _dtype(dtype, str(pretrained), revision)
            self.converted = load_converted(pretrained, dtype, device or best_device(), revision)
        model, tokenizer, facts = self.converted
        self.likelihood = likelihood_kind(facts, likelihood)
        self.num_samples, self.seed = num_samples, seed
        self.writer = Writer(self.converted, int(batch_size), {**sampler, "seed": seed})
        logging.getLogger("lm_eval.models.huggingface").addFilter(_is_news)
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=int(batch_size),
            max_length=max_length or context_length(model.config),
            add_bos_token=add_bos_token,
            prefix_token_id=prefix_token_id,
        )
        self.pretrained, self.revision = str(pretrained), revision

    @property
    def max_length(self) -> int:
        """The most tokens of a request before its last one, which a causal model does not read. The harness counts like
        this."""
        return int(super().max_length) - (0 if self.likelihood == "causal" else 1)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """See `hf`. Progress bars only appear in a terminal."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def get_model_info(self) -> dict[str, Any]:
        """Returns what is recorded with the scores: the kind of likelihood and the facts of the model."""
        facts = self.converted.facts
        drawn = {"likelihood_samples": self.num_samples, "likelihood_seed": self.seed}
        return {
            "likelihood": self.likelihood,
            **({} if self.likelihood == "causal" else drawn),
            "layout": facts.layout,
            "block_size": facts.block_size,
            "shift": facts.shift,
            "source": facts.source,
            "sampler": self.writer.settings_by_name(),
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "model_revision": self.revision,
        }

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        asked = [self._fitted(*tokens) for _, *tokens in requests]
        self._tell_of_cuts(requests, asked)
        answers: list[tuple[float, bool] | None] = [None] * len(requests)
        bar = tqdm(total=len(asked), desc=f"Likelihood ({self.likelihood})", disable=disable_tqdm or None)
        for index, scored, is_greedy in self._scored(asked):
            answers[index] = (Estimate(scored.log_likelihood, scored.standard_error), is_greedy)
            texts = requests[index][0]
            if texts is not None:  # windows of a long text have no key: the whole text is cached
                self.cache_hook.add_partial("loglikelihood", texts, answers[index])
            bar.update()
        bar.close()
        return answers  # type: ignore[return-value]

    def _fitted(self, context: list[int], tokens: list[int]) -> Continuation:
        """Returns a request, cut from the left to what the model can read, like `hf`."""
        whole = [*context, *tokens][-(self.max_length + 1) :]
        if len(tokens) >= len(whole) and len(context):
            raise UserError(
                f"a continuation has {len(tokens)} tokens, and the model reads {self.max_length} with what comes "
                "before: raise max_length, or leave this task out"
            )
        return Continuation(whole[: len(whole) - len(tokens)], tokens)

    def _tell_of_cuts(self, requests: Sequence[Any], asked: Sequence[Continuation]) -> None:
        num_cut = sum(len(one.context) < len(context) for one, (_, context, _) in zip(asked, requests, strict=True))
        if num_cut:
            log.warning("%d of %d contexts are cut from the left to fit the model's context", num_cut, len(asked))

    def _scored(self, asked: Sequence[Continuation]) -> Iterator[tuple[int, Scored, bool]]:
        """Yields (index, likelihood, whether greedy decoding writes it) as soon as each is known."""
        if self.likelihood == "causal":
            yield from score_causally(self.converted, asked, batch_size=self.batch_size)
            return
        bounds = score_by_nelbo(
            self.converted, asked, num_samples=self.num_samples, batch_size=self.batch_size, seed=self.seed
        )
        texts = written_greedily(self.converted, asked, batch_size=self.batch_size)
        for (index, scored), (same_index, is_greedy) in zip(bounds, texts, strict=True):
            assert index == same_index  # both go from the longest to the shortest
            yield index, scored, is_greedy

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues each request's context with the sampler, as `decausal batch` does."""
        asked = [request.args for request in requests]
        texts: list[str] = [""] * len(asked)
        bar = tqdm(total=len(asked), desc="Texts", disable=disable_tqdm or None)
        for index, text in self.writer.write(asked, self._context_ids, self.max_gen_toks):
            texts[index] = text
            self.cache_hook.add_partial("generate_until", asked[index], text)
            bar.update()
        bar.close()
        return texts

    def _context_ids(self, context: str, max_new_tokens: int) -> list[int]:
        room = int(super().max_length) - max_new_tokens
        if room < 1:
            raise UserError(
                f"a task asks for {max_new_tokens} new tokens, and the model reads {super().max_length}: give "
                "--gen_kwargs max_gen_toks=N with a smaller N"
            )
        ids = self.tok_encode(context) if context else [self.prefix_token_id]
        if len(ids) > room:
            log.warning("a context of %d tokens is cut from the left to %d", len(ids), room)
        return ids[-room:]


def _refuse(batch_size: int | str, num_samples: int) -> None:
    if not str(batch_size).isdigit() or int(batch_size) < 1:
        raise UserError(f"batch_size '{batch_size}': give a number of requests of at least 1")
    if num_samples < 1:
        raise UserError(f"num_samples {num_samples}: must be at least 1")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("the harness runs converted models in one process: start it without accelerate or torchrun")


def _dtype(dtype: str | torch.dtype, pretrained: str, revision: str | None) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype == "auto":
        stored = source_dtype(pretrained, revision)
        return stored if isinstance(stored, torch.dtype) else named[str(stored).removeprefix("torch.")]
    if dtype not in named:
        raise UserError(f"dtype '{dtype}' is not known; accepted: auto, {', '.join(named)}")
    return named[dtype]


_KNOWN = ("`pretrained` model kwarg is not of type", "Passed an already-initialized model")


def _is_news(record: logging.LogRecord) -> bool:
    """Hides warnings of `hf` about a model that it did not load."""
    return not record.getMessage().startswith(_KNOWN)
