"""The command `decausal export`."""

from __future__ import annotations

from pathlib import Path

from decausal.verbs.flags import VerbParser, slow_imports


def run(arguments: list[str]) -> int:
    parser = VerbParser("export", "Hand a converted model on: to engines that serve SDAR, or to the hub.")
    parser.add_argument("directory", help="what `decausal convert` wrote")
    parser.add_argument("--format", required=True, choices=("sdar", "hf"), help="sdar: for SGLang and LMDeploy")
    parser.add_argument("--output_dir", required=True, help="a new or empty directory")
    parser.add_argument("--name", help="title of the model card")
    parser.add_argument("--license", help="license of the model, as the hub names it (apache-2.0)")
    parser.add_argument("--evaluation", help="JSON file of figures for the card (decausal eval ... --json)")
    parser.add_argument("--push_to_hub", metavar="REPO_ID", help="upload it to owner/name")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    flags = parser.parse_args(arguments)
    from decausal.exchange.card import ModelCard, read_evaluation
    from decausal.exchange.staging import refuse_filled
    from decausal.models.names import check_converted

    if flags.push_to_hub is not None:
        from decausal.hub import checked_repo_id

        checked_repo_id(flags.push_to_hub)
    results = read_evaluation(flags.evaluation) if flags.evaluation is not None else ()
    refuse_filled(Path(flags.output_dir))
    check_converted(flags.directory)
    with slow_imports():
        from decausal.exchange.plain import export_plain
        from decausal.exchange.sdar import export_sdar
        from decausal.hub import push

    card = ModelCard(flags.name, flags.license, flags.evaluation, results)
    export = export_sdar if flags.format == "sdar" else export_plain
    exported = export(flags.directory, flags.output_dir, card=card)
    print(f"exported: {exported.output_dir}")
    for engine, command in exported.commands.items():
        print(f"\nserve it with {engine}:\n  {command}")
    for note in exported.notes:
        print(f"note: {note}")
    if flags.push_to_hub is not None:
        print(f"pushed: {push(exported.output_dir, flags.push_to_hub, private=flags.private)}")
    return 0
