"""Decoding: the block engine against `transformers.generate` on the same weights, in ratios within one run.

    python benchmarks/decode.py                                         # random weights
    python benchmarks/decode.py --model DIR --data stdlib               # a converted block model on real prompts

Cases take turns, in a new order each round, so that noise of the machine falls on all of them; each ratio is the median
over rounds of a case's figure and the baseline's in the same round. The pass that reads the prompts is timed apart.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from models import DEFAULT_MODELS, add_model_arguments, build, settle_precision
from report import circumstances, console, print_by_batch_size, print_header
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from decausal.data.documents import read_documents
from decausal.data.encode import encode
from decausal.devices import clock
from decausal.models.facts import FACTS_FILE, ConversionFacts, read_facts
from decausal.sampling.blocks.engine import BlockEngine
from decausal.sampling.blocks.recording import CudaGraphs
from decausal.sampling.jobs import Job
from decausal.sampling.rows import Row
from decausal.sampling.settings import SamplerSettings

BASELINE = "transformers"
MAX_DOCUMENTS = 20_000


@dataclass(frozen=True)
class Case:
    """One way to decode with the block engine.

    Attributes:
        facts: layout, block size and shift.
        settings: schedule.
        is_fused: whether commits share a pass with the next block's first step.
        is_recorded: whether passes are CUDA graphs.
    """

    facts: ConversionFacts
    settings: SamplerSettings
    is_fused: bool = True
    is_recorded: bool = False


@dataclass
class Run:
    """What one case took for one batch.

    Attributes:
        prefill_seconds: the pass that reads the prompts.
        seconds: the passes after it.
        num_passes: how many these are.
        num_tokens: tokens that they wrote, of all rows.
        tokens_per_forward: of a row, the prompt's pass included, as the library counts it.
        passes_per_block: denoising steps of the model, mean over blocks.
        ids: what was written.
    """

    prefill_seconds: float
    seconds: float
    num_passes: int
    num_tokens: int
    tokens_per_forward: float
    passes_per_block: float
    ids: list[list[int]] = field(repr=False)


@dataclass(frozen=True)
class Workload:
    """A model, its prompts, and the ways to continue them."""

    model: PreTrainedModel
    prompts: Tensor
    num_new: int
    cases: dict[str, Case]
    engines: dict[tuple[str, int], BlockEngine] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.prompts.device

    def clock(self) -> float:
        return clock(self.device)

    @torch.no_grad()
    def transformers(self, batch_size: int) -> Run:
        """Greedy text by `generate` with its own cache; no prompt is padded, so it needs no mask."""
        prompts = self.prompts[:batch_size]
        ticks = _Ticks(self.clock)
        mask_token_id = next(iter(self.cases.values())).facts.mask_token_id
        start = self.clock()
        ids = self.model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=self.num_new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            suppress_tokens=[mask_token_id],
            logits_processor=LogitsProcessorList([ticks]),
        )
        end = self.clock()
        return Run(
            prefill_seconds=ticks.first - start,
            seconds=end - ticks.first,
            num_passes=self.num_new - 1,
            num_tokens=batch_size * (self.num_new - 1),
            tokens_per_forward=1.0,
            passes_per_block=1.0,
            ids=ids[:, prompts.shape[1] :].tolist(),
        )

    def engine_of(self, name: str, batch_size: int) -> BlockEngine:
        """The engine of a case, which later rounds use again, with the graphs that the first has recorded."""
        case, size = self.cases[name], self.cases[name].facts.block_size or 1
        if (name, batch_size) not in self.engines:
            self.engines[name, batch_size] = BlockEngine(
                self.model,
                case.facts,
                max_rows=batch_size,
                max_length=-(-(self.prompts.shape[1] + self.num_new) // size) * size,
                is_fused=case.is_fused,
                record=CudaGraphs() if case.is_recorded else None,
            )
        return self.engines[name, batch_size]

    def engine(self, name: str, batch_size: int) -> Run:
        """The same prompts by the block engine; rows never end, so that all cases write as much."""
        case, engine = self.cases[name], self.engine_of(name, batch_size)
        size = engine.block_size
        for prompt in self.prompts[:batch_size].tolist():
            row = Row((prompt, []), (case.settings.max_new_tokens,), "the prompt")
            engine.submit(Job(row, case.settings, case.settings.seed))
        start = self.clock()
        first_steps = engine.step()
        first = self.clock()
        num_passes, ended = 0, {step.ticket: step.ended for step in first_steps if step.ended}
        while engine.num_running:
            ended |= {step.ticket: step.ended for step in engine.step() if step.ended}
            num_passes += 1
        end = self.clock()
        rows = [ended[ticket] for ticket in sorted(ended)]
        num_first = sum(len(step.ids) for step in first_steps)
        num_blocks = [len(row.blocks.ids) // size for row in rows]
        num_steps = [1 + max(row.step_of_token) for row in rows]
        return Run(
            prefill_seconds=first - start,
            seconds=end - first,
            num_passes=num_passes,
            num_tokens=batch_size * self.num_new - num_first,
            tokens_per_forward=sum(len(row.ids) for row in rows) / sum(row.num_forwards for row in rows),
            passes_per_block=sum(num_steps) / sum(num_blocks),
            ids=[row.ids for row in rows],
        )


class _Ticks(LogitsProcessor):
    """Notes when the prompts have been read."""

    def __init__(self, clock: Any) -> None:
        self.clock, self.first = clock, None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.first is None:
            self.first = self.clock()
        return scores


def cases_of(facts: ConversionFacts, num_new: int, threshold: float | None, has_graphs: bool) -> dict[str, Case]:
    """The engine as an autoregressive model, and the block model with fewer and fewer steps per block; on a GPU each
    also with CUDA graphs.
    """

    def settings(**schedule: Any) -> SamplerSettings:
        return SamplerSettings(max_new_tokens=num_new, **schedule)

    causal = ConversionFacts(source=facts.source, layout="causal", shift=1, mask_token_id=facts.mask_token_id)
    cases = {"engine, AR": Case(causal, settings(num_steps=1))}
    steps = facts.block_size
    while steps:
        cases[f"block {facts.block_size}, {steps} steps"] = Case(facts, settings(num_steps=steps))
        steps //= 2
    whole = settings(num_steps=facts.block_size)
    cases[f"block {facts.block_size}, {facts.block_size} steps, unfused"] = Case(facts, whole, is_fused=False)
    if threshold is not None:
        cases[f"block {facts.block_size}, threshold {threshold}"] = Case(facts, settings(threshold=threshold))
    if has_graphs:
        cases |= {f"{name}, graphs": replace(case, is_recorded=True) for name, case in cases.items() if case.is_fused}
    return cases


def measure(work: Workload, batch_sizes: Sequence[int], rounds: int, seed: int) -> list[dict[str, Any]]:
    """Returns a record per batch size and case."""
    records = []
    for batch_size in batch_sizes:
        runs = _take_turns(work, batch_size, rounds, seed)
        for name, own in runs.items():
            pairs = list(zip(own, runs[BASELINE], strict=True))
            records.append(
                {
                    "batch_size": batch_size,
                    "case": name,
                    "prefill_seconds": median(run.prefill_seconds for run in own),
                    "seconds_per_pass": median(run.seconds / run.num_passes for run in own),
                    "pass_ratio": median(_per_pass(run) / _per_pass(base) for run, base in pairs),
                    "tokens_per_forward": own[0].tokens_per_forward,
                    "passes_per_block": own[0].passes_per_block,
                    "tokens_per_second": median(run.num_tokens / run.seconds for run in own),
                    "speed_ratio": median(_per_second(run) / _per_second(base) for run, base in pairs),
                }
            )
    return records


def _take_turns(work: Workload, batch_size: int, rounds: int, seed: int) -> dict[str, list[Run]]:
    runs: dict[str, list[Run]] = {name: [] for name in (BASELINE, *work.cases)}
    order = random.Random(seed)
    for turn in range(1 + rounds):
        for name in order.sample(list(runs), len(runs)):
            is_ours = name in work.cases
            run = work.engine(name, batch_size) if is_ours else work.transformers(batch_size)
            if turn > 0:  # the first round warms up
                runs[name].append(run)
    return runs


def _per_pass(run: Run) -> float:
    return run.seconds / run.num_passes


def _per_second(run: Run) -> float:
    return run.num_tokens / run.seconds


COLUMNS = {
    "ms/pass": lambda record: f"{record['seconds_per_pass'] * 1e3:.2f}",
    "ratio": lambda record: f"{record['pass_ratio']:.2f}",
    "tokens/forward": lambda record: f"{record['tokens_per_forward']:.2f}",
    "passes/block": lambda record: f"{record['passes_per_block']:.2f}",
    "tokens/s": lambda record: f"{record['tokens_per_second']:.0f}",
    "speed": lambda record: f"{record['speed_ratio']:.2f}",
}


def workload(args: argparse.Namespace, name: str) -> Workload:
    """The model, its prompts and cases. Facts come from the directory where it is a converted block model."""
    device = torch.device(args.device)
    model = build(name, device).to(torch.bfloat16 if args.bf16 else torch.float32).eval()
    model.config.is_causal = True  # what `generate` goes by; the engine says in each pass who reads what
    vocab_size = model.config.vocab_size
    facts = ConversionFacts(
        source=name, layout="block", block_size=args.block_size, shift=args.shift, mask_token_id=vocab_size - 1
    )
    if (Path(name) / FACTS_FILE).is_file():
        facts = read_facts(name)
        if facts.layout != "block":
            raise SystemExit(
                f"--model {name}: has layout '{facts.layout}'; give a block model or one that is not converted"
            )
    num_rows = max(args.batch_sizes)
    if args.data:
        prompts = _prompts(
            AutoTokenizer.from_pretrained(name), args.data, num_rows, args.prompt_length, args.new_tokens
        )
    else:
        generator = torch.Generator().manual_seed(args.seed)
        prompts = torch.randint(facts.mask_token_id, (num_rows, args.prompt_length), generator=generator)
    cases = cases_of(facts, args.new_tokens, args.threshold, has_graphs=device.type == "cuda")
    return Workload(model, prompts.to(device), args.new_tokens, cases)


def _prompts(tokenizer: Any, data: str, num_rows: int, length: int, num_new: int) -> Tensor:
    """Beginnings of documents, or whole prompts of one length where documents have prompts and answers long enough."""
    by_length: dict[int, list[list[int]]] = defaultdict(list)
    for record in islice(read_documents(data), MAX_DOCUMENTS):
        document = encode(record, tokenizer, append_eos=False)
        num_given = int(document.is_maskable.argmax()) or length
        if len(document.ids) >= num_given + num_new:
            by_length[num_given].append(document.ids[:num_given].tolist())
        if len(by_length[num_given]) == num_rows:
            return torch.tensor(by_length[num_given])
    found = max(map(len, by_length.values()), default=0)
    raise SystemExit(
        f"--data {data}: {found} documents begin equally long and go on for {num_new} tokens, not {num_rows}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    torch.manual_seed(args.seed)
    outcome: dict[str, Any] = circumstances() | {"models": {}}
    print_header(outcome)
    for name in args.model or DEFAULT_MODELS[args.device]:
        work = workload(args, name)
        records = measure(work, args.batch_sizes, args.rounds, args.seed)
        outcome["models"][name] = records
        dtype = str(work.model.dtype).removeprefix("torch.")
        title = f"{name}, {dtype}: {work.prompts.shape[1]} tokens given, {args.new_tokens} written"
        print_by_batch_size(title, records, COLUMNS)
        del work
    if args.device == "cuda":
        console.print(
            "with CUDA graphs: not measured; the engine captures none (docs/sampling.md says what is in the way)"
        )
    if args.json:
        args.json.write_text(json.dumps(outcome, indent=2) + "\n")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser, "weights")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--prompt_length", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--block_size", type=int, default=4, help="of models that are not converted")
    parser.add_argument("--shift", type=int, default=1, choices=(0, 1), help="of models that are not converted")
    parser.add_argument("--threshold", type=float, help="also a dynamic schedule; random weights are never sure")
    parser.add_argument("--data", help="its prompts, or beginnings of its documents; none: random tokens")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.new_tokens < 2:
        parser.error("--rounds must be at least 1 and --new_tokens at least 2")
    return settle_precision(args)


if __name__ == "__main__":
    main()
