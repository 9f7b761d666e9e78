"""The text that a server calibrates on when nobody gave one: written for this project, about 8,000 tokens of mixed kinds."""

from pathlib import Path

KINDS = ("prose", "tools", "technical", "dialogue", "code", "tables")


def builtin_text() -> str:
    """Prose, tool descriptions, documentation, dialogue, code and tables, one after the other."""
    folder = Path(__file__).parent
    return "\n\n".join((folder / f"text_{kind}.txt").read_text(encoding="utf-8").strip() for kind in KINDS)
