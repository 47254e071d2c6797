"""Packed rows on disk, built once per data, tokenizer and options, and then memory-mapped.

A corpus may be larger than memory. If it is larger than the disk, or takes too long to pack, it can be streamed: see
`decausal.data.streamed_rows`.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path

from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from decausal.data.documents import Record, read_sources
from decausal.data.encode import Encoded, encode_stream
from decausal.data.packing import Counts, Packer, Row
from decausal.data.reading import Account, Reading, say
from decausal.data.row_file import RowFile, is_whole, write_rows
from decausal.data.sources import Data, Source, find_sources
from decausal.errors import UserError
from decausal.wording import quantity

FORMAT_VERSION = 9  # raise this number whenever the same data would give other rows
ROWS_FILE = "rows.bin"
FACTS_FILE = "rows.json"
CACHE_DIR = Path(HF_HOME, "decausal", "rows")
WATCHED_ROWS = 256  # packed between two updates of the progress line


class PackedRows:
    """Rows that `load_rows` has built: row i holds clean_ids, document_ids (-1 is padding) and is_maskable, each [T].

    Attributes:
        sequence_length: T.
        num_tokens: Tokens in all rows, without padding.
        num_documents: Documents in the rows.
        num_dropped: Documents left out because they are longer than a row and may not be cut.
        account: What was read, and what was left out.
    """

    def __init__(self, directory: Path) -> None:
        facts = json.loads((directory / FACTS_FILE).read_text())
        self.directory = directory
        self.sequence_length: int = facts["sequence_length"]
        self.counts = Counts(**facts["counts"])
        self.account = Account(**facts["account"])
        self._file = RowFile(directory / ROWS_FILE, self.sequence_length, self.counts.num_rows)

    @property
    def num_tokens(self) -> int:
        return self.counts.num_tokens

    @property
    def num_documents(self) -> int:
        return self.counts.num_documents

    @property
    def num_dropped(self) -> int:
        return self.counts.num_dropped

    @property
    def has_conversations(self) -> bool:
        """Whether conversations were read."""
        return bool(self.account.num_conversations)

    def __len__(self) -> int:
        return self.counts.num_rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._file[index]

    def __reduce__(self) -> tuple[type[PackedRows], tuple[Path]]:
        return PackedRows, (self.directory,)  # a data loader's worker maps the file instead of copying it


def load_rows(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    *,
    reading: Reading | None = None,
    cache_dir: str | Path | None = None,
    data_fraction: float = 1.0,
    seed: int = 0,
    max_rows: int | None = None,
) -> PackedRows:
    """Returns the packed rows of `data`, from the cache if the same rows were built before.

    Args:
        data, reading: See `decausal.data.documents.read_documents`.
        tokenizer: Of the model that will read the rows.
        sequence_length: Tokens per row, T, at least 2.
        cache_dir: Where rows are kept; by default `decausal/rows` in the Hugging Face home directory.
        data_fraction: Share of the documents to keep, in (0, 1]. A hash of `seed` and a document's origin decides. So a
            smaller share is a subset of a larger one. At least one document is kept.
        seed: Chooses which documents `data_fraction` keeps.
        max_rows: Stop after this many rows.

    A line on standard error says what was read, and what was skipped and why.

    Raises:
        UserError: The data cannot be read or encoded, an option is out of its range, or the cache cannot be written.
    """
    refuse_out_of_range(sequence_length, data_fraction)
    if max_rows is not None and max_rows < 1:
        raise UserError(f"max_rows {max_rows}: must be at least 1")
    reading, account = reading or Reading(), Account()
    sources = find_sources(data, reading.split, account)
    subset = (data_fraction, seed) if data_fraction < 1 else None
    options = [FORMAT_VERSION, sequence_length, reading.content, subset, max_rows]
    name = fingerprint(sources, tokenizer, options)
    with cache_errors(cache_dir):
        root = Path(cache_dir) if cache_dir else CACHE_DIR
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{name}.lock"):  # only one of several processes builds
            if not _is_whole(root / name):
                records = keep_fraction(read_sources(sources, reading, account), data_fraction, seed)
                on_bad = partial(account.take_unencodable, on_bad_record=reading.on_bad_record)
                encoded = encode_stream(records, tokenizer, on_bad=on_bad, num_proc=reading.num_proc)
                _build(root / name, encoded, account, tokenizer, sequence_length, max_rows)
    rows = PackedRows(root / name)
    rows.account.left_out = account.left_out  # of this reading: files that are not read do not change the cache's name
    kept = f"; kept {rows.num_documents:,} of them, by --data_fraction {data_fraction}" if subset else ""
    say(rows.account.line(rows.num_tokens) + kept)
    rows.counts.report_dropped(sequence_length)
    return rows


def keep_fraction(records: Iterable[Record], fraction: float, seed: int) -> Iterator[Record]:
    """Yields the records whose hash of seed and origin falls below `fraction`, or the nearest one if there are none."""
    nearest: tuple[float, Record] | None = None
    is_any_kept = False
    for record in records:
        share = share_of(record, seed)
        if share < fraction or fraction == 1:
            is_any_kept = True
            yield record
        elif not is_any_kept and (nearest is None or share < nearest[0]):
            nearest = share, record
    if not is_any_kept and nearest is not None:
        yield nearest[1]


def share_of(record: Record, seed: int) -> float:
    """Returns a number in [0, 1) from a hash of seed and origin: the record is in all fractions above it."""
    digest = sha256(f"{seed} {record['origin']}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def refuse_out_of_range(sequence_length: int, data_fraction: float) -> None:
    """Raises UserError if rows would be too short, or the fraction is none."""
    if sequence_length < 2:
        raise UserError(f"--max_length {sequence_length}: a row needs at least 2 tokens")
    if not 0 < data_fraction <= 1:
        raise UserError(f"--data_fraction {data_fraction}: must be above 0 and at most 1")


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns what fills a row up."""
    return (tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id) or 0


