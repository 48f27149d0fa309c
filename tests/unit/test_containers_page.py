"""docs/containers.md: every row says which test shows it, and that is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "containers.md").read_text("utf-8")
WHERE = PAGE.split("## What happens where\n")[1].split("\n## ")[0]
FILES = {letter: path for path, letter in re.findall(r"`(tests/\w+/\w+\.py)`\s+\((\w)[;)]", WHERE)}
ROWS = [line.strip("|").split("|")[-1].strip() for line in WHERE.splitlines() if line.startswith("| ")][1:]
UNGUARDED = ", unit tests of adoption"


def functions_of(path: str) -> list[str]:
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


def test_it_says_which_files_the_letters_stand_for() -> None:
    assert FILES.keys() == set("cdno")
    assert len(ROWS) > 20


@pytest.mark.parametrize("cell", ROWS)
def test_every_row_names_a_test_that_is_there(cell: str) -> None:
    letters, names = re.fullmatch(
        r"(\w(?:, \w)*) ((?:`[\w.]+`(?:, )?)+)", cell.removesuffix(UNGUARDED)
    ).groups()  # type: ignore[union-attr]
    there = [name for letter in letters.split(", ") for name in functions_of(FILES[letter])]
    for shortened in re.findall(r"`([\w.]+)`", names):
        form = re.compile("(?:test_)?" + ".*".join(map(re.escape, shortened.split("..."))))
        assert [name for name in there if form.fullmatch(name)], shortened
