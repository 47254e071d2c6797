"""Engines, jobs and models of self-speculation that tests share."""

from __future__ import annotations

import torch

from decausal.diffusion.layout import Layout
from decausal.models.backbone import body_forward, head_of
from decausal.models.checkpoint import Converted
from decausal.models.facts import ConversionFacts
from decausal.objectives import head as output_head
from decausal.sampling.blocks.speculative import SpeculativeEngine
from decausal.sampling.jobs import Job, run
from decausal.sampling.rows import Row
from decausal.sampling.settings import SamplerSettings
from tests.families import FAMILIES, VOCAB_SIZE

CAUSAL = Layout("causal")


MASK = 3


_MODELS = {}


def model_of(family):
    """A random model in fp64: its best tokens are far enough apart for any order of summation."""
    if family not in _MODELS:
        _MODELS[family] = FAMILIES[family]().double().eval()
    return _MODELS[family]


def facts(shift, block_size=4, **more):
    layout = "bidirectional" if block_size is None else "block"
    return ConversionFacts("random", layout, shift, MASK, block_size=block_size, **more)


def job_of(prompt, settings, seed=0, ends=(), **options):
    row = Row((list(prompt), []), (settings.max_new_tokens,), "the prompt")
    return Job(row, settings, seed, tuple(ends), **options)


def engine_of(model, facts, max_rows=16, max_length=64, **options):
    return SpeculativeEngine(Converted(model, None, facts), max_rows=max_rows, max_length=max_length, **options)


def own(count, draft="quadratic", draft_length=None, **options):
    """Settings of verified decoding."""
    return SamplerSettings(max_new_tokens=count, speculative=True, draft=draft, draft_length=draft_length, **options)


def written(engine, jobs):
    """How each of some jobs ended."""
    ended = dict(run(engine, jobs))
    return [ended[index] for index in range(len(jobs))]


def greedy(model, prompt, max_new_tokens, ends=()):
    """The causal model's greedy text, one whole forward per token."""
    ids = list(prompt)
    head = head_of(model)._replace(banned=MASK)
    with torch.no_grad():
        while len(ids) < len(prompt) + max_new_tokens:
            state = body_forward(model, torch.tensor([ids]), CAUSAL).last_hidden_state[:, -1]
            ids.append(int(output_head.logits(state, head).argmax()))
            if ids[-1] in ends:
                break
    return ids[len(prompt) :]


def prompt_of(length, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCAB_SIZE, (length,), generator=generator).tolist()
