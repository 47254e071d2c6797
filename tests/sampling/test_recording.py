"""Recorded passes: what they may hold, which rows they are for, and what refuses to be recorded."""

from __future__ import annotations

from functools import partial
from typing import Any

import jaxtyping
import pytest
import torch

from decausal.devices import ON_CUDA
from decausal.diffusion.layout import Layout
from decausal.errors import UserError
from decausal.models.backbone import decoder_layers, head_of
from decausal.models.block_cache import BlockCache, decoding
from decausal.models.checkpoint import Converted
from decausal.sampling.blocks.engine import BlockEngine
from decausal.sampling.blocks.keeping import keep
from decausal.sampling.blocks.reader import Reader
from decausal.sampling.blocks.recording import CannotRecordError, CudaGraphs
from decausal.sampling.blocks.rows import BlockRows
from decausal.sampling.blocks.speculative import SpeculativeEngine
from decausal.sampling.engines import engine_for
from decausal.sampling.jobs import run
from decausal.sampling.row_settings import RowSettings
from decausal.sampling.settings import SamplerSettings
from tests.families import FAMILIES
from tests.sampling.block_decoding import MASK, VOCAB_SIZE, block_facts, job_of, sharp_model
from tests.sampling.denoising import in_order
from tests.sampling.tape import Tapes
from tests.sampling.tiny_models import converted

KINDS = [
    {"num_steps": 2},
    {"threshold": 0.9, "confidence": "margin"},
    {"entropy_bound": 1.0},
    {"num_steps": 2, "temperature": 1.0, "top_k": 5, "confidence": "entropy"},
    {"threshold": 0.5, "temperature": 1.0, "top_p": 0.8},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("block_size", [1, 4])
def test_a_pass_is_computed_on_one_device_alone(kind: dict[str, Any], shift: int, block_size: int) -> None:
    """On the device of no numbers every look at one, and every tensor from elsewhere, is an error."""
    model = FAMILIES["qwen3"](vocab_size=VOCAB_SIZE).eval().to("meta")
    device = torch.device("meta")
    rows = BlockRows(4, 64, block_size, MASK, device)
    rows.grow_ends(1)
    rows.clean_state = torch.zeros(4, model.config.hidden_size, device=device)
    reader = Reader(model, Layout("block", block_size), shift, BlockCache(model.config, 4, 64), rows)
    settings = RowSettings.of([SamplerSettings(**kind)] * 4, device)
    head = head_of(model)._replace(banned=MASK)
    for width in [1] if reader.is_autoregressive else [block_size, 2 * block_size]:
        with decoding(model):
            reported = keep(rows, 4, None, reader.predict_fixed(4, width, 64), head, settings)
        assert reported.shape == (4, 2 * block_size + 2)


def test_a_cache_that_grows_is_recorded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decausal.sampling.blocks.engine.GROWTH", 0)
    tapes = Tapes()
    engine = BlockEngine(sharp_model(), block_facts(4), max_rows=1, record=tapes)

    def num_recorded(length: int) -> int:
        settings = SamplerSettings(max_new_tokens=6, num_steps=2)
        in_order(engine, [job_of([7, 5, 9, 11, 4, 8, 6][:length], settings)])
        return tapes.num_recorded

    num_recorded(2)  # the first row gives the cache its length
    before = num_recorded(2)
    assert num_recorded(2) == before > 0
    num_recorded(7)  # longer
    assert num_recorded(2) > before


def test_graphs_without_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="need a GPU"):
        engine_for(converted(layout="block", block_size=4), max_rows=1, max_length=32, cuda_graphs=True)


