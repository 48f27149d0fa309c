"""docs/threat-model.md: every threat names what holds against it, and a test that is there."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "threat-model.md").read_text("utf-8")
NAME = re.compile(r"`([a-z_/]+\.py)::(\w+)`")


def rows() -> list[list[str]]:
    """Return the cells of all rows of all tables, their heads apart."""
    lines = [line for line in PAGE.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [one for one in cells if one[0] != "threat" and set(one[0]) != {"-"}]


@functools.cache
def functions_of(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / "tests" / path).read_text("utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def test_every_threat_says_what_holds_and_which_test_shows_it() -> None:
    found = rows()
    assert len(found) > 50
    for row in found:
        assert len(row) == 3, row
        assert all(row), row
        assert re.sub(r"[, ]", "", NAME.sub("", row[2])) == "", f"not the name of a test: {row[2]}"
        assert NAME.search(row[2]), row


def test_every_test_that_is_named_is_there() -> None:
    named = [name for row in rows() for name in NAME.findall(row[2])]
    assert [f"{path}::{name}" for path, name in named if name not in functions_of(path)] == []
    assert all(name.startswith("test_") for _, name in named)


def test_no_threat_is_told_of_twice() -> None:
    threats = [row[0] for row in rows()]
    assert len(threats) == len(set(threats))


def test_what_it_says_of_bounds_is_what_they_are() -> None:
    from reaperd import database

    assert database._MOST_BYTES == 8 * 2**20
    assert (database._LOCK_S, database.RETRY_S) == (0.02, 0.5)
    assert "8 MiB" in PAGE
    assert "20 ms in half a second" in PAGE


def test_it_is_to_be_found() -> None:
    for name in ("README.md", "docs/how-it-decides.md"):
        assert "threat-model.md" in (ROOT / name).read_text("utf-8"), name
