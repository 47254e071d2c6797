"""Finds tasks by name: the harness's tasks, those in users' files, and ours."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import Any

import jinja2
from datasets.exceptions import DatasetsError
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml

from decausal.errors import UserError, first_line, nearest
from decausal.hub import is_offline, refuse_unknown_dataset

OURS = Path(__file__).with_name("tasks")
"""Our tasks, which replace the harness's tasks of the same names."""
LOCAL = "benchmarks/local_tasks.py writes tasks for files that are here"
YAML = (".yaml", ".yml")


def load_tasks(names: Sequence[str], include_path: str | Path | None = None) -> list[Task | Group]:
    """Loads tasks and groups with their data.

    The harness's thousands of tasks are only searched for names that are in none of the given files.

    Args:
        names: Names, patterns with *, or YAML files of tasks.
        include_path: Directory of YAML files of tasks.

    Raises:
        UserError: A task is unknown (the nearest is named), data cannot be loaded, or a task would run programs in this
            process.
    """
    if not names:
        raise UserError("--tasks is empty: name at least one, as in --tasks piqa,lambada_openai")
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"--include_path {include_path} is not a directory; {LOCAL}")
    logging.getLogger("lm_eval.tasks._index").setLevel(logging.ERROR)  # ours replace some on purpose
    included = [OURS, *([] if include_path is None else [Path(include_path).resolve()])]
    manager = TaskManager(include_path=included, include_defaults=False)
    if not all(_matches(name, manager) for name in names):
        manager = TaskManager(include_path=included)
    specs = dict.fromkeys(spec for name in names for spec in _known(name, manager))
    _refuse_running_here(specs, manager)
    for name in dict.fromkeys(path for spec in specs for path in _hub_datasets(spec, manager)):
        refuse_unknown_dataset(name)
    return [item for spec in specs for item in _load(spec, manager)]


def tasks_of(loaded: Sequence[Task | Group]) -> dict[str, Any]:
    """Returns all single tasks by their names."""
    single = (task for item in loaded for task in (item.get_all_tasks() if isinstance(item, Group) else [item]))
    return {task.task_name: task for task in single}


@contextmanager
def data_errors(what: str) -> Iterator[None]:
    """Turns errors in loading data into one line.

    Raises:
        UserError: The data cannot be loaded, or lack a field that the task reads.
    """
    try:
        yield
    except (OSError, DatasetsError) as error:
        raise UserError(f"{what}: the data cannot be loaded: {first_line(error)}; {LOCAL}") from error
    except jinja2.UndefinedError as error:
        raise UserError(f"{what}: the data lack a field: {first_line(error)}; give data of the task's form") from error


def _matches(name: str, manager: TaskManager) -> list[str]:
    if name.endswith(YAML):
        return sorted(str(Path(file).resolve()) for file in glob(str(Path(name).expanduser())))
    return manager.match_tasks([name])


def _known(name: str, manager: TaskManager) -> list[str]:
    if found := _matches(name, manager):
        return found
    if name.endswith(YAML):
        raise UserError(f"there is no task file {name}; {LOCAL}")
    raise UserError(f"unknown task '{name}'{nearest(name, manager.all_tasks)}; 'lm_eval ls tasks' lists all; {LOCAL}")


def _load(spec: str, manager: TaskManager) -> list[Task | Group]:
    with data_errors(f"task '{spec}'"):
        loaded = manager.load([spec])
    outer = loaded.get("groups", {}).get(spec)
    return list(loaded["tasks"].values()) if outer is None else [outer]


def _refuse_running_here(specs: Iterable[str], manager: TaskManager) -> None:
    """Refuses code tasks that are not ours, since loading them already runs a program."""
    for spec in specs:
        entry = manager.task_index.get(spec)
        config = load_yaml(spec, resolve_func=False) if entry is None else entry.cfg or {}
        if config.get("unsafe_code") and "class" not in config:
            raise UserError(
                f"task '{config.get('task', spec)}' runs programs in this process, by the harness's own means: take "
                "humaneval, mbpp or humaneval_single_line_infilling, which run them in a contained one"
            )
        if entry is not None:
            _refuse_running_here(_members(entry), manager)


def _members(entry: Entry) -> list[str]:
    """Returns the names of the tasks in a group, or with a tag."""
    listed = (entry.cfg or {}).get("task")
    if entry.kind is Kind.TAG:
        return sorted(entry.tags)
    return [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []


def _hub_datasets(spec: str, manager: TaskManager) -> Iterator[str]:
    """Returns data sets about which the hub is asked first. `datasets` tries for a long time if the hub cannot be
    reached."""
    entry = manager.task_index.get(spec)
    if entry is None or is_offline():
        return
    for member in _members(entry):
        yield from _hub_datasets(member, manager)
    path = (entry.cfg or {}).get("dataset_path")
    if isinstance(path, str) and "/" in path and not Path(path).exists():
        yield path