def test_graphs_of_a_model_that_reads_whole_rows_are_refused() -> None:
    with pytest.raises(UserError, match="layout 'block'"):
        engine_for(converted(), max_rows=1, max_length=32, cuda_graphs=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("shift", [0, 1])
def test_graphs_write_what_passes_without_them_write(block_size: int, shift: int) -> None:
    model = sharp_model().cuda()
    rows = [
        job_of([7, 5, 9, 11, 4, 8][:length], SamplerSettings(max_new_tokens=20, **kind), seed=length)
        for length, kind in enumerate(KINDS, start=1)
    ]
    for options in ({"max_length": 32}, {"max_length": None}):
        written = []
        for record in (CudaGraphs(), None):
            engine = BlockEngine(model, block_facts(block_size, shift), max_rows=3, record=record, **options)
            written.append(in_order(engine, rows))
        assert written[0] == written[1]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("block_size", [1, 4])
def test_a_place_whose_row_filled_the_cache_is_computed_in_vain_without_harm(block_size: int, shift: int) -> None:
    """Three rows are rounded up to four, so the fourth place's old row, which ended at the last slot, runs again."""
    budgets = [20, 20, 20, 12]
    written = []
    for record in (Tapes(), None):
        engine = BlockEngine(sharp_model(), block_facts(block_size, shift), max_rows=4, max_length=24, record=record)
        jobs = [
            job_of([5] * (24 - budget), SamplerSettings(max_new_tokens=budget, num_steps=1), seed)
            for seed, budget in enumerate(budgets)
        ]
        written.append([(index, ended.ids) for index, ended in run(engine, jobs)])
    assert written[0] == written[1]
    assert written[0][0][0] == 3


def test_no_number_that_clients_choose_makes_a_recording_of_its_own() -> None:
    tapes = Tapes()
    engine = BlockEngine(sharp_model(), block_facts(4), max_rows=1, max_length=16, record=tapes)
    counts = []
    for top_k in (9, *range(9, 17)):  # the first run only makes what recordings read
        settings = SamplerSettings(max_new_tokens=6, num_steps=1, temperature=1.0, top_k=top_k)
        in_order(engine, [job_of([7, 5], settings)])
        counts.append(tapes.num_recorded)
    assert len(set(counts[1:])) == 1
    assert counts[-1] > 0


def test_recordings_are_bounded_and_the_one_not_used_for_longest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decausal.sampling.blocks.recording.MOST_RECORDINGS", 2)
    tapes = Tapes()
    engine = BlockEngine(sharp_model(), block_facts(1), max_rows=1, max_length=16, record=tapes)

    def num_made(**kind: Any) -> int:
        before = tapes.num_recorded
        in_order(engine, [job_of([7, 5], SamplerSettings(max_new_tokens=6, **kind))])
        return tapes.num_recorded - before

    drawn = {"temperature": 1.0}
    assert [num_made(), num_made(**drawn), num_made()] == [1, 1, 0]
    assert num_made(**drawn, top_k=2) == 1  # in place of those without top_k
    assert [num_made(), num_made(**drawn)] == [0, 1]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("block_size", [1, 4])
def test_what_is_recorded_ahead_is_all_that_requests_need(block_size: int, shift: int) -> None:
    """Long prompts among short ones too: they are read in passes of their own."""
    tapes = Tapes()
    settings = SamplerSettings(max_new_tokens=12, threshold=0.5)
    jobs = [job_of([5] * (1 + 5 * seed), settings, seed) for seed in range(5)]
    written = []
    for record in (tapes, None):
        engine = BlockEngine(sharp_model(), block_facts(block_size, shift), max_rows=3, max_length=40, record=record)
        engine.record_ahead(settings, num_ends=0)
        ahead = tapes.num_recorded
        written.append([(row.ids, row.blocks.step_of_token) for row in in_order(engine, jobs)])
        assert tapes.num_recorded == ahead > 0
    assert written[0] == written[1]
    assert tapes.num_replayed > len(jobs)


def cannot_record(*_: Any) -> Any:
    raise CannotRecordError("a pass of this model cannot be recorded: it asks for memory")


cannot_record.patience = 0


def test_what_cannot_be_recorded_is_the_servers_to_tell_at_its_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("decausal.sampling.engines.CudaGraphs", lambda *_: cannot_record)
    model = converted(layout="block", block_size=4)
    with pytest.raises(UserError, match="cannot be recorded: it asks for memory; leave cuda_graphs out"):
        engine_for(model, max_rows=1, max_length=32, cuda_graphs=True)
    monkeypatch.setattr("decausal.sampling.engines.choices", lambda _: ON_CUDA)
    engine_for(model, max_rows=1, max_length=32)  # nobody asked for graphs
    assert "it asks for memory; passes run as they are" in caplog.text


def test_a_request_whose_passes_cannot_be_recorded_is_answered(caplog: pytest.LogCaptureFixture) -> None:
    engine = BlockEngine(sharp_model(), block_facts(4, 0), max_rows=1, max_length=16, record=cannot_record)
    plain = BlockEngine(sharp_model(), block_facts(4, 0), max_rows=1, max_length=16)
    job = job_of([7, 5], SamplerSettings(max_new_tokens=6))
    assert in_order(engine, [job])[0].ids == in_order(plain, [job])[0].ids
    assert caplog.text.count("cannot be recorded") == 1


def test_on_a_gpu_passes_are_recorded_unless_a_flag_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    tapes = Tapes()
    monkeypatch.setattr("decausal.sampling.engines.CudaGraphs", lambda *_: tapes)
    model, verified = converted(layout="block", block_size=4), SamplerSettings(speculative=True, max_new_tokens=12)

    def verify(**options: Any) -> int:
        before = tapes.num_recorded
        in_order(engine_for(converted(), max_rows=1, max_length=32, **options), [job_of([7, 5], verified)])
        return tapes.num_recorded - before

    engine_for(model, max_rows=1, max_length=32)
    verify()
    monkeypatch.setattr("decausal.sampling.engines.choices", lambda _: ON_CUDA)
    engine_for(model, max_rows=1, max_length=32, cuda_graphs=False)
    engine_for(converted(), max_rows=1, max_length=32)  # passes over whole rows are not recorded
    engine_for(model, max_rows=1, max_length=32, is_brief=True)  # nothing is yet
    assert verify(cuda_graphs=False) == tapes.num_recorded == 0
    assert verify() > 0
    before = tapes.num_recorded
    engine_for(model, max_rows=1, max_length=32)
    assert tapes.num_recorded > before


def test_a_few_rows_are_recorded_once_their_passes_repeat() -> None:
    tapes = Tapes(patience=3)
    engine = BlockEngine(sharp_model(), block_facts(1), max_rows=1, max_length=32, record=tapes)
    plain = BlockEngine(sharp_model(), block_facts(1), max_rows=1, max_length=32)
    found = {}
    for length in (3, 4, 10):
        job = job_of([7, 5], SamplerSettings(max_new_tokens=length))
        found[length] = tapes.num_recorded, in_order(engine, [job])[0].ids == in_order(plain, [job])[0].ids
    assert found == {3: (0, True), 4: (0, True), 10: (1, True)}


@pytest.mark.parametrize("kind", [{}, {"temperature": 1.0, "top_k": 5}], ids=["greedy", "drawn"])
@pytest.mark.parametrize("draft", ["quadratic", "strided", "linear", "auto"])
@pytest.mark.parametrize("facts", [block_facts(3), block_facts(3, shift=0)], ids=["shift 1", "shift 0"])
def test_verified_decoding_writes_the_same_when_recorded(kind: dict[str, Any], draft: str, facts: Any) -> None:
    """Rows come and go, prompts are read between, and what `auto` drafts changes."""
    tapes = Tapes()
    own = SamplerSettings(max_new_tokens=18, speculative=True, draft=draft, **kind)
    jobs = [job_of([5, 7, 9, 11, 6][: 1 + seed % 5], own, seed) for seed in range(6)]
    written = []
    for record in (tapes, None):
        model = Converted(sharp_model(), None, facts)
        engine = SpeculativeEngine(model, max_rows=3, max_length=40, record=record)
        written.append([(row.ids, row.reason) for row in in_order(engine, jobs)])
    assert written[0] == written[1]
    assert 0 < tapes.num_recorded < tapes.num_replayed


def test_verified_decoding_of_any_drafts_makes_one_recording_for_a_number_of_rows() -> None:
    tapes = Tapes()
    engine = SpeculativeEngine(Converted(sharp_model(), None, block_facts(4)), max_rows=1, max_length=60, record=tapes)
    settings = SamplerSettings(max_new_tokens=50, speculative=True, draft="quadratic")
    in_order(engine, [job_of([7, 5, 9], settings)])
    assert tapes.num_recorded == 1


def test_recorded_passes_of_compiled_layers_write_what_others_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one graph for each layer, prompts apart; a layer that cannot be compiled runs as it is."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    def fails(*_: Any) -> Any:
        raise ValueError("no compiler")

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the checks of tests would be compiled, too
    compile_function, model = torch.compile, sharp_model("qwen3")
    settings = SamplerSettings(max_new_tokens=12, threshold=0.5)
    jobs = [job_of([5] * (1 + 5 * seed), settings, seed) for seed in range(3)]
    written, num_graphs = [], []
    for compiler in (None, backend, fails):
        torch._dynamo.reset()
        monkeypatch.setattr(torch, "compile", partial(compile_function, backend=compiler))
        record = None if compiler is None else Tapes()
        engine = BlockEngine(
            model, block_facts(4), max_rows=2, max_length=32, record=record, is_compiled=compiler is not None
        )
        written.append([row.ids for row in in_order(engine, jobs)])
        num_graphs.append(len(graphs))
    torch._dynamo.reset()
    assert written[0] == written[1] == written[2]
    assert num_graphs[1] == num_graphs[2] > 0 == num_graphs[0]
    assert num_graphs[1] % model.config.num_hidden_layers == 0
    assert all(layer._compiled_call_impl is None for layer in decoder_layers(model))
    targets = {node.target for node in graphs[0].graph.nodes}
    assert {"index_copy_", torch.ops.higher_order.flex_attention} <= targets, "a layer is not one graph"


def test_compiled_layers_without_recorded_passes_are_refused() -> None:
    for model in (converted(), converted(layout="block", block_size=4)):
        with pytest.raises(UserError, match="compile_layers is for block models whose passes are recorded"):
            engine_for(model, max_rows=1, max_length=32, compile_layers=True)
