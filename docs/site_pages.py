"""Pages of the site that live elsewhere in the repository, where readers on a forge look for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {"changes.md": "CHANGELOG.md", "benchmarks.md": "benchmarks/README.md", "contributing.md": "CONTRIBUTING.md"}


def on_files(files: Files, *, config: Any) -> Files:
    """Adds the pages; mkdocs calls this once it has found those in docs/."""
    for name, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=text.replace("](docs/", "](")))
    return files
