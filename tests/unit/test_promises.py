"""docs/promises.md: every promise has tests that exist, every cell is filled, every source is listed and used."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs/promises.md").read_text("utf-8")
PROMISES, TESTS, SOURCES = 22, 22, 15


def rows(heading: str) -> dict[str, list[str]]:
    """Return the rows of the table below a heading, by their first cell."""
    section = TEXT[TEXT.index(f"## {heading}\n") :].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ") and not line.startswith("| |")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


@functools.cache
def functions_of(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def named_tests(cell: str) -> list[tuple[str, str]]:
    return re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", cell)


def test_every_promise_stands_beside_all_neighbours_and_every_cell_says_something() -> None:
    promises = rows("The promises")
    assert list(promises) == [str(number) for number in range(1, PROMISES + 1)]
    assert {number: len(cells) for number, cells in promises.items() if len(cells) != 6} == {}
    assert [number for number, cells in promises.items() if not all(cells)] == []


def test_every_promise_has_tests() -> None:
    tests = rows("The tests that show them")
    assert tests.keys() == rows("The promises").keys()
    assert [number for number, (cell,) in tests.items() if not named_tests(cell)] == []


@pytest.mark.parametrize("number", [str(number) for number in range(1, TESTS + 1)])
def test_every_test_that_is_named_exists(number: str) -> None:
    (cell,) = rows("The tests that show them")[number]
    named = named_tests(cell)
    assert cell.count("::") == len(named)
    assert [f"{file}::{name}" for file, name in named if name not in functions_of(file)] == []


def test_every_source_is_listed_and_every_listed_one_is_used() -> None:
    listed = rows("Sources")
    body = TEXT[: TEXT.index("## Sources")]
    used = {mark for marks in re.findall(r"\[([a-z](?:, [a-z])*)\]", body) for mark in marks.split(", ")}
    assert used == listed.keys()
    assert len(listed) == SOURCES


def test_where_a_neighbour_does_better_it_is_said() -> None:
    assert (
        sum(cell.startswith("**better**") for cells in rows("The promises").values() for cell in cells) >= 10
    )
