"""Runs tasks of lm-evaluation-harness with a converted model, and with the AR model that it was made from."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval import evaluator, simple_evaluate
from lm_eval.api.group import Group
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from decausal.errors import UserError
from decausal.evaluation.harness.code_tasks import CodeTask, prepare
from decausal.evaluation.harness.contained import enforced
from decausal.evaluation.harness.model import NUM_SAMPLES, DecausalLM
from decausal.evaluation.harness.scores import HarnessScores, data_hash_of, mask_errors_of, scores_of, texts_of
from decausal.evaluation.harness.source import SourceLM
from decausal.evaluation.harness.tasks_by_name import data_errors, load_tasks, tasks_of
from decausal.evaluation.source import source_of
from decausal.provenance import provenance

BOOTSTRAP_ITERATIONS = 1000


@dataclass(frozen=True)
class HarnessSettings:
    """Settings for the harness.

    Attributes:
        num_fewshot: Examples before each question. None: the task's own number.
        limit: Examples of each task, or a share of them if below 1. None: all.
        batch_size: Requests in the model at once.
        apply_chat_template: Whether requests go through the tokenizer's chat template.
        system_instruction: A system prompt.
        fewshot_as_multiturn: Whether examples are separate turns, with a chat template.
        gen_kwargs: Generation settings that override a task's own.
        likelihood, num_samples, max_length, dtype, seed, sampler: See `DecausalLM`.
        use_cache: Directory in which answers are kept, so that an interrupted run can continue.
        with_source: Whether to run the AR source too.
        allow_code_execution: Whether to run a model's programs, in a contained process.
        num_answers: Programs for each problem of a code task.
        ks: The k for which pass@k is reported.
    """

    num_fewshot: int | None = None
    limit: float | int | None = None
    batch_size: int = 16
    apply_chat_template: bool = False
    system_instruction: str | None = None
    fewshot_as_multiturn: bool = True
    gen_kwargs: dict[str, Any] = field(default_factory=dict)
    likelihood: str = "auto"
    num_samples: int = NUM_SAMPLES
    max_length: int | None = None
    dtype: str = "auto"
    seed: int = 0
    sampler: dict[str, Any] = field(default_factory=dict)
    use_cache: str | None = None
    with_source: bool = False
    allow_code_execution: bool = False
    num_answers: int = 1
    ks: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit <= 0:
            raise UserError(f"--limit {self.limit:g}: must be above 0")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UserError(f"--num_fewshot {self.num_fewshot}: must be at least 0")


def evaluate_harness(
    directory: str | Path,
    tasks: Sequence[str],
    settings: HarnessSettings | None = None,
    *,
    include_path: str | Path | None = None,
    device: str | None = None,
) -> HarnessScores:
    """Scores a converted model on tasks of lm-evaluation-harness.

    Args:
        directory: What `decausal convert` wrote, or its id on the hub.
        tasks: Names of tasks, groups and tags, patterns, or YAML files.
        settings: The settings. None: the defaults.
        include_path: Directory of YAML files of tasks.
        device: None: CUDA where there is one, else the CPU.

    Raises:
        UserError: There is no such model or task, data cannot be loaded or lack a field, or a setting is bad.
    """
    settings = settings or HarnessSettings()
    loaded = load_tasks(tasks, include_path)
    prepare(
        list(tasks_of(loaded).values()),
        may_run=settings.allow_code_execution,
        num_answers=settings.num_answers,
        ks=settings.ks,
        is_drawn=bool(settings.gen_kwargs.get("temperature")),
    )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it logs its own settings; errors are raised
    model = DecausalLM(
        str(directory),
        dtype=settings.dtype,
        device=device,
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        likelihood=settings.likelihood,
        num_samples=settings.num_samples,
        seed=settings.seed,
        **settings.sampler,
    )
    results = run_tasks(model, loaded, settings, _identity(directory, model))
    source, missing = _source_results(model, loaded, settings) if settings.with_source else (None, None)
    return HarnessScores(
        scores=scores_of(results, source),
        model={"directory": str(directory), **model.get_model_info()},
        mask_errors=mask_errors_of(results),
        settings={
            **asdict(settings),
            "tasks": list(tasks),
            "made_of": {name: _made_of(task, model) for name, task in tasks_of(loaded).items()},
            "num_shots": results["n-shot"],
            "task_versions": results["versions"],
            "programs": _fences(loaded),
            "lm_eval": version("lm_eval"),
            "provenance": provenance(),
        },
        source_missing=missing,
        speed=model.writer.spent.as_dict(),
        texts=texts_of(results, model.tok_encode),
        data_hash=data_hash_of(results),
    )


def _source_results(
    model: DecausalLM, loaded: Sequence[Task | Group], settings: HarnessSettings
) -> tuple[dict[str, Any] | None, str | None]:
    """Returns the harness's results of the AR source, or why there are none."""
    facts = model.converted.facts
    try:
        source = source_of(model.converted)
    except UserError as error:
        return None, str(error)
    harness_model = SourceLM(
        pretrained=source,
        tokenizer=model.tokenizer,
        batch_size=settings.batch_size,
        max_length=settings.max_length,
    )
    identity = {"source": _files(facts.source), "revision": facts.source_revision, "dtype": str(source.dtype)}
    return run_tasks(harness_model, loaded, settings, identity), None


