"""The command `decausal pretrain`."""

from __future__ import annotations

from decausal.verbs.flags import is_first_process, print_settings, print_training_arguments, slow_imports, wants_help


def run(arguments: list[str]) -> int:
    from decausal.config import as_yaml, resolve, take_flag
    from decausal.training.argument_values import DEFAULTS, PRETRAIN_DEFAULTS
    from decausal.training.settings.pretraining import PretrainSettings

    if wants_help(arguments):
        print_settings("pretrain", PretrainSettings)
        print_training_arguments(DEFAULTS | PRETRAIN_DEFAULTS)
        return 0
    flags, print_config = take_flag(arguments, "print_config", "false")
    settings, training = resolve(PretrainSettings, {}, flags)
    if print_config == "true":
        print(as_yaml(settings, training), end="")
        return 0
    from decausal.training.inputs import check_pretraining

    check_pretraining(settings, training)
    with slow_imports():
        from decausal.training.pretrain import pretrain

    trained = pretrain(settings, training)
    if is_first_process():
        print(f"model: {trained.output_dir}")
        if trained.heldout is not None:
            print(f"held out: {trained.heldout.bits_per_byte:.3f} bits per byte")
        if trained.tasks is not None:
            print(f"right answers: {trained.tasks.accuracy:.1%}, the mean of {len(trained.tasks.tasks)} tasks")
    return 0
