"""Samples of the model in training: a few continuations at each measurement, in the log and in a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from decausal.errors import UserError
from decausal.evaluation.passes import measuring
from decausal.files import SAMPLES_FILE
from decausal.models.architecture import context_length
from decausal.models.checkpoint import Converted
from decausal.models.facts import ConversionFacts
from decausal.sampling.generate import generate
from decausal.sampling.texts import prompt_ids
from decausal.training.sample_prompts import SamplePrompt
from decausal.training.step_records import keep_records

_SHOWN_CHARACTERS = 300


class Samples:
    """Continues prompts with the current model.

    Args:
        prompts: The prompts to continue.
        tokenizer: The student's tokenizer.
        facts: The student's facts, which say how it decodes.
        num_tokens: New tokens for each prompt.
        output_dir: Where `samples.jsonl` is written. None: nothing is written or shown, in all processes except the
            first.
    """

    def __init__(
        self,
        prompts: Sequence[SamplePrompt],
        tokenizer: PreTrainedTokenizerBase,
        facts: ConversionFacts,
        num_tokens: int,
        output_dir: Path | None,
    ) -> None:
        self.prompts, self.tokenizer, self.facts = prompts, tokenizer, facts
        self.num_tokens, self.output_dir = num_tokens, output_dir

    def refuse_unusable(self, model: PreTrainedModel) -> None:
        """Raises UserError for a prompt that could not be continued later in the run."""
        converted, context = Converted(model, self.tokenizer, self.facts), context_length(model.config)
        for number, prompt in enumerate(self.prompts, 1):
            try:
                length = len(prompt_ids(converted, prompt.text, prompt.chat)) + self.num_tokens
            except UserError as error:
                raise UserError(f"--sample_prompts, prompt {number}: {error}") from error
            if context is not None and length > context:
                raise UserError(
                    f"--sample_prompts, prompt {number}: with --sample_tokens {self.num_tokens} it makes {length} "
                    f"tokens, and the model reads {context}; shorten one of them"
                )

    def write(self, model: PreTrainedModel, step: int) -> None:
        """Continues each prompt, shows the texts and adds them to the file."""
        converted = Converted(model, self.tokenizer, self.facts)
        with measuring(model):
            written = [
                generate(converted, prompt.text, chat=prompt.chat, max_new_tokens=self.num_tokens)
                for prompt in self.prompts
            ]
        if self.output_dir is None:
            return
        records = [
            {"step": step, "prompt": prompt.text, "text": found.text, "finish_reason": found.finish_reason}
            for prompt, found in zip(self.prompts, written, strict=True)
        ]
        for record in records:
            tqdm.write(f"sample, step {step}: {_one_line(record['prompt'])} -> {_one_line(record['text'])}")
        keep_records(self.output_dir / SAMPLES_FILE, records, step)


def _one_line(text: str) -> str:
    """Returns a text for the log, with visible line ends and without the end of a long text."""
    shown = json.dumps(text, ensure_ascii=False)
    return shown if len(shown) <= _SHOWN_CHARACTERS else f"{shown[:_SHOWN_CHARACTERS]}..."
