"""Groups of masks after anchors: training rows of drafts, which a causal model verifies.

A draft is read in one step, from masks only. To train drafts of m tokens, a row holds its clean tokens once, and groups
of m masks. A group follows an anchor, the last known token. Its masks have the positions after the anchor, and read the
clean tokens up to it and each other. The anchor's own state predicts the next token, as in the autoregressive model. So
the k-th mask predicts the k-th token after that (shift 1).

Source: masks after every answer token, Your LLM knows the future (arXiv 2507.11851); a grid of groups, I-DLM
(arXiv 2604.11035); random anchors, DFlash (arXiv 2602.06036).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decausal.diffusion.grouping import ALL, GRID, Grouping
from decausal.diffusion.layout import positions_in_documents
from decausal.diffusion.noise import uniforms


def is_first_of_group(
    document_ids: Int[Tensor, " T"],
    is_predictable: Bool[Tensor, " T"],
    grouping: Grouping,
    length: int,
    *,
    position: int,
    seed: int,
) -> Bool[Tensor, " T"]:
    """Returns the places of a row at which groups begin, directly after their anchors.

    A group begins at a token that the model writes itself and that another one follows. Otherwise there is nothing to
    draft.

    Args:
        document_ids: 0, 1, ... inside the row, -1 for padding.
        is_predictable: Tokens that may be targets; with shift 1, never a document's first.
        grouping: Which of these places are taken.
        length: Masks of a group, m.
        position: Training row, counted from the start of the run. With `seed` it is the only source of randomness.
        seed: The run's seed.
    """
    has_next = torch.zeros_like(is_predictable)
    has_next[:-1] = is_predictable[1:] & (document_ids[1:] == document_ids[:-1])
    possible = is_predictable & has_next
    if grouping.anchors == ALL:
        return possible
    if grouping.anchors == GRID:
        return possible & (positions_in_documents(document_ids[None])[0] % length == 0)
    assert isinstance(grouping.anchors, int)
    places = possible.nonzero()[:, 0]
    order = uniforms((len(places),), position=position, seed=seed).argsort()
    chosen = torch.zeros_like(possible)
    chosen[places[order[: grouping.anchors]]] = True
    return chosen


class Groups(NamedTuple):
    """The masks of B rows, padded to the longest. They are separate rows, not parts of the clean ones.

    Attributes:
        position_ids: Those of the tokens in whose places the masks stand; 0 for padding.
        document_ids: The anchor's, -1 for padding.
        group_ids: Number of the group in its row; -1 for padding.
        first: Position of the group's first mask: clean tokens before it are read.
        target_mask: Flat index into [B*G] of each mask that predicts a token.
        target_token: Flat index into [B*T] of that token.
        offset: Of each target, which draft of its group it is: 1 to m.
        masks: Flat indices into [B*G] of each group's masks, in order. A shorter group is filled up with B*G.
        tokens: Flat indices into [B*T] of the tokens in the places of these masks, which are the last known ones before
            each draft. If a group continues beyond its row, that is the row's last token.
    """

    position_ids: Int[Tensor, "B G"]
    document_ids: Int[Tensor, "B G"]
    group_ids: Int[Tensor, "B G"]
    first: Int[Tensor, "B G"]
    target_mask: Int[Tensor, " n"]
    target_token: Int[Tensor, " n"]
    offset: Int[Tensor, " n"]
    masks: Int[Tensor, "g m"]
    tokens: Int[Tensor, "g m"]


def groups_of(
    is_first: Bool[Tensor, "B T"],
    document_ids: Int[Tensor, "B T"],
    is_predictable: Bool[Tensor, "B T"],
    lengths: Int[Tensor, " B"],
    context_length: int | None = None,
    row_multiple: int = 1,
) -> Groups:
    """Builds the groups of rows.

    A group is whole even if its document ends earlier, as at decoding. Its last masks then predict nothing. Positions
    beyond the model's context become its last position, as at decoding.

    Args:
        is_first: From `is_first_of_group`.
        document_ids: Document of each token, -1 for padding.
        is_predictable: Tokens that may be targets.
        lengths: Masks of a group in each row, m.
        context_length: Number of positions the model has. None: no limit.
        row_multiple: Rows are padded to a multiple of this.
    """
    num_rows, row_length = document_ids.shape
    of_row = is_first.sum(dim=1) * lengths
    width = -(-max(int(of_row.max()), 1) // row_multiple) * row_multiple
    group_row, group_column = is_first.nonzero(as_tuple=True)

    # One entry per mask: its group, counted over all rows, and its place in the group.
    of_group = lengths[group_row]
    group = torch.arange(len(group_row)).repeat_interleave(of_group)
    member = torch.arange(len(group)) - _before(of_group)[group]
    row, column = group_row[group], group_column[group]
    place = row * width + torch.arange(len(group)) - _before(of_row)[row]
    document, first = document_ids[row, column], positions_in_documents(document_ids)[row, column]
    position = first + member
    if context_length is not None:
        position = position.clamp(max=context_length - 1)

    def rows_of(values: Int[Tensor, " masks"], padding: int) -> Int[Tensor, "B G"]:
        return torch.full((num_rows * width,), padding).scatter(0, place, values).view(num_rows, width)

    token = column + member + 1
    inside = token.clamp(max=row_length - 1)
    is_target = (token < row_length) & (document_ids[row, inside] == document) & is_predictable[row, inside]
    most = int(lengths.max())
    members = torch.arange(most)
    starts = group_row * width + _before(of_group) - _before(of_row)[group_row]
    is_member = members < of_group[:, None]
    tokens = (group_column[:, None] + members).clamp(max=row_length - 1)
    return Groups(
        position_ids=rows_of(position, 0),
        document_ids=rows_of(document, -1),
        group_ids=rows_of(group - _before(is_first.sum(dim=1))[row], -1),
        first=rows_of(first, 0),
        target_mask=place[is_target],
        target_token=(row * row_length + token)[is_target],
        offset=(member + 1)[is_target],
        masks=torch.where(is_member, starts[:, None] + members, num_rows * width),
        tokens=group_row[:, None] * row_length + tokens,
    )


def visible_to_groups(
    groups: Groups,
    clean_documents: Int[Tensor, "B T"],
    clean_positions: Int[Tensor, "B T"],
    window: int | None = None,
    *,
    causal: bool = False,
) -> Bool[Tensor, "B G T+G"]:
    """Returns which keys each mask reads: first of the clean tokens, then of the masks.

    Padding reads padding, so that no query lacks a key.

    Args:
        groups: The masks.
        clean_documents: Documents of the clean tokens, -1 for padding.
        clean_positions: Their positions in their documents.
        window: Sliding window in tokens, see `decausal.diffusion.layout.visible`.
        causal: Masks read no later ones of their group.
    """
    query_document, query_position = groups.document_ids[..., None], groups.position_ids[..., None]
    is_real = query_document >= 0
    same_document = query_document == clean_documents[:, None]
    reads_clean = is_real & same_document & (clean_positions[:, None] < groups.first[..., None])
    reads_masks = groups.group_ids[..., None] == groups.group_ids[:, None]
    if causal:
        place = torch.arange(groups.group_ids.shape[1], device=groups.group_ids.device)
        reads_masks = reads_masks & (place <= place[:, None])
    is_visible = torch.cat([reads_clean, reads_masks], dim=2)
    if window is None:
        return is_visible
    key_position = torch.cat([clean_positions, groups.position_ids], dim=1)[:, None]
    return is_visible & ((query_position - key_position).abs() < window)


def offset_weights(offset: Int[Tensor, " n"], gamma: float | None) -> Float[Tensor, " n"]:
    """Returns the weight of each draft by its place k in the group: exp(-(k - 1) / gamma), or 1 without a gamma.

    A draft is kept only if all before it are right, so the first ones matter most.

    Source: DFlash (arXiv 2602.06036), section 3.
    """
    return torch.exp(-(offset - 1) / (math.inf if gamma is None else gamma))


def _before(counts: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Returns the sum of the counts before each."""
    return counts.cumsum(0) - counts
