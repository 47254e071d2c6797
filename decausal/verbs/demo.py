"""The command `decausal demo`."""

from __future__ import annotations

from decausal.verbs.flags import print_settings, slow_imports, wants_help


def run(arguments: list[str]) -> int:
    from decausal.demo.settings import DemoSettings

    if wants_help(arguments):
        print_settings("demo", DemoSettings)
        return 0
    from decausal.config import resolve_own

    settings = resolve_own(DemoSettings, arguments)
    from decausal.demo.inputs import check_inputs

    check_inputs(settings)
    with slow_imports():
        from decausal.demo.run import run_demo

    run_demo(settings)
    return 0
