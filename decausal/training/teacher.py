"""The frozen AR model: reads clean rows causally and gives what the student is compared with, where it is compared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerBase

from decausal.diffusion.layout import Layout
from decausal.errors import UserError
from decausal.models.backbone import body_forward, decoder_layers, head_of, stock_model
from decausal.objectives.logits import States, TopK, top_k_log_probs

CAUSAL = Layout("causal")


class Teacher:
    """Runs the body only (no head, and no layer beyond the last that is asked for), once per clean batch.

    State l is the embedding output for l = 0, the output of layer l for 0 < l < L, and the state after the final
    norm for l = L. Each layer's full state is dropped as soon as the rows that are asked for are gathered, so memory
    beyond the model is D elements per row asked for, never L * B * T * D.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)

    def states(
        self,
        clean_ids: Int[Tensor, "B T"],
        index: Int[Tensor, " m"],
        layers: Sequence[int],
        document_ids: Int[Tensor, "B T"] | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
    ) -> list[Float[Tensor, "m D"]]:
        """Returns the states of `layers` at the flat positions `index` of the clean rows, in the order of `layers`."""
        return self.read(clean_ids, [(layer, index) for layer in layers], document_ids, position_ids)

    def read(
        self,
        clean_ids: Int[Tensor, "B T"],
        wanted: Sequence[tuple[int, Int[Tensor, " _"]]],
        document_ids: Int[Tensor, "B T"] | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
    ) -> list[Float[Tensor, "_ D"]]:
        """Returns the states of each layer of `wanted` at the flat positions beside it, from one pass.

        Layer -1 is the last state, from which `distribution` makes next-token distributions.
        """
        body, layers = stock_model(self.model).base_model, decoder_layers(self.model)
        wanted = [(layer % (len(layers) + 1), index) for layer, index in wanted]
        positions: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)
        for order, (layer, index) in enumerate(wanted):
            positions[layer].append((order, index))
        gathered: dict[int, Tensor] = {}

        def gather(layer: int, hidden: Tensor) -> None:
            rows = hidden.flatten(0, 1)
            gathered.update((order, rows.index_select(0, index)) for order, index in positions[layer])
            if len(gathered) == len(wanted) and not isinstance(body, FSDPModule):
                raise _AllGathered

        hooks = [  # before FSDP's, which would begin the layer that the pass perhaps ends at
            layers[layer].register_forward_pre_hook(_gather_input(gather, layer), prepend=True, with_kwargs=True)
            for layer in positions
            if layer < len(layers)
        ]
        try:
            with torch.no_grad(), self._frozen():
                output = body_forward(
                    self.model, clean_ids, CAUSAL, document_ids=document_ids, position_ids=position_ids
                )
            gather(len(layers), output.last_hidden_state)
        except _AllGathered:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return [gathered[order] for order in range(len(wanted))]

    def distribution(
        self, hidden: Float[Tensor, "n D"], k: int | None, *, banned: int, vocabulary_size: int
    ) -> TopK | States:
        """Returns next-token distributions at last states of `read`, in the form that `chunked_divergence` takes.

        Args:
            hidden: The states.
            k: The most probable tokens to keep of each. None keeps the states, for the full vocabulary.
            banned: The mask token, which the student cannot predict and the teacher has perhaps no row for.
            vocabulary_size: Rows of the student's head; spare rows that the teacher has beyond them do not count.
        """
        head = head_of(self.model)
        num_tokens = min(len(head.weight), vocabulary_size)
        head = head._replace(
            weight=head.weight.detach()[:num_tokens],
            bias=None if head.bias is None else head.bias.detach()[:num_tokens],
            banned=banned if banned < num_tokens else None,
        )
        return States(hidden, head) if k is None else top_k_log_probs(hidden, head, k)

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        yield


class AdapterTeacher(Teacher):
    """The student itself with its adapters off: the AR model that they are trained on top of, without a second copy.

    Args:
        student: A PEFT wrapper whose base weights are frozen.
    """

    def __init__(self, student: nn.Module) -> None:
        self.model = student

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Adapters and dropout off."""
        training = [module for module in self.model.modules() if module.training]
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.model.eval()
        try:
            with self.model.disable_adapter():
                yield
        finally:
            for module in training:
                module.training = True
            for weight in trained:  # under FSDP PEFT releases whole weights perhaps, and leaves the shares frozen
                weight.requires_grad_(True)


class CleanHalf(Teacher):
    """A gated student's own clean half, which is the AR model: its states are there already.

    Args:
        student: gives the head.
        last_states: states after the final norm, the clean ones first.
        all_states: those of all layers in the same order, where they are asked for.
    """

    def __init__(
        self, student: nn.Module, last_states: Float[Tensor, "N D"], all_states: tuple[Float[Tensor, "N D"], ...] | None
    ) -> None:
        self.model = student
        self._last, self._all = last_states, all_states

    def read(
        self,
        clean_ids: Int[Tensor, "B T"],
        wanted: Sequence[tuple[int, Int[Tensor, " _"]]],
        document_ids: Int[Tensor, "B T"] | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
    ) -> list[Float[Tensor, "_ D"]]:
        """As `Teacher.read`, without a pass."""
        states = {-1: self._last} | dict(enumerate(self._all or ()))
        return [states[layer].detach().index_select(0, index) for layer, index in wanted]


def refuse_other_vocabulary(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, name: str, student_name: str
) -> None:
    """Raises UserError unless both tokenizers give every token the same id: else their predictions do not compare.

    The teacher need not know the student's mask token, which is neither read by it nor a prediction.
    """
    of_teacher, of_student = teacher.get_vocab(), student.get_vocab()
    if student.mask_token not in of_teacher:
        of_student.pop(student.mask_token, None)
    if of_teacher == of_student:
        return
    differing = [token for token, index in of_student.items() if of_teacher.get(token) != index]
    differing += [token for token in of_teacher if token not in of_student]
    raise UserError(
        f"--teacher_model_name_or_path {name}: its vocabulary is not that of {student_name} ({len(differing)} tokens "
        f"differ, such as {differing[0]!r}); a teacher must have the student's tokenizer"
    )


class _AllGathered(Exception):  # noqa: N818
    """Ends the teacher's pass before the first layer that nobody is compared with."""


def _gather_input(gather: Callable[[int, Tensor], None], layer: int) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
        gather(layer, args[0] if args else kwargs["hidden_states"])

    return hook
