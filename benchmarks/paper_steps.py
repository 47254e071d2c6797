"""Training steps and decoding passes at a model's shape on a device of no numbers, by the library's own code."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from counting import moved
from floors import ModelShape
from models import build
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from train_step import RandomRows
from transformers import PreTrainedModel

from decausal.data.block_collator import BlockCollator
from decausal.data.stream import Batch, Collator, Noising, TrainingStream
from decausal.devices import meta_as
from decausal.diffusion.layout import Layout, positions_in_documents
from decausal.models.backbone import decoder_layers, head_of
from decausal.models.block_cache import BlockCache, decoding
from decausal.models.compiled import by_lengths
from decausal.models.facts import ConversionFacts
from decausal.models.row_attention import FLEX, RowAttention
from decausal.sampling.blocks.draft_shapes import quadratic
from decausal.sampling.blocks.draft_tables import Drafting, DraftTables
from decausal.sampling.blocks.keeping import keep
from decausal.sampling.blocks.reader import Reader
from decausal.sampling.blocks.rows import BlockRows
from decausal.sampling.blocks.speculative_rows import Extent, SpeculativeRows
from decausal.sampling.row_settings import RowSettings
from decausal.sampling.settings import SamplerSettings
from decausal.training.losses import Supervision, Weighted, weighted_loss
from decausal.training.planning.kernels import MixedPrecision, counted, pairs_of
from decausal.training.planning.tally import Tally
from decausal.training.questions import Vocabulary, ask
from decausal.training.schedule import WeightSchedule
from decausal.training.teacher import CAUSAL, Teacher
from decausal.training.terms import AlignmentTerm, DivergenceTerm, FinishedDivergenceTerm, Term, TokenTerm

META = torch.device("meta")


@dataclass(frozen=True)
class Kind:
    """A kind of training step.

    Attributes:
        block_size: Of a block layout; None: bidirectional.
        views: Noised views of a clean row.
        is_aligned: All states are aligned.
        divergence: What is distilled: "", "full", "top" or "causal".
    """

    block_size: int | None = None
    views: int = 1
    is_aligned: bool = False
    divergence: str = ""

    @property
    def layout(self) -> Layout:
        """Who attends to whom."""
        if self.block_size is None:
            return Layout("bidirectional")
        return Layout("block", self.block_size, causal_context=self.divergence == "causal")

    def terms(self, num_layers: int) -> list[Term]:
        """The losses."""
        if self.divergence in ("full", "top"):  # as OPDLM: in place of the token loss
            return [DivergenceTerm(top_k=64 if self.divergence == "top" else None)]
        found: list[Term] = [TokenTerm()]
        if self.is_aligned:
            found.append(AlignmentTerm(tuple(range(num_layers + 1))))
        if self.divergence:
            found.append(FinishedDivergenceTerm())
        return found


KINDS = {
    "plain": Kind(),
    "aligned": Kind(is_aligned=True),
    "aligned, 2 views": Kind(is_aligned=True, views=2),
    "block": Kind(block_size=4),
    "block, KL": Kind(block_size=4, divergence="full"),
    "block, top-k KL": Kind(block_size=4, divergence="top"),
    "block, causal KL": Kind(block_size=4, divergence="causal"),
}


class PaperStep:
    """One kind of step on one kind of batch, with fp32 weights of the student and bf16 ones of the teacher.

    Args:
        kind: Which.
        model_name: See `models.SHAPES`.
        rows: Clean rows of the batch; of two views half as many, so that the student reads equally much.
        length: Tokens of a row.
        documents: Documents in a row.
        is_flex: Attention by FlexAttention, else by dense masks where there is one.
        device: Where models and batch are made to be.
    """

    def __init__(
        self,
        kind: Kind,
        model_name: str = "qwen3-0.6b",
        *,
        rows: int = 8,
        length: int = 4096,
        documents: int = 1,
        is_flex: bool = False,
        device: torch.device = META,
    ) -> None:
        self.kind, self.device = kind, device
        self.student = build(model_name, device).train()
        num_layers = len(decoder_layers(self.student))
        self.terms = kind.terms(num_layers)
        self.mask_token_id = self.student.config.vocab_size - 1
        self.supervision = Supervision(
            kind.layout, self.mask_token_id, tuple(Weighted(term, WeightSchedule(1.0)) for term in self.terms)
        )
        self.teacher = None
        if any(term.questions for term in self.terms):
            self.teacher = Teacher(build(model_name, device, torch.bfloat16))
        self.is_flex = is_flex
        if is_flex:
            for model in (self.student, *([] if self.teacher is None else [self.teacher.model])):
                model.config._attn_implementation = FLEX
        with unset_fake_temporarily():  # what is read depends on its numbers
            self.cpu_batch = self._batch(rows // kind.views, length, documents)
        self.batch = moved(self.cpu_batch, device)
        self.num_clean_tokens = rows // kind.views * length

    def _batch(self, rows: int, length: int, documents: int) -> Batch:
        kind = self.kind
        source = RandomRows(self.mask_token_id, length, documents, seed=0)
        noising = Noising(kind.views, complementary=kind.views == 2, block_size=kind.block_size)
        stream = TrainingStream(source, rows, seed=0, shift=0 if kind.block_size else 1, noising=noising)
        collator: Callable[[Any], Batch] = Collator(self.mask_token_id, 1)
        if kind.block_size:
            collator = BlockCollator(self.mask_token_id, 0, kind.layout, row_multiple=128)
        return collator([stream[position] for position in range(rows)])

    def run(self) -> None:
        """Teacher, forward and backward."""
        self.loss().backward()

    def loss(self) -> Tensor:
        """Teacher and forward; of the losses the gradients, too."""
        vocabulary = Vocabulary(self.student.config.vocab_size, self.mask_token_id)
        questions = [question for term in self.terms for question in term.questions]
        answers = ask(self.teacher, questions, self.batch, vocabulary)
        counts = {name: count.to(torch.float32) for name, count in self.batch["counts"].items()}
        weights: dict[Term, float] = dict.fromkeys(self.terms, 1.0)
        return weighted_loss(self.student, self.batch, self.supervision, weights, counts, answers)[0]

    def rows(self) -> tuple[RowAttention, RowAttention]:
        """What the student reads and what the teacher reads, on the CPU."""
        batch, clean = self.cpu_batch, self.cpu_batch["clean_ids"]
        documents = batch.get("document_ids", torch.zeros_like(clean))
        positions = positions_in_documents(documents)
        of_teacher = RowAttention(CAUSAL, documents, positions)
        if self.kind.block_size is None:
            views = self.kind.views
            own = (part.repeat_interleave(views, dim=0) for part in (documents, positions))
            return RowAttention(self.kind.layout, *own), of_teacher
        names = ("student_document_ids", "student_position_ids", "stream_ids")
        return RowAttention(self.kind.layout, *(batch[name] for name in names)), of_teacher

    def tally(self, is_trained: bool = True, inside: AbstractContextManager[Any] | None = None) -> Tally:
        """What the step would have a GPU do, with products in bf16.

        Args:
            is_trained: Whether the backward pass is made, too.
            inside: A context for the step, such as `OneDevice`.
        """
        with unset_fake_temporarily():
            pairs = pairs_of(self.rows()[0], in_blocks=True) if self.is_flex else None
        with ExitStack() as stack:
            if self.device == META:  # which knows no autocast
                stack.enter_context(meta_as("cuda", torch.bfloat16))
                stack.enter_context(MixedPrecision(torch.bfloat16))
            stack.enter_context(inside or nullcontext())
            return counted(self.run if is_trained else self.loss, flex_pairs=pairs)

    def floor(self) -> float:
        """The operations that the step cannot do without: pairs that are read, tokens that are no padding."""
        shape = ModelShape.of(self.student)
        student, teacher = self.rows()
        attention = 4.0 * shape.attention_width
        num_read = int((student.document_ids >= 0).sum())
        body = 2.0 * shape.body_weights * num_read + attention * pairs_of(student, in_blocks=False)
        head = 2.0 * shape.width * shape.vocab_size
        total = 3 * (body + head * len(self.cpu_batch["target_index"]))
        if self.teacher is None:
            return total
        clean = int((teacher.document_ids >= 0).sum())
        total += 2.0 * shape.body_weights * clean + attention * pairs_of(teacher, in_blocks=False)
        if self.kind.divergence == "causal":
            num_finished = len(self.cpu_batch["causal_index"])
            return total + (3 + 1) * head * num_finished
        return total + (head * len(self.cpu_batch["target_index"]) if self.kind.divergence else 0.0)


def block_pass(
    model: PreTrainedModel,
    *,
    num_rows: int,
    num_keys: int,
    block_size: int = 4,
    device: torch.device = META,
    is_flex: bool = False,
) -> Callable[[], None]:
    """Returns a recorded pass of block decoding: every row reads its finished block and denoises the next one.

    Args:
        model: The model.
        num_rows: Rows of the pass.
        num_keys: Slots of the cache that it may read.
        block_size: Of the layout.
        device: Where the model is.
        is_flex: Attention by FlexAttention, as where layers are compiled.
    """
    rows = BlockRows(num_rows, num_keys, block_size, model.config.vocab_size - 1, device)
    rows.grow_ends(1)
    reader = Reader(model, Layout("block", block_size), 0, BlockCache(model.config, num_rows, num_keys), rows)
    settings = _settings(SamplerSettings(threshold=0.9), num_rows, device)
    head = head_of(model)._replace(banned=model.config.vocab_size - 1)

    def one_pass(is_flex: bool = is_flex) -> None:
        with decoding(model), by_lengths(model) if is_flex else nullcontext():
            states = reader.predict_fixed(num_rows, block_size, num_keys)
            keep(rows, num_rows, None, states, head, settings)

    one_pass(is_flex=False)  # takes the cache's memory
    return one_pass


def verified_pass(
    model: PreTrainedModel, *, num_rows: int, num_keys: int, draft_length: int = 4, device: torch.device = META
) -> Callable[[], None]:
    """Returns a pass of verified decoding: every row reads its last token and drafts, and masks for the next drafts."""
    mask_token_id, shape = model.config.vocab_size - 1, quadratic(draft_length)
    facts = ConversionFacts(source="", layout="block", block_size=draft_length, shift=1, mask_token_id=mask_token_id)
    tables = DraftTables([Drafting(shape)], facts.shift, False, device)
    rows = SpeculativeRows(model, facts, tables=tables, max_rows=num_rows, num_slots=num_keys + tables.most_masks)
    settings = _settings(SamplerSettings(speculative=True), num_rows, device)
    extent = Extent(1, shape.most_pending, tables.most_masks, shape.longest_group, num_keys)

    def one_pass() -> None:
        with decoding(model):
            rows.read(slice(0, num_rows), extent, settings)

    one_pass()
    return one_pass


def _settings(settings: SamplerSettings, num_rows: int, device: torch.device) -> RowSettings:
    """Returns the settings of rows, without the memory that a device's driver would have to give for the copy."""
    with unset_fake_temporarily():
        of_rows = RowSettings.of([settings] * num_rows, torch.device("cpu"))
    return RowSettings(**{name: moved(value, device) for name, value in vars(of_rows).items()})
