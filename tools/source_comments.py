"""Reads the comments that stand above tables, columns and constants, so that documents need not repeat them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class TableComments:
    """A table's own comment, and those of its columns by name; empty where there is none."""

    table: str
    columns: dict[str, str]


def table_comments(root: Path) -> dict[str, TableComments]:
    """The comments of every `name = sa.Table("name", ...)` in the modules under `root`, by table name."""
    found: dict[str, TableComments] = {}
    for path in sorted(root.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        for statement in ast.parse(text).body:
            if isinstance(statement, ast.Assign) and (call := _sa_call(statement.value, "Table")):
                found[_first_text(call)] = TableComments(
                    table=comment_above(lines, statement.lineno),
                    columns={
                        _first_text(column): comment_above(lines, column.lineno)
                        for argument in call.args
                        if (column := _sa_call(argument, "Column"))
                    },
                )
    return found


def constant_comment(path: Path, name: str) -> str:
    """The comment above the module constant `name`, which those right below it may share.

    Raises:
        ValueError: there is no such constant, or no comment.
    """
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for target, line in _assignments(ast.parse(text)):
        if target != name:
            continue
        while line > 1 and lines[line - 2].strip() and not lines[line - 2].startswith("#"):
            line -= 1  # noqa: PLW2901  # walks up to the comment of the block
        if comment := comment_above(lines, line):
            return comment
    raise ValueError(f"{path.name} has no constant {name} with its reason above it")


def comment_above(lines: list[str], line: int) -> str:
    """The `#` lines directly above a line (counted from 1), joined to one text."""
    parts: list[str] = []
    for text in reversed(lines[: line - 1]):
        if not text.strip().startswith("#"):
            break
        parts.insert(0, text.strip().removeprefix("#").strip())
    return " ".join(parts)


def _assignments(module: ast.Module) -> Iterator[tuple[str, int]]:
    for statement in module.body:
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                if isinstance(target, ast.Name):
                    yield target.id, statement.lineno


def _sa_call(node: ast.expr, name: str) -> ast.Call | None:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name:
        return node
    return None


def _first_text(call: ast.Call) -> str:
    argument = call.args[0]
    assert isinstance(argument, ast.Constant)
    return str(argument.value)