def _build(
    directory: Path,
    encoded: Iterable[Encoded],
    account: Account,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    max_rows: int | None,
) -> None:
    """Builds beside `directory` and then renames, so that a directory with this name is complete."""
    packer = Packer(sequence_length, pad_token_id(tokenizer))
    unfinished = directory.with_suffix(".unfinished")
    for left_over in (unfinished, directory):  # left by a run that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    unfinished.mkdir()
    try:
        rows = islice(packer.rows(encoded), max_rows)
        write_rows(unfinished / ROWS_FILE, _watched(rows, packer.counts), sequence_length)
        if not packer.counts.num_rows:
            packer.counts.report_dropped(sequence_length)
            account.refuse_if_all_bad()
        facts = {
            "sequence_length": sequence_length,
            "counts": asdict(packer.counts),
            "account": asdict(account),
        }
        (unfinished / FACTS_FILE).write_text(json.dumps(facts))
        unfinished.rename(directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _watched(rows: Iterator[Row], counts: Counts) -> Iterator[Row]:
    """Shows in a terminal how many tokens have been packed."""
    if not sys.stderr.isatty():
        yield from rows
        return
    with Console(stderr=True).status("packing") as status:
        for index, row in enumerate(rows):
            if index % WATCHED_ROWS == 0:
                status.update(
                    f"packing: {quantity(counts.num_documents, 'document')}, {quantity(counts.num_tokens, 'token')}"
                )
            yield row


def _is_whole(directory: Path) -> bool:
    try:
        facts = json.loads((directory / FACTS_FILE).read_text())
        return is_whole(directory / ROWS_FILE, facts["sequence_length"], facts["counts"]["num_rows"])
    except (OSError, ValueError, KeyError):
        return False


def fingerprint(sources: list[Source], tokenizer: PreTrainedTokenizerBase, options: list[object]) -> str:
    """Returns a hash of everything that decides what the rows hold."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend else f"{type(tokenizer).__name__} {sorted(tokenizer.get_vocab().items())}"
    special = [tokenizer.special_tokens_map, tokenizer.chat_template]
    digest = sha256()
    for part in (repr(options), vocabulary, repr(special), *(source.fingerprint() for source in sources)):
        digest.update(f"{len(part)} {part}".encode())
    return digest.hexdigest()[:32]


@contextmanager
def cache_errors(cache_dir: str | Path | None) -> Iterator[None]:
    """Turns errors of writing into the cache into one line."""
    try:
        yield
    except OSError as error:
        where = error.filename or cache_dir or HF_HOME
        raise UserError(f"cannot keep packed rows in {where}: {error.strerror}; name another directory") from None
