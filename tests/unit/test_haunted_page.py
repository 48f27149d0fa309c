"""docs/haunted.md: what it has people type can be typed, and what it shows is how it looks."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from reaperd.config import Config, parse_config
from reaperd.ctl import arguments, render_report
from reaperd.ctl.tally import fold
from reaperd.ctl.text import Look
from reaperd.kinds import EVENT_KINDS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "haunted.md").read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")
SYMPTOMS = PAGE.split("\n## ")[1:]
SHOWN = re.findall(r"^    \$ (.+)$", PAGE, re.MULTILINE)
NAMED = [words for words in re.findall(r"`([^`\n]+)`", PAGE) if words.startswith("reaperctl ")]
PLACEHOLDERS = {"PID": "4711", "NAME": "risk", "USER": "root", "WHEN": "2h"}


def typed(line: str) -> list[list[str]]:
    """Return the words of each reaperctl in a line."""
    line = re.sub(r"\b(ml)\b", "root", line)  # a user who is on no other machine
    commands = [shlex.split(part, comments=True) for part in re.split(r" && | \| ", line)]
    return [
        [PLACEHOLDERS.get(word, word) for word in words]
        for words in commands
        if words and words[0] == "reaperctl"
    ]


def test_every_symptom_shows_a_command_with_what_it_prints_and_says_what_comes_next() -> None:
    assert len(SYMPTOMS) >= 8
    for symptom in SYMPTOMS:
        title = symptom.partition("\n")[0]
        assert re.search(r"^    \$ \S.*\n    (?!\$)\S", symptom, re.MULTILINE), title
        assert "**Next:**" in symptom, title


@pytest.mark.parametrize("line", sorted({*SHOWN, *NAMED}))
def test_every_command_and_option_exists(line: str) -> None:
    for _, *words in typed(line):
        arguments.parse(words)


def test_the_commands_are_found() -> None:
    assert len([line for line in SHOWN if typed(line)]) >= 8
    assert len(NAMED) >= 8


def test_every_option_that_is_named_alone_is_one_of_a_command_that_is_shown_there() -> None:
    for symptom in SYMPTOMS:
        words = " ".join(
            [*re.findall(r"^    \$ (.+)$", symptom, re.MULTILINE), *re.findall(r"`([^`\n]+)`", symptom)]
        )
        commands = set(re.findall(r"reaperctl (\w+)", words))
        for option in re.findall(r"`(--[\w-]+)[^`]*`", symptom):
            known = {
                flag
                for one in commands
                for action in arguments.build_parser()._subparsers._group_actions[0].choices[one]._actions  # type: ignore[union-attr, index]
                for flag in action.option_strings
            }
            assert option in known, f"{option}, of one of {sorted(commands)}"


def test_every_setting_is_a_good_one() -> None:
    blocks = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    assert blocks
    for block in blocks:
        assert parse_config([("haunted.md", block)]) != Config()


def test_every_kind_of_event_that_is_shown_is_one() -> None:
    kinds = re.findall(r"^    \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ  (\w+)", PAGE, re.MULTILINE)
    assert kinds
    assert set(kinds) <= set(EVENT_KINDS)


def test_the_report_looks_as_it_does() -> None:
    event = {
        "kind": "killed",
        "uid": 0,
        "rule": "x",
        "processes": [{"framework": "loky", "result": "killed"}],
    }
    for line in render_report.report(fold([event]), Look(width=80)):
        if line.startswith(("FRAMEWORK", "USER", "CAUSE")) and line.partition(" ")[0] in PAGE:
            assert line.split() in [shown.split() for shown in PAGE.splitlines()]


def test_the_readme_leads_there_before_anything_else() -> None:
    assert "(docs/haunted.md)" in README.partition("\n## See it")[0]


def test_every_link_of_the_page_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
