"""The command `decausal plan`."""

from __future__ import annotations

import json
import sys

from decausal.verbs.convert import chosen_recipe
from decausal.verbs.flags import leading_positional, print_settings, recipe_help, slow_imports, wants_help

USAGE = """\
What a conversion will need, before it starts: memory by component, operations, hours.

  --gpu {}
                                on a GPU by its data sheet, which need not be here (default: this machine)
  --measure true|false          measure a few short steps on this machine, with random weights (default true)
  --json true|false             print one JSON object (default false)

Every other flag is one of `decausal convert`; neither data nor output_dir is needed.
"""


def run(arguments: list[str]) -> int:
    from decausal.config import read_recipe, resolve, take_flag
    from decausal.errors import UserError, nearest
    from decausal.gpus import GPUS
    from decausal.training.inputs import check_plan
    from decausal.training.settings import ConversionSettings

    if wants_help(arguments):
        print_settings("plan [MODEL]", ConversionSettings, USAGE.format("|".join(GPUS)) + recipe_help(prints=False))
        return 0
    positional, flags = leading_positional(arguments)
    if positional is not None:
        flags = ["--model_name_or_path", positional, *flags]
    flags, gpu = take_flag(flags, "gpu", "")
    flags, measures = take_flag(flags, "measure", "true")
    flags, as_json = take_flag(flags, "json", "false")
    for name, value in (("measure", measures), ("json", as_json)):
        if value not in ("true", "false"):
            raise UserError(f"--{name} {value}: give true or false")
    if gpu and gpu not in GPUS:
        raise UserError(f"--gpu {gpu}{nearest(gpu, GPUS)}; give one of {', '.join(GPUS)}")
    recipe_name, flags, lines = chosen_recipe(flags)
    settings, training = resolve(ConversionSettings, read_recipe(recipe_name), flags, where=f"recipe {recipe_name}")
    check_plan(settings, training)
    for line in lines:
        print(f"decausal: {line}", file=sys.stderr)
    with slow_imports():
        from decausal.training.planning.plan import plan

    found = plan(settings, training, gpu=gpu or None, measures=measures == "true")
    if as_json == "true":
        print(json.dumps({"model": settings.model_name_or_path, "recipe": recipe_name} | found.as_dict(), indent=2))
    else:
        from rich.console import Console

        Console().print(found.as_table(f"{settings.model_name_or_path}, {recipe_name}"))
    return 0
