"""A converted model for use in Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from decausal.data.template import set_template
from decausal.devices import best_device, decoding_dtype
from decausal.models.checkpoint import Converted, load_converted
from decausal.sampling import batch as batching
from decausal.sampling import generate as generating
from decausal.sampling.batch import BatchEngine, BatchResult
from decausal.sampling.editing import edit as editing
from decausal.sampling.editing.edit import GROUPS, Edit, TokenConfidence
from decausal.sampling.filling import infilling
from decausal.sampling.filling.gaps import Piece
from decausal.sampling.filling.infilling import MAX_GAP, Filling
from decausal.sampling.generation import Generation
from decausal.sampling.job_files import OnProgress
from decausal.sampling.jobs import BATCH_SIZE, OnStep


class DiffusionModel:
    """Model, tokenizer and facts of the conversion, with all ways to sample.

    Example:
        >>> model = decausal.load("converted")
        >>> model.generate("def area(", max_new_tokens=32, threshold=0.9).text
        >>> model.infill("def area(width, height):\\n    return ", "\\n", length=4).text
        >>> model.fill(["def area(", None, "):\\n    return ", 4, "\\n"]).full_text
        >>> model.edit("def area(width, height):\\n    return width * hight\\n").text
    """

    def __init__(self, converted: Converted) -> None:
        self.model, self.tokenizer, self.facts = converted.model, converted.tokenizer, converted.facts
        self._converted = converted

    @property
    def converted(self) -> Converted:
        """Model, tokenizer and facts together, as the functions of the library take them."""
        return self._converted

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        chat: bool = False,
        batch_size: int = BATCH_SIZE,
        on_step: OnStep | None = None,
        **options: Any,
    ) -> Generation | list[Generation]:
        """Continues one prompt, or each of several; see `decausal.sampling.generate.generate`."""
        return generating.generate(
            self._converted, prompts, chat=chat, batch_size=batch_size, on_step=on_step, **options
        )

    def fill(
        self,
        texts: Sequence[Piece] | Sequence[Sequence[Piece]],
        *,
        max_gap: int = MAX_GAP,
        length_search: str = "candidates",
        batch_size: int = BATCH_SIZE,
        on_step: OnStep | None = None,
        **options: Any,
    ) -> Filling | list[Filling]:
        """Fills one gap or many, of given or unknown length; see `decausal.sampling.filling.infilling.fill`."""
        return infilling.fill(
            self._converted,
            texts,
            max_gap=max_gap,
            length_search=length_search,
            batch_size=batch_size,
            on_step=on_step,
            **options,
        )

    def infill(
        self,
        prefix: str | Sequence[str],
        suffix: str | Sequence[str],
        length: int | None = None,
        *,
        max_gap: int = MAX_GAP,
        length_search: str = "candidates",
        batch_size: int = BATCH_SIZE,
        on_step: OnStep | None = None,
        **options: Any,
    ) -> Generation | list[Generation]:
        """Writes what is missing between prefix and suffix; see `decausal.sampling.filling.infilling.infill`."""
        return infilling.infill(
            self._converted,
            prefix,
            suffix,
            length,
            max_gap=max_gap,
            length_search=length_search,
            batch_size=batch_size,
            on_step=on_step,
            **options,
        )

    def edit(
        self,
        text: str | Sequence[str],
        *,
        num_tokens: int | None = None,
        fraction: float | None = None,
        span: tuple[int, int] | None = None,
        find: str | None = None,
        rounds: int = 1,
        groups: int = GROUPS,
        batch_size: int = BATCH_SIZE,
        on_step: OnStep | None = None,
        **options: Any,
    ) -> Edit | list[Edit]:
        """Rewrites what fits least, or a marked span; see `decausal.sampling.editing.edit.edit`."""
        return editing.edit(
            self._converted,
            text,
            num_tokens=num_tokens,
            fraction=fraction,
            span=span,
            find=find,
            rounds=rounds,
            groups=groups,
            batch_size=batch_size,
            on_step=on_step,
            **options,
        )

    def confidences(
        self, text: str | Sequence[str], *, groups: int = GROUPS, batch_size: int = BATCH_SIZE
    ) -> list[TokenConfidence] | list[list[TokenConfidence]]:
        """Returns how probable each token of a text is; see `decausal.sampling.editing.edit.confidences`."""
        return editing.confidences(self._converted, text, groups=groups, batch_size=batch_size)

    def engine(
        self,
        *,
        max_rows: int = BATCH_SIZE,
        max_length: int | None = None,
        cuda_graphs: bool | None = None,
        prefix_cache_tokens: int = 0,
    ) -> BatchEngine:
        """Makes an engine for any number of prompts; see `decausal.sampling.batch.BatchEngine`."""
        return BatchEngine(
            self._converted,
            max_rows=max_rows,
            max_length=max_length,
            cuda_graphs=cuda_graphs,
            prefix_cache_tokens=prefix_cache_tokens,
        )

    def run_file(
        self,
        prompts: str | Path,
        answers: str | Path,
        *,
        chat: bool = False,
        max_rows: int = BATCH_SIZE,
        max_length: int | None = None,
        cuda_graphs: bool | None = None,
        prefix_cache_tokens: int = 0,
        on_error: str = "stop",
        on_progress: OnProgress | None = None,
        **options: Any,
    ) -> BatchResult:
        """Answers a jsonl file of prompts, resumably; see `decausal.sampling.batch.run_file`."""
        return batching.run_file(
            self._converted,
            prompts,
            answers,
            chat=chat,
            max_rows=max_rows,
            max_length=max_length,
            cuda_graphs=cuda_graphs,
            prefix_cache_tokens=prefix_cache_tokens,
            on_error=on_error,
            on_progress=on_progress,
            **options,
        )


def load(
    model_name_or_path: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    chat_template: str | Path | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> DiffusionModel:
    """Loads a converted checkpoint, ready to sample.

    Args:
        model_name_or_path: What `decausal convert` wrote (weights, tokenizer and decausal.json): the directory, or its
            id on the hub.
        device: None: CUDA where there is one, else the CPU.
        dtype: Type of the weights. None: bfloat16 on CUDA, float32 on the CPU.
        revision: Branch, tag or commit of a hub id.
        chat_template: A file with another chat template than the checkpoint's own, or its text.
        chat_template_kwargs: Values that the chat template reads.

    Raises:
        UserError: There is no such checkpoint or template, or facts and weights do not match.
    """
    device = best_device() if device is None else torch.device(device)
    dtype = dtype or decoding_dtype(device)
    converted = load_converted(model_name_or_path, dtype, device, revision)
    set_template(converted.tokenizer, chat_template, chat_template_kwargs)
    converted.model.eval()
    return DiffusionModel(converted)
