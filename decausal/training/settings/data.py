"""Settings for the data of a run: what conversions and pretraining share, and what conversions add."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from decausal.data.reading import Reading
from decausal.data.sources import have_splits
from decausal.errors import UserError
from decausal.training.settings.field import Family, at_least, setting, share


@dataclass(frozen=True)
class RecordSettings(Family):
    """Data."""

    data: str | tuple[str, ...] | None = setting(
        None, "what to train on: a file, directory, glob, hub data set, stdlib or tasks; several with commas"
    )
    eval_data: str | tuple[str, ...] | None = setting(
        None,
        "held-out data of the same kinds; its NELBO per token, bits per byte and masked cross-entropy (noise all: the "
        "drafts' accuracy and tokens per pass) are logged every eval_steps (a tenth of the run) and at the end",
    )
    text_field: str = setting("text", "the field of a record that holds its text")
    prompt_field: str = setting("prompt", "the field of a record that holds its prompt; used with completion_field")
    completion_field: str = setting("completion", "the field of a record that holds the answer to its prompt")
    dataset_split: str = setting("train", "the split of a hub data set, or of a directory that has splits")
    eval_split: str | None = setting(None, "the split of eval_data, where that has splits; unset: dataset_split")
    on_bad_record: Literal["error", "skip"] = setting(
        "error", "a record that cannot be used ends the run (error), or is counted and left out (skip)"
    )
    dataset_num_proc: int = setting(1, "processes that tokenise; the rows are the same with any number")
    max_length: int = setting(512, "tokens in a packed row; at most the model's context")
    streaming: bool = setting(
        False, "read data while training goes on, each pass in their order, and keep few rows on disk; needs max_steps"
    )
    streaming_window: int = setting(4096, "rows that are packed at a time, and shuffled among each other")

    def check(self) -> None:
        at_least(self, max_length=2, dataset_num_proc=1, streaming_window=1)
        if self.eval_split is not None and self.eval_data is None:
            raise UserError(f"--eval_split {self.eval_split} has no effect without --eval_data; name the held-out data")

    @property
    def reading(self) -> Reading:
        """How records are read."""
        return Reading(
            text_field=self.text_field,
            prompt_field=self.prompt_field,
            completion_field=self.completion_field,
            split=self.dataset_split,
            on_bad_record=self.on_bad_record,
            num_proc=self.dataset_num_proc,
        )

    @property
    def eval_reading(self) -> Reading:
        """How records of `eval_data` are read. Data without splits may stand beside data that have them."""
        inherited = self.dataset_split if self.eval_data is None or have_splits(self.eval_data) else "train"
        return replace(self.reading, split=self.eval_split or inherited)


@dataclass(frozen=True)
class DataSettings(RecordSettings):
    """Conversations, share of the data, and measurements."""

    chat_template: str | None = setting(
        None, "a file with the chat template for conversations, saved with the model; unset: the tokenizer's own"
    )
    chat_template_kwargs: dict | None = setting(
        None, "values that the template reads, saved with it as defaults: '{\"enable_thinking\": false}'"
    )
    data_fraction: float = setting(1.0, "share of the documents to train on; the same seed chooses the same documents")
    eval_rows: int = setting(64, "rows of eval_data to measure on")
    eval_samples: int = setting(8, "mask patterns of each of these rows, the same each time")
    sample_prompts: str | None = setting(
        None, "a file of prompts, one per line; at each evaluation the run shows and keeps how the model continues them"
    )
    sample_tokens: int = setting(64, "new tokens of each sample")

    def check(self) -> None:
        at_least(self, eval_rows=1, eval_samples=1, sample_tokens=1)
        share(self, "data_fraction")
