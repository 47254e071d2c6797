"""The rows of a run's corpus, packed before it begins or streamed while it goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, TrainingArguments

from decausal.data.reading import Reading
from decausal.data.rows import PackedRows, load_rows
from decausal.data.stream import TrainingStream
from decausal.data.streamed_rows import StreamedRows, stream_rows
from decausal.training.run import rows_per_step, run_length
from decausal.training.settings.data import RecordSettings


def corpus_of_run(
    settings: RecordSettings, args: TrainingArguments, tokenizer: PreTrainedTokenizerBase, fraction: float = 1.0
) -> tuple[PackedRows | StreamedRows, int]:
    """Returns the rows of a run's data and how many of them it trains on.

    Sets `args.max_steps` if the run's length is given in epochs.

    Args:
        settings: The run's settings.
        args: Its training arguments.
        tokenizer: Of the model that will read the rows.
        fraction: Share of the documents.

    Raises:
        UserError: The data cannot be read or encoded.
    """
    if not settings.streaming:
        rows = corpus_rows(settings, settings.data, settings.reading, tokenizer, args.seed, fraction)
        return rows, run_length(args, len(rows))
    num_rows = args.max_steps * rows_per_step(args)
    streamed = stream_rows(
        settings.data,
        tokenizer,
        settings.max_length,
        num_rows=num_rows,
        window_rows=settings.streaming_window,
        reading=settings.reading,
        data_fraction=fraction,
        seed=args.seed,
    )
    return streamed, num_rows


def corpus_rows(
    settings: RecordSettings,
    data: str | tuple[str, ...] | None,
    reading: Reading,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    fraction: float = 1.0,
) -> PackedRows:
    """Returns packed rows of `data`, as long as the settings say; see `decausal.data.rows.load_rows`."""
    return load_rows(
        data,
        tokenizer,
        settings.max_length,
        reading=reading,
        data_fraction=fraction,
        seed=seed,
    )


@contextmanager
def reading_ahead(stream: Dataset, position: Callable[[], int]) -> Iterator[None]:
    """While inside, streamed rows are prepared in the background. At the end a line says what was read.

    Args:
        stream: The rows of a run.
        position: Returns how many of them were trained on.
    """
    rows = stream.rows if isinstance(stream, TrainingStream) else None
    if not isinstance(rows, StreamedRows):
        yield
        return
    try:
        yield
        rows.say_read(position())
    finally:
        rows.close()
