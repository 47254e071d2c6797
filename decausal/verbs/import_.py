"""The command `decausal import`."""

from __future__ import annotations

from pathlib import Path

from decausal.verbs.flags import VerbParser, slow_imports


def run(arguments: list[str]) -> int:
    parser = VerbParser("import", "Read a public diffusion checkpoint: SDAR, Dream, LLaDA or Fast-dLLM v2.")
    parser.add_argument("model", help="a directory or a hub id; its code is never run")
    parser.add_argument("--output_dir", required=True, help="a new or empty directory")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--block_size", type=int, help="instead of what config.json says")
    parser.add_argument("--mask_token_id", type=int, help="instead of what config.json says")
    parser.add_argument("--ignore_keys", default="", help="keys of config.json without effect, with commas")
    flags = parser.parse_args(arguments)
    from decausal.exchange.public_names import refuse_wrong_name
    from decausal.exchange.staging import refuse_filled

    refuse_filled(Path(flags.output_dir))
    refuse_wrong_name(flags.model, flags.revision)
    with slow_imports():
        from decausal.exchange.importing import import_checkpoint

    imported = import_checkpoint(
        flags.model,
        flags.output_dir,
        revision=flags.revision,
        block_size=flags.block_size,
        mask_token_id=flags.mask_token_id,
        ignore_keys=[key.strip() for key in flags.ignore_keys.split(",") if key.strip()],
    )
    facts = imported.facts
    layout = facts.layout if facts.block_size is None else f"{facts.layout} of {facts.block_size}"
    print(f"imported as {imported.form.name}: {imported.output_dir}")
    print(f"layout {layout}, shift {facts.shift}, mask token {facts.mask_token_id}")
    print(f"check it: decausal doctor {imported.output_dir}")
    return 0
