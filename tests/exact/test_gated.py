"""Identity 15: a gated conversion is its source, bit for bit, and its masks see what they will see at decoding."""

from __future__ import annotations

import pytest
import torch

from decausal.data.group_collator import GroupCollator
from decausal.data.stream import places_of_groups
from decausal.diffusion.grouping import Grouping
from decausal.diffusion.layout import Layout, positions_in_documents
from decausal.models.architecture import sliding_windows
from decausal.models.backbone import body_forward, logits
from decausal.models.block_cache import BlockCache, cached_forward, decoding
from decausal.models.checkpoint import Converted
from decausal.models.draft_head import draft_head_of, install_draft_head
from decausal.models.facts import ConversionFacts
from decausal.models.gated import gated_mask_token_id, without_masks
from decausal.models.grouped import grouped_forward
from decausal.sampling.blocks.speculative import SpeculativeEngine
from decausal.sampling.settings import SamplerSettings
from tests.exact.speculation import job_of, prompt_of, written
from tests.families import FAMILIES, VOCAB_SIZE
from tests.gated_models import gated

KINDS = ("qwen3", "llama", "gemma3", "mistral", "gpt2", "gpt_neox")
CAUSAL = Layout("causal")


def source_of(family):
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def packed(num_rows=2, length=14):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(5, VOCAB_SIZE, (num_rows, length), generator=generator)
    documents = torch.zeros(num_rows, length, dtype=torch.long)
    documents[0, 8:] = 1
    documents[1, 11:] = -1
    is_predictable = (documents >= 0) & (positions_in_documents(documents) > 2)
    return ids, documents, is_predictable


def items_of(ids, documents, is_predictable, grouping):
    items = []
    for row in range(len(ids)):
        item = {"clean_ids": ids[row], "document_ids": documents[row], "is_predictable": is_predictable[row]}
        items.append(item | places_of_groups(item, grouping, position=row, seed=0, num_rows=len(ids)))
    return items


@pytest.mark.parametrize("family", KINDS)
def test_text_without_masks_has_the_logits_of_the_source_bit_for_bit_whatever_the_adapter(family):
    source = source_of(family)
    student = gated(source, scale=3.0)
    ids = torch.tensor([prompt_of(12, 3)])
    with torch.no_grad():
        expected = logits(source, ids, CAUSAL)
        assert torch.equal(logits(student, ids, CAUSAL), expected)
        with without_masks(student):
            assert torch.equal(logits(student, ids, CAUSAL), expected)
        with_masks = logits(student, torch.full_like(ids, gated_mask_token_id(source)), CAUSAL)
    assert with_masks.isfinite().all()
    assert not torch.allclose(with_masks, expected)


@pytest.mark.parametrize("family", KINDS)
def test_known_tokens_of_a_pass_that_holds_masks_too_have_the_states_of_the_source(family):
    source = source_of(family)
    student = gated(source, scale=3.0)
    mask = gated_mask_token_id(source)
    ids = torch.tensor([prompt_of(9, 4)])
    with_masks = torch.cat([ids, torch.full((1, 3), mask)], dim=1)
    with torch.no_grad():
        expected = body_forward(source, torch.cat([ids, ids[:, :3]], dim=1), CAUSAL).last_hidden_state[:, :9]
        found = body_forward(student, with_masks, CAUSAL).last_hidden_state[:, :9]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("causal_groups", [False, True])
@pytest.mark.parametrize("family", KINDS)
def test_the_clean_half_of_a_training_row_is_the_source_whatever_groups_stand_behind_it(family, causal_groups):
    source = source_of(family)
    student = gated(source, scale=3.0)
    ids, documents, is_predictable = packed()
    batch = GroupCollator()(items_of(ids, documents, is_predictable, Grouping((3,), "all")))
    with torch.no_grad():
        expected = body_forward(source, ids, CAUSAL, document_ids=documents).last_hidden_state
    states = grouped_forward(
        student,
        ids,
        batch["groups"],
        gated_mask_token_id(source),
        document_ids=documents,
        causal_groups=causal_groups,
        clean_gradient=False,
    )
    clean = states.last[: ids.numel()]
    assert torch.equal(clean, expected.flatten(0, 1))


