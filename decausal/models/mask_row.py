"""Frozen embeddings with a mask token that still learns.

The mask token's input row is a separate parameter, `[D]`, which a forward hook puts in place of the frozen matrix's
row. So the frozen matrix has no gradient and no optimiser state, and the row has both. Checkpoints hold the row inside
the matrix, with the source model's names and shapes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from decausal.errors import UserError
from decausal.models.backbone import stock_model
from decausal.models.facts import MASK_ROW_FILE

MASK_ROW = "mask_row"


def freeze_embeddings(model: nn.Module, mask_token_id: int) -> None:
    """Freezes the input embeddings and the output head. The mask token's input row stays trainable.

    Call it after wrapping with PEFT, which freezes every parameter that it finds. Calling it again is harmless. With
    tied embeddings the head's mask row keeps its initial value, since the mask token is never predicted.

    Args:
        model: A stock causal LM, or a PEFT wrapper around one; changed in place.
        mask_token_id: The mask token's id.
    """
    stock = stock_model(model)
    embedding = stock.get_input_embeddings()
    for frozen in (embedding, stock.get_output_embeddings()):
        frozen.requires_grad_(False)
    if not hasattr(embedding, MASK_ROW):
        embedding.mask_token_id = mask_token_id
        embedding.register_parameter(MASK_ROW, nn.Parameter(embedding.weight[mask_token_id].detach().clone()))
        embedding.register_forward_hook(_put_mask_row_in_place)
    embedding.mask_row.requires_grad_(True)


def fold_mask_row(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a state dict with the trained mask row in its place in the embedding matrix, as checkpoints hold it.

    The model keeps its own tensors, and the matrix is copied once. A state dict without a mask row is returned
    unchanged.

    Args:
        model: The model of the `state_dict`, which shows which entries are the (tied) embedding matrix.
        state_dict: Its names may carry the prefixes of a PEFT wrapper.
    """
    row_names = [name for name in state_dict if name.rpartition(".")[2] == MASK_ROW]
    if not row_names:
        return state_dict
    stock = stock_model(model)
    embedding = stock.get_input_embeddings()
    parameters = dict(stock.named_parameters(remove_duplicate=False))
    inner_row_name = next(name for name, parameter in parameters.items() if parameter is embedding.mask_row)
    prefix = row_names[0].removesuffix(inner_row_name)
    matrix_names = [prefix + name for name, parameter in parameters.items() if parameter is embedding.weight]
    folded = {name: tensor for name, tensor in state_dict.items() if name != row_names[0]}
    matrix_names = [name for name in matrix_names if name in folded]
    matrix = folded[matrix_names[0]].detach().clone()
    matrix[embedding.mask_token_id] = state_dict[row_names[0]].to(matrix)
    return folded | dict.fromkeys(matrix_names, matrix)


def save_mask_row(state_dict: dict[str, Tensor], checkpoint: Path) -> None:
    """Writes the row, if there is one, beside an adapter's weights, whose files do not hold embeddings."""
    for name, tensor in state_dict.items():
        if name.rpartition(".")[2] == MASK_ROW:
            save_file({MASK_ROW: tensor.detach().cpu()}, checkpoint / MASK_ROW_FILE)


def load_mask_row(model: nn.Module, checkpoint: Path | None = None) -> None:
    """Sets the trainable row after loading a checkpoint, from its own file or else from the loaded matrix.

    A model without such a row is not changed.
    """
    embedding = stock_model(model).get_input_embeddings()
    if not hasattr(embedding, MASK_ROW):
        return
    row = None if checkpoint is None else read_mask_row(checkpoint)
    with torch.no_grad():
        embedding.mask_row.copy_(embedding.weight[embedding.mask_token_id] if row is None else row)


def read_mask_row(checkpoint: Path) -> Tensor | None:
    """Returns the row beside an adapter's weights, if there is one."""
    path = checkpoint / MASK_ROW_FILE
    return load_file(path)[MASK_ROW] if path.is_file() else None


def required_mask_row(checkpoint: Path) -> Tensor:
    """Returns the row beside an adapter's weights, without which it would read an untrained one.

    Raises:
        UserError: There is no such row.
    """
    row = read_mask_row(checkpoint)
    if row is None:
        raise UserError(f"{checkpoint} lacks {MASK_ROW_FILE}, the mask token's row; fetch it again")
    return row


def put_mask_row(model: nn.Module, mask_token_id: int, checkpoint: Path) -> None:
    """Puts the row beside an adapter's weights into the matrix of a stock model.

    Raises:
        UserError: There is no such row.
    """
    row = required_mask_row(checkpoint)
    weight = stock_model(model).get_input_embeddings().weight
    with torch.no_grad():
        weight[mask_token_id] = row.to(weight)


def settle_mask_row(model: nn.Module) -> None:
    """Undoes `freeze_embeddings`: the row goes back into its matrix, and the model is stock again."""
    embedding = stock_model(model).get_input_embeddings()
    if not hasattr(embedding, MASK_ROW):
        return
    with torch.no_grad():
        embedding.weight[embedding.mask_token_id] = embedding.mask_row
    for key, hook in list(embedding._forward_hooks.items()):
        if hook is _put_mask_row_in_place:
            del embedding._forward_hooks[key]
    del embedding.mask_row, embedding.mask_token_id


def scaled_as_embeddings(row: Tensor, embedding: nn.Module, output: Tensor) -> Tensor:
    """Returns a row in the form of the embedding's output: in its dtype, and scaled if the embedding scales."""
    row = row.to(output.dtype)
    scale = getattr(embedding, "embed_scale", None)  # Gemma-3 multiplies inside its embedding module
    return row if scale is None else row * (scale.to(row.dtype) if isinstance(scale, Tensor) else scale)


def _put_mask_row_in_place(embedding: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    row = scaled_as_embeddings(embedding.mask_row, embedding, output)
    return torch.where((args[0] == embedding.mask_token_id)[..., None], row, output)
