"""The command `decausal compare`."""

from __future__ import annotations

from dataclasses import fields

from decausal.errors import UserError
from decausal.verbs.flags import leading_positional, print_settings, slow_imports, wants_help

_HELP = (
    "  --set ARM.KEY=VALUE           a setting of one arm; may be given several times\n"
    "  --json                        print report.json instead of showing progress\n"
    "  --KEY VALUE                   any setting of `decausal convert`, for all arms\n\n"
)


def run(arguments: list[str]) -> int:
    from decausal.compare.settings import CompareSettings

    if wants_help(arguments):
        print_settings("compare [MODEL]", CompareSettings, _HELP)
        return 0
    from decausal.config import ALIASES, parse_flags, resolve_own

    positional, flags = leading_positional(arguments)
    flags, overrides = _overrides(flags)
    values = {ALIASES.get(key, key): value for key, value in parse_flags(flags).items()}
    is_json = values.pop("json", "false") in (True, "true")
    if positional is not None:
        values["model_name_or_path"] = positional
    own = {field.name for field in fields(CompareSettings)}
    settings = resolve_own(
        CompareSettings,
        [f"--{key}" if value is True else f"--{key}={value}" for key, value in values.items() if key in own],
    )
    from decausal.compare.arms import read_arms

    arms = read_arms(settings.recipes, overrides, {key: value for key, value in values.items() if key not in own})
    from decausal.compare.inputs import check_inputs

    check_inputs(settings, arms)
    with slow_imports():
        from rich.console import Console

        from decausal.compare.run import run_compare
        from decausal.privacy import without_paths_in
    console = Console(stderr=True, quiet=True) if is_json else None
    found = run_compare(settings, arms, console, f"decausal compare {without_paths_in(arguments)}".strip())
    if is_json:
        import json

        print(json.dumps(found.as_dict(), indent=2, ensure_ascii=False))
    return 0


def _overrides(flags: list[str]) -> tuple[list[str], list[str]]:
    """Takes every `--set` out of the flags. It is the only flag that may be repeated."""
    rest: list[str] = []
    overrides: list[str] = []
    waiting = list(flags)
    while waiting:
        flag = waiting.pop(0)
        if flag.startswith("--set="):
            overrides.append(flag.removeprefix("--set="))
        elif flag == "--set":
            if not waiting or waiting[0].startswith("--"):
                raise UserError("--set needs a value: write --set ARM.KEY=VALUE")
            overrides.append(waiting.pop(0))
        else:
            rest.append(flag)
    return rest, overrides
