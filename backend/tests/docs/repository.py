"""Where the repository's documents and modules are, and the marked code blocks that tests run."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
APP = ROOT / "backend" / "app"


def documents() -> list[Path]:
    """Every document for people."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def marked_block(document: str, name: str) -> str:
    """The code block right below `<!-- test: NAME -->`, which is there so that it can be run."""
    text = (ROOT / document).read_text("utf-8")
    found = re.search(rf"<!-- test: {name} -->\n```[a-z]+\n(.*?)```", text, re.DOTALL)
    assert found is not None, f"{document} has no block marked {name}"
    return found[1]