@pytest.mark.parametrize("causal_groups", [False, True])
@pytest.mark.parametrize("family", KINDS)
def test_masks_of_a_training_row_have_the_states_that_they_have_behind_a_prefix_alone(family, causal_groups):
    source = source_of(family).double()
    student = gated(source, scale=0.3)
    mask, length = gated_mask_token_id(source), 3
    ids, documents, is_predictable = packed()
    batch = GroupCollator()(items_of(ids, documents, is_predictable, Grouping((length,), "all")))
    groups = batch["groups"]
    states = grouped_forward(
        student, ids, groups, mask, document_ids=documents, causal_groups=causal_groups, clean_gradient=False
    )
    masks = states.last[ids.numel() :].unflatten(0, groups.position_ids.shape)
    num_checked = 0
    for row, place in (groups.group_ids >= 0).nonzero().tolist():
        if place % length:
            continue
        document, first = groups.document_ids[row, place], int(groups.first[row, place])
        prefix = ids[row, documents[row] == document][:first]
        expected = behind_prefix(student, prefix, mask, length, causal_groups)
        assert torch.allclose(masks[row, place : place + length], expected, atol=1e-9)
        num_checked += 1
    assert num_checked > 6


def behind_prefix(student, prefix, mask, length, causal_groups):
    """States of masks after a prefix, by the cache that decodes."""
    total = len(prefix) + length
    ids = torch.cat([prefix, torch.full((length,), mask)])[None]
    position = torch.arange(total)
    last_visible = position.clone()
    if not causal_groups:
        last_visible[len(prefix) :] = total - 1
    is_visible = torch.arange(total) <= last_visible[:, None]
    windows = {}
    with decoding(student):
        config = student.get_base_model().base_model.config
        for kind, window in sliding_windows(config).items():
            near = (position[:, None] - position).abs() < (window or total)
            windows[kind] = (is_visible & near)[None]
        cache = BlockCache(config, 1, total)
        only = next(iter(windows.values())) if len(windows) == 1 else windows
        return cached_forward(student, ids, position[None], position[None], only, cache)[0, len(prefix) :]


def test_a_causal_group_is_the_beginning_of_a_longer_one():
    source = source_of("qwen3").double()
    student = gated(source, scale=0.3)
    ids, documents, is_predictable = packed()
    found = {}
    for length in (2, 4):
        batch = GroupCollator()(items_of(ids, documents, is_predictable, Grouping((length,), "all")))
        groups = batch["groups"]
        states = grouped_forward(
            student,
            ids,
            groups,
            gated_mask_token_id(source),
            document_ids=documents,
            causal_groups=True,
            clean_gradient=False,
        )
        masks = states.last[ids.numel() :].unflatten(0, groups.position_ids.shape)
        found[length] = masks[groups.group_ids >= 0].unflatten(0, (-1, length))
    assert torch.allclose(found[2], found[4][:, :2], atol=1e-9)


def states_with_heads(source, lengths, *, scale):
    """States of groups of some lengths in two rows, from the same adapters without and with a draft head."""
    ids, documents, is_predictable = packed()
    items = items_of(ids, documents, is_predictable, Grouping((max(lengths),), "all"))
    for item, length in zip(items, lengths, strict=True):
        item["group_length"] = torch.tensor(length)
    groups = GroupCollator()(items)["groups"]
    found = []
    for head in (False, True):
        student = gated(source, 0.3, head=head)
        if head:
            for parameter in draft_head_of(student).parameters():
                torch.nn.init.normal_(parameter, std=scale)
        with torch.no_grad():
            found.append(
                grouped_forward(student, ids, groups, gated_mask_token_id(source), document_ids=documents).last
            )
    return ids, groups, student, *found


@pytest.mark.parametrize("lengths", [(3, 3), (2, 4)])
def test_a_draft_head_carries_a_state_from_draft_to_draft_and_reads_the_token_before_each(lengths):
    source = source_of("qwen3").double()
    ids, groups, student, plain, joined = states_with_heads(source, lengths, scale=0.2)
    assert torch.equal(plain[: ids.numel()], joined[: ids.numel()])
    head, embedding = draft_head_of(student), source.get_input_embeddings().weight
    masks = [rows[ids.numel() :].unflatten(0, groups.position_ids.shape) for rows in (plain, joined)]
    clean = plain[: ids.numel()].unflatten(0, ids.shape)
    num_checked = 0
    for row, length in enumerate(lengths):
        start = 0
        while start < groups.group_ids.shape[1] and groups.group_ids[row, start] >= 0:
            of_document = (groups.document_ids[row, start] == packed()[1][row]).nonzero()[:, 0]
            column = int(of_document[groups.first[row, start]])
            state = clean[row, column - 1][None]
            for place in range(length):
                token = ids[row, min(column + place, ids.shape[1] - 1)]
                state = head(masks[0][row, start + place][None], embedding[token][None], state)
                assert torch.allclose(masks[1][row, start + place], state[0], atol=1e-10)
                num_checked += 1
            start += length
    assert num_checked > 20


