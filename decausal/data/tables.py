"""Tables of records that `datasets` reads: data sets on the hub, and directories that `save_to_disk` wrote."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from decausal.errors import UserError, nearest

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class HubDataset:
    """One split of a data set on the hub. Unless it is streamed, it is downloaded to the hub's own local cache.

    Attributes:
        name: "name" or "owner/name".
        config: Which of its configurations, None for the only one.
        split: Which of its splits.
        siblings: Other names that may have been meant, for errors.
        is_streamed: Whether it is read from the hub row by row, and not downloaded.
    """

    name: str
    config: str | None
    split: str
    siblings: tuple[str, ...] = ()
    is_streamed: bool = False

    def __str__(self) -> str:
        return f"{self.name}:{self.config}[{self.split}]" if self.config else f"{self.name}[{self.split}]"

    @cached_property
    def table(self) -> datasets.Dataset:
        """The memory-mapped table of records."""
        import datasets

        with self._asking():
            return datasets.load_dataset(self.name, self.config, split=self.split)

    @property
    def stream(self) -> datasets.IterableDataset:
        """The records, read from the hub as they are asked for."""
        with self._asking():
            return self._builder.as_streaming_dataset(split=self.split)

    @cached_property
    def _builder(self) -> datasets.DatasetBuilder:
        import datasets

        with self._asking():
            return datasets.load_dataset_builder(self.name, self.config)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Turns errors of the hub into one line, and shows no bars without a terminal."""
        self.refuse_unknown()
        with _quiet_unless_watched():
            try:
                yield
            except UserError:
                raise
            except Exception as error:  # the hub, the network and each builder have their own types of errors
                reason = " ".join(str(error).split()).partition(" Example of usage")[0][:300] or type(error).__name__
                raise UserError(f"cannot load data set '{self}' from the hub ({reason}){self._hint(reason)}") from None

    def refuse_unknown(self) -> None:
        """Asks the hub whether there is such a data set, unless requests are forbidden.

        Raises:
            UserError: There is no such data set, it may not be read, or the hub cannot be reached.
        """
        if _is_offline():
            return
        from decausal.hub import refuse_unknown_dataset

        try:
            refuse_unknown_dataset(self.name)
        except UserError as error:
            raise UserError(f"{error}{nearest(self.name, self.siblings)}") from None

    def _hint(self, reason: str) -> str:
        if _is_offline():
            return (
                "; HF_HUB_OFFLINE is set, so it must have been downloaded before; no file or directory has that name "
                f"either{nearest(self.name, self.siblings)}"
            )
        if "gated" in reason:
            from decausal.hub import LOG_IN

            return f"; {LOG_IN}"
        return f"; write {self.name}:CONFIG" if "Config name is missing" in reason else ""

    def fingerprint(self) -> str:
        """Returns a string that changes when the data set does."""
        return f"{self} {self._builder.hash if self.is_streamed else self.table._fingerprint}"


@dataclass(frozen=True)
class SavedDataset:
    """What `Dataset.save_to_disk` wrote: a directory of Arrow files and their description."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def table(self) -> datasets.Dataset:
        """The memory-mapped table of records."""
        import datasets

        try:
            loaded = datasets.load_from_disk(str(self.path))
        except Exception as error:  # damaged files cause many types of errors
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(f"cannot load {self.path}, which save_to_disk wrote ({reason}); save it again") from None
        if not isinstance(loaded, datasets.Dataset):
            raise UserError(f"{self.path} holds several splits: name the directory of one")
        return loaded

    def fingerprint(self) -> str:
        """Returns a string that changes when a file does."""
        files = sorted(path for path in self.path.iterdir() if path.is_file())
        states = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
        return f"{self.path.absolute()} {' '.join(states)}"


def _is_offline() -> bool:
    from decausal.hub import is_offline

    # `datasets` reads it too, but importing that is slow
    return is_offline() or os.environ.get("HF_DATASETS_OFFLINE", "").upper() in ("1", "ON", "TRUE", "YES")


@contextmanager
def _quiet_unless_watched() -> Iterator[None]:
    """Hides the progress bars of `datasets` without a terminal."""
    import datasets

    if sys.stderr.isatty() or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