def run_tasks(
    model: LM, loaded: Sequence[Task | Group], settings: HarnessSettings, identity: dict[str, Any]
) -> dict[str, Any]:
    """Returns the harness's own results of a model. `identity` keeps its answers apart in the cache."""
    with data_errors("a task"), _in_silence():
        results = simple_evaluate(
            model=model,
            tasks=list(loaded),
            task_manager=TaskManager(include_defaults=False),  # otherwise it searches thousands of files
            num_fewshot=settings.num_fewshot,
            batch_size=settings.batch_size,
            limit=settings.limit,
            use_cache=_cache_file(settings.use_cache, identity),
            bootstrap_iters=BOOTSTRAP_ITERATIONS,
            apply_chat_template=settings.apply_chat_template,
            system_instruction=settings.system_instruction,
            fewshot_as_multiturn=settings.fewshot_as_multiturn and settings.apply_chat_template,
            confirm_run_unsafe_code=settings.allow_code_execution,
            gen_kwargs=settings.gen_kwargs or None,
        )
    return dict(results)


@contextmanager
def _in_silence() -> Iterator[None]:
    """Stops the harness from printing about bootstraps and from describing the machine and the current directory.

    The description starts pip, git and other programs, which takes seconds and prints errors outside a repository. Our
    own record has these facts.
    """
    describe, commit = evaluator.add_env_info, evaluator.get_git_commit_hash
    evaluator.add_env_info = lambda _: None
    evaluator.get_git_commit_hash = lambda: None
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            yield
    finally:
        evaluator.add_env_info, evaluator.get_git_commit_hash = describe, commit


def _cache_file(directory: str | None, identity: dict[str, Any]) -> str | None:
    """Returns where answers of this model with these settings are kept. The harness's own key is only the question."""
    if directory is None:
        return None
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    return str(Path(directory).expanduser() / digest[:16])


def _identity(directory: str | Path, model: DecausalLM) -> dict[str, Any]:
    return {"model": _files(directory), **model.get_model_info(), "max_length": model.max_length}


def _files(model_name_or_path: str | Path) -> Any:
    """Returns what identifies a model: names, sizes and times of a directory's files, else its name."""
    directory = Path(model_name_or_path).expanduser()
    if not directory.is_dir():
        return str(model_name_or_path)
    weights = [*directory.glob("*.safetensors"), *directory.glob("*.bin"), *directory.glob("*.json")]
    return sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weights)


def _fences(loaded: Sequence[Task | Group]) -> dict[str, bool] | None:
    """Returns the limits that held for programs, or None if none were run."""
    has_run = any(isinstance(task, CodeTask) and task.may_run for task in tasks_of(loaded).values())
    return enforced() if has_run else None


def _made_of(task: Any, model: DecausalLM) -> str:
    """Returns what a task's scores come from: written texts, or a kind of likelihood."""
    if task.OUTPUT_TYPE == "generate_until":
        return "texts"
    return "causal likelihood" if model.likelihood == "causal" else f"NELBO, {model.num_samples} masks"
