"""The frozen AR model. It reads clean rows causally and returns what the student is compared with."""

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
    """Runs only the body, up to the last layer that is needed, once per clean batch.

    State l is the embedding output for l = 0, the output of layer l for 0 < l < L, and the state after the final
    norm for l = L. Each layer's full state is dropped once the needed rows are gathered. So memory beyond the model is
    D elements per needed row, never L * B * T * D.
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
        """Returns the states of each layer in `wanted` at its flat positions, from one pass.

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

        hooks = [  # before FSDP's hook, which would gather the layer at which the pass may end
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
        """Returns next-token distributions for last states of `read`, in the form for `chunked_divergence`.

        Args:
            hidden: The states.
            k: How many of the most probable tokens to keep. None keeps the states, for the full vocabulary.
            banned: The mask token, which the student cannot predict and for which the teacher may have no row.
            vocabulary_size: Rows of the student's head. Further rows of the teacher do not count.
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
    """The student itself with its adapters off, which is the AR model, without a second copy.

    Args:
        student: A PEFT wrapper whose base weights are frozen.
    """

    def __init__(self, student: nn.Module) -> None:
        self.model = student

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Turns adapters and dropout off."""
        training = [module for module in self.model.modules() if module.training]
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.model.eval()
        try:
            with self.model.disable_adapter():
                yield
        finally:
            for module in training:
                module.training = True
            for weight in trained:  # under FSDP, PEFT may unfreeze whole weights and leave the shards frozen
                weight.requires_grad_(True)


class CleanHalf(Teacher):
    """A gated student's own clean half, which is the AR model. Its states already exist.

    Args:
        student: Gives the head.
        last_states: States after the final norm, the clean ones first.
        all_states: The states of all layers in the same order, if they are asked for.
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
        """Does what `Teacher.read` does, without a pass."""
        states = {-1: self._last} | dict(enumerate(self._all or ()))
        return [states[layer].detach().index_select(0, index) for layer, index in wanted]


def refuse_other_vocabulary(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, name: str, student_name: str
) -> None:
    """Raises UserError unless both tokenizers give every token the same id, since predictions could not be compared.

    The teacher need not have the student's mask token, which it neither reads nor predicts.
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
    """Ends the teacher's pass before the first layer that is not needed."""


def _gather_input(gather: Callable[[int, Tensor], None], layer: int) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
        gather(layer, args[0] if args else kwargs["hidden_states"])

    return hook
