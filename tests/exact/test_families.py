"""Identities 1, 2 and 13 on a tiny random model of every family that must convert."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from decausal.diffusion.layout import Layout
from decausal.models.adapt import adapt
from decausal.models.architecture import reach, sliding_windows
from decausal.models.backbone import body_forward, logits
from decausal.models.checkpoint import load_converted, save_converted
from decausal.models.facts import ConversionFacts
from tests.families import FAMILIES, SLIDING_WINDOW, VOCAB_SIZE, tiny_tokenizer

LENGTH = 12
BLOCK_SIZE = 3
CAUSAL, BIDIRECTIONAL, BLOCKWISE = Layout("causal"), Layout("bidirectional"), Layout("block", BLOCK_SIZE)
ONE_DOCUMENT = torch.zeros(1, LENGTH, dtype=torch.long)
PACKED = torch.tensor([[0] * 5 + [1] * 5 + [-1] * 2])

every_family = pytest.mark.parametrize("family", FAMILIES)


def row() -> Tensor:
    return torch.arange(7, 7 + 19 * LENGTH, 19)[None] % 250


@torch.no_grad()
def influence(model: PreTrainedModel, layout: Layout, document_ids: Tensor | None, layers: int) -> Tensor:
    """[query, key]: whether the state after `layers` layers at `query` changes when the token at `key` does."""
    ids = row()
    changed = torch.where(torch.eye(LENGTH, dtype=torch.bool), ids + 3, ids)
    rows = torch.cat([ids, changed])
    if document_ids is not None:
        document_ids = document_ids.repeat(len(rows), 1)
    states = body_forward(model, rows, layout, document_ids=document_ids, output_hidden_states=True).hidden_states
    change = (states[layers][1:] - states[layers][0]).abs().amax(dim=-1).T
    assert not ((change > 1e-6) & (change < 1e-5)).any(), "neither rounding nor influence"
    return change > 1e-5


def may_read(layout: Layout, document_ids: Tensor | None, distance: int | None) -> Tensor:
    """The definition of the layouts, spelled out pair by pair."""
    documents = (document_ids if document_ids is not None else ONE_DOCUMENT)[0].tolist()
    position = [index - documents.index(document) for index, document in enumerate(documents)]
    is_allowed = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    for query in range(LENGTH):
        for key in range(LENGTH):
            allowed = documents[query] == documents[key]
            if layout.kind == "causal":
                allowed &= key <= query
            if layout.kind == "block":
                allowed &= position[key] // BLOCK_SIZE <= position[query] // BLOCK_SIZE
            if distance is not None:
                allowed &= abs(query - key) <= distance
            is_allowed[query, key] = allowed
    return is_allowed


@every_family
def test_causal_layout_equals_the_source_model_bit_for_bit(family: str) -> None:
    model = FAMILIES[family]()
    with torch.no_grad():
        expected = model(row()).logits
        assert torch.equal(logits(model, row(), CAUSAL), expected)


@every_family
def test_causal_layout_still_equals_the_source_after_adapting(family: str) -> None:
    model, tokenizer = FAMILIES[family](vocab_size=VOCAB_SIZE + 4), tiny_tokenizer()
    with torch.no_grad():
        expected = model(row(), output_hidden_states=True)
        mask_token_id = adapt(model, tokenizer)
        found = body_forward(model, row(), CAUSAL, output_hidden_states=True)
        found_logits = logits(model, row(), CAUSAL)
    assert all(map(torch.equal, found.hidden_states, expected.hidden_states))
    assert torch.equal(found_logits[..., :mask_token_id], expected.logits[..., :mask_token_id])


@every_family
def test_explicit_causal_mask_equals_the_source_model_beyond_its_windows(family: str) -> None:
    model = FAMILIES[family]()
    with torch.no_grad():
        expected = model(row()).logits
        found = logits(model, row(), CAUSAL, document_ids=ONE_DOCUMENT)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@every_family
@pytest.mark.parametrize("document_ids", [None, PACKED], ids=["one document", "packed"])
@pytest.mark.parametrize("layout", [CAUSAL, BIDIRECTIONAL, BLOCKWISE], ids=lambda layout: layout.kind)
def test_a_state_sees_exactly_what_its_layout_shows(family: str, layout: Layout, document_ids: Tensor | None) -> None:
    model = FAMILIES[family]()
    window = next(iter(sliding_windows(model.config).values()))
    first_layer = may_read(layout, document_ids, None if window is None else window - 1)
    assert torch.equal(influence(model, layout, document_ids, layers=1), first_layer)
    all_layers = may_read(layout, document_ids, reach(model.config))
    assert torch.equal(influence(model, layout, document_ids, layers=2), all_layers)


@every_family
@pytest.mark.parametrize("layout", [CAUSAL, BIDIRECTIONAL, BLOCKWISE], ids=lambda layout: layout.kind)
def test_packed_documents_equal_the_documents_alone(family: str, layout: Layout) -> None:
    model = FAMILIES[family]()
    with torch.no_grad():
        packed = body_forward(model, row(), layout, document_ids=PACKED).last_hidden_state
        for part in (slice(0, 5), slice(5, 10)):
            alone = body_forward(model, row()[:, part], layout).last_hidden_state
            torch.testing.assert_close(packed[:, part], alone, rtol=1e-5, atol=1e-5)


@every_family
@pytest.mark.parametrize("num_spare_rows", [0, 4], ids=["embedding grows", "spare row"])
def test_saved_and_reloaded_gives_the_same_logits(family: str, num_spare_rows: int, tmp_path: Path) -> None:
    model, tokenizer = FAMILIES[family](vocab_size=VOCAB_SIZE + num_spare_rows), tiny_tokenizer()
    model.save_pretrained(tmp_path / "source")
    mask_token_id = adapt(model, tokenizer)
    facts = ConversionFacts(source=family, layout="bidirectional", shift=1, mask_token_id=mask_token_id)
    save_converted(tmp_path / "converted", model, tokenizer, facts)

    converted = load_converted(tmp_path / "converted")
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path / "converted", attn_implementation=model.config._attn_implementation
    )
    ids = row()[:, :SLIDING_WINDOW]
    ids[0, 1] = mask_token_id
    with torch.no_grad():
        expected = logits(model, ids, BIDIRECTIONAL)
        assert torch.equal(logits(converted.model, ids, BIDIRECTIONAL), expected)
        assert torch.equal(plain(ids).logits, expected)
    assert converted.facts == facts
    assert converted.tokenizer.mask_token_id == mask_token_id
    assert shapes(tmp_path / "converted", num_grown=num_spare_rows == 0) == shapes(tmp_path / "source")


def shapes(directory: Path, num_grown: bool = False) -> dict[str, list[int]]:
    """Names and shapes of the saved tensors, with the mask token's row taken off where it was added."""
    with safe_open(directory / "model.safetensors", "pt") as file:
        found = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return {
        name: [size - 1 if num_grown and size == VOCAB_SIZE + 1 else size for size in shape]
        for name, shape in found.items()
    }
