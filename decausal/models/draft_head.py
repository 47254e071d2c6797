"""A draft head lets every draft know the draft before it.

The masks of a group are read in one pass, so the k-th draft knows the text up to the anchor, but not the tokens
between. A draft head takes one more step after the body, from draft to draft. To a mask's last state it adds what
follows from the token before it and from the state that predicted that token. The first draft starts from the causal
state at the anchor. The output head then reads the sum.

Source: the sampler module of Your LLM knows the future (arXiv 2507.11851); states that are carried from draft to draft
as in Hydra (arXiv 2402.05109).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from decausal.diffusion.groups import Groups
from decausal.models.backbone import denoising_head, head_of, stock_model
from decausal.objectives.head import Head

DRAFT_HEAD_FILE = "draft_head.safetensors"
_NAME = "decausal_draft_head"
_TOKENS = "tokens"
_EXPANSION = 4


class DraftHead(nn.Module):
    """Adds what follows from the token before a draft to its mask's last state. At first it adds nothing.

    Args:
        size: Width of the states.
        embedding_size: Width of the embeddings, which is the same in most models.
        tokens: The tokens that can be drafted, in order.
    """

    tokens: Int[Tensor, " tokens"]

    def __init__(self, size: int, embedding_size: int, tokens: Int[Tensor, " tokens"]) -> None:
        super().__init__()
        # Apart from the weights, since accelerate shards everything in a state dict.
        self.register_buffer("tokens", tokens, persistent=False)
        self.up = nn.Linear(2 * size + embedding_size, 2 * _EXPANSION * size, bias=False)
        self.down = nn.Linear(_EXPANSION * size, size, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(
        self, mask: Float[Tensor, "n D"], token: Float[Tensor, "n E"], before: Float[Tensor, "n D"]
    ) -> Float[Tensor, "n D"]:
        """Returns the states that predict drafts.

        Args:
            mask: The masks' states after the final norm.
            token: The embedding of the token before each draft.
            before: The state that predicted this token: the causal one at the anchor, then the last result.
        """
        parts = (mask, token.to(mask.dtype), before)
        read = torch.cat([functional.rms_norm(part, part.shape[-1:]) for part in parts], dim=-1)
        values, gate = self.up(read).chunk(2, dim=-1)
        return mask + self.down(values * functional.silu(gate))


def install_draft_head(model: nn.Module, tokens: Int[Tensor, " tokens"]) -> None:
    """Gives a model a draft head that adds nothing yet and chooses from some tokens, in its type and on its device."""
    embedding, size = stock_model(model).get_input_embeddings().weight, head_of(model).weight.shape[1]
    head = DraftHead(size, embedding.shape[1], tokens).to(embedding)
    stock_model(model).register_module(_NAME, head)


def draft_head_of(model: nn.Module) -> DraftHead | None:
    """Returns a model's draft head, if it has one."""
    return getattr(stock_model(model), _NAME, None)


class DraftVocabulary(NamedTuple):
    """The tokens that drafts are chosen from.

    Attributes:
        head: The output head for these tokens only.
        tokens: Their ids; None: all.
    """

    head: Head
    tokens: Int[Tensor, " tokens"] | None

    def ids(self, chosen: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
        """Returns the ids of tokens chosen by their places in the head."""
        return chosen if self.tokens is None else self.tokens[chosen]


def draft_vocabulary(model: nn.Module, mask_token_id: int) -> DraftVocabulary:
    """Returns what a model's drafts are chosen from: a copy of some rows of the output head, or the head itself."""
    head, drafts = denoising_head(model, mask_token_id), draft_head_of(model)
    if drafts is None or len(drafts.tokens) == len(head.weight):
        return DraftVocabulary(head, None)
    bias = None if head.bias is None else head.bias[drafts.tokens]
    return DraftVocabulary(head._replace(weight=head.weight[drafts.tokens], bias=bias, banned=None), drafts.tokens)


def drafting_states(
    model: nn.Module,
    clean_ids: Int[Tensor, "B T"],
    groups: Groups,
    clean: Float[Tensor, "clean D"],
    masks: Float[Tensor, "masks D"],
) -> Float[Tensor, "masks D"]:
    """Returns the states that predict the drafts of training rows. The token before each draft is the row's own.

    So a draft is judged as if those before it were right, which is when verified decoding keeps it.

    Args:
        model: Without a draft head, the masks' states are returned.
        clean_ids: The clean rows.
        groups: Their masks.
        clean: States of all clean tokens, row after row. They get no gradient.
        masks: States of all masks, row after row.
    """
    head = draft_head_of(model)
    if head is None:
        return masks
    tokens = embedded(model, clean_ids.flatten()[groups.tokens])
    with_padding = functional.pad(masks, (0, 0, 0, 1))
    state, found = clean.detach().index_select(0, groups.tokens[:, 0] - 1), []
    for place in range(groups.masks.shape[1]):
        state = head(with_padding.index_select(0, groups.masks[:, place]), tokens[:, place], state)
        found.append(state)
    states = torch.stack(found, dim=1).flatten(0, 1).to(masks.dtype)
    return with_padding.index_copy(0, groups.masks.flatten(), states)[:-1]


def embedded(model: nn.Module, ids: Int[Tensor, "*n"]) -> Float[Tensor, "*n E"]:
    """Returns rows of the embedding matrix outside the model's pass. None of the tokens may be a mask."""
    return functional.embedding(ids, stock_model(model).get_input_embeddings().weight.detach())


def save_draft_head(model: nn.Module, state_dict: dict[str, Tensor], checkpoint: Path) -> None:
    """Writes the head, if the model has one, beside an adapter's weights.

    Args:
        model: The model that may have the head.
        state_dict: The model's weights, gathered.
        checkpoint: The directory to write to.
    """
    head = draft_head_of(model)
    if head is None:
        return
    weights = {name: tensor for name, tensor in state_dict.items() if is_of_draft_head(name)}
    named = {name.rpartition(f"{_NAME}.")[2]: tensor for name, tensor in weights.items()} | {_TOKENS: head.tokens}
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
    save_file(held, checkpoint / DRAFT_HEAD_FILE)


def load_draft_head(model: nn.Module, checkpoint: Path) -> None:
    """Sets the weights of a model's draft head, if it has one, from a checkpoint."""
    head = draft_head_of(model)
    if head is not None:
        _fill(head, load_file(checkpoint / DRAFT_HEAD_FILE))


def add_draft_head(model: nn.Module, checkpoint: Path) -> None:
    """Gives a model the draft head of a checkpoint."""
    held = load_file(checkpoint / DRAFT_HEAD_FILE)
    install_draft_head(model, held[_TOKENS])
    _fill(draft_head_of(model), held)


def _fill(head: DraftHead, held: dict[str, Tensor]) -> None:
    head.tokens = held[_TOKENS].to(head.tokens.device)
    head.load_state_dict({name: tensor for name, tensor in held.items() if name != _TOKENS})


def is_of_draft_head(name: str) -> bool:
    """Returns whether a parameter's name is that of a draft head."""
    return f"{_NAME}." in name