def test_a_new_draft_head_adds_nothing():
    _, _, student, plain, joined = states_with_heads(source_of("qwen3"), (3, 3), scale=0.0)
    assert torch.equal(plain, joined)
    install_draft_head(student, torch.arange(VOCAB_SIZE))
    assert not draft_head_of(student).down.weight.any()


def test_gradients_reach_the_adapters_and_the_mask_row_and_nothing_else():
    source = source_of("qwen3")
    student = gated(source, scale=0.1).train()
    ids, documents, is_predictable = packed()
    batch = GroupCollator()(items_of(ids, documents, is_predictable, Grouping((3,), "all")))
    states = grouped_forward(
        student, ids, batch["groups"], gated_mask_token_id(source), document_ids=documents, clean_gradient=False
    )
    states.last[batch["target_index"]].square().sum().backward()
    reached = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert reached == {name for name in dict(student.named_parameters()) if "lora_" in name or "mask_row" in name}
    assert student.get_base_model().get_input_embeddings().mask_row.grad.abs().sum() > 0


@pytest.mark.parametrize(("scale", "head"), [(0.0, False), (0.1, False), (3.0, False), (0.1, True), (3.0, True)])
@pytest.mark.parametrize("family", KINDS)
def test_verified_decoding_of_a_gated_model_writes_the_text_of_the_source(family, scale, head):
    source = source_of(family)
    student = gated(source, scale, head=head).get_base_model()
    student.generation_config = source.generation_config
    mask = gated_mask_token_id(source)
    facts = ConversionFacts("random", "block", 1, mask, 3, causal_context=True, weights="gated", draft_head=head)
    engine = SpeculativeEngine(Converted(student, None, facts), max_rows=3, max_length=64)
    prompts = [prompt_of(length, length) for length in (1, 5, 9, 3)]
    settings = SamplerSettings(max_new_tokens=12, speculative=True)
    ended = written(engine, [job_of(prompt, settings) for prompt in prompts])
    for prompt, row in zip(prompts, ended, strict=True):
        assert row.ids == greedy_of_source(source, prompt, 12)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.7}, {"temperature": 1.5, "top_k": VOCAB_SIZE - 1}, {"top_p": 0.8}]
)
@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_drawn_text_is_that_of_the_source_with_the_same_seed_whatever_the_draft_head(family, options):
    source = source_of(family)
    student = gated(source, 0.3, head=True).get_base_model()
    student.generation_config = source.generation_config
    mask = gated_mask_token_id(source)
    facts = ConversionFacts("random", "block", 1, mask, 3, causal_context=True, weights="gated", draft_head=True)
    prompts = [prompt_of(length, length) for length in (1, 5, 9)]
    texts = []
    for drafts in ({"draft_length": 0}, {"draft": "quadratic"}, {"draft": "strided"}):
        settings = SamplerSettings(**{"max_new_tokens": 12, "temperature": 1.0, "speculative": True} | drafts | options)
        engine = SpeculativeEngine(Converted(student, None, facts), max_rows=2, max_length=64)
        jobs = [job_of(prompt, settings, seed) for seed, prompt in enumerate(prompts)]
        texts.append([row.ids for row in written(engine, jobs)])
    assert texts[0] == texts[1] == texts[2]


def test_adapters_take_no_time_in_passes_without_drafts(monkeypatch):
    source = source_of("qwen3")
    student = gated(source).get_base_model()
    facts = ConversionFacts("random", "block", 1, gated_mask_token_id(source), 3, causal_context=True, weights="gated")
    engine = SpeculativeEngine(Converted(student, None, facts), max_rows=1, max_length=32)
    for name, module in student.named_modules():
        if "lora_" in name and isinstance(module, torch.nn.Linear):
            monkeypatch.setattr(module, "forward", lambda *_: pytest.fail("an adapter was run"))
    settings = SamplerSettings(max_new_tokens=6, speculative=True, draft_length=0)
    (row,) = written(engine, [job_of(prompt_of(4, 4), settings)])
    assert row.ids == greedy_of_source(source, prompt_of(4, 4), 6)


def greedy_of_source(source, prompt, max_new_tokens):
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(max_new_tokens):
            ids = torch.cat([ids, logits(source, ids, CAUSAL)[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].tolist()
