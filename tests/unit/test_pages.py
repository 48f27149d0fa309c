"""The man pages: they tell all that the command lines and the settings hold, and what they show can be typed."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import typing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from reaperd import __main__ as reaperd
from reaperd.config import Config, parse_config
from reaperd.ctl import DONE, FAILED, INTERRUPTED, NO_DAEMON, NOT_ALLOWED, PIPE_CLOSED, USAGE
from reaperd.ctl import arguments as reaperctl

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "packaging" / "pages"
NAMES = ("reaperctl.1", "reaperd.8", "reaper.toml.5")
SOURCES = [*(ROOT / "agent").glob("*.py"), *(ROOT / "daemon").rglob("*.py")]


def load(name: str) -> ModuleType:
    """Return a module of packaging/pages, which is no package."""
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location(name, PAGES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        sys.path.insert(0, str(PAGES))
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = path
    return module


generate = load("generate")
manpages = load("manpages")
completions = load("completions")
FILES: dict[str, str] = dict(generate.files())


@pytest.fixture(params=NAMES)
def page(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    file = tmp_path / request.param
    file.write_text(text_of(request.param))
    return file


def text_of(name: str) -> str:
    return FILES[f"share/man/man{name[-1]}/{name}"]


def shown(text: str) -> str:
    """Return a page's text without its fonts and escapes: enough to look for words."""
    text = re.sub(r"\\f[BIP]|\\&", "", text)
    named = {"rs": "\\", "aq": "'", "dq": '"', "ga": "`", "ha": "^", "ti": "~"}
    text = re.sub(r"\\\((..)", lambda found: named[found[1]], text)
    text = re.sub(r"^\.[BI]R? (.*)$", lambda found: "".join(shlex.split(found[1])), text, flags=re.MULTILINE)
    return text.replace("\\-", "-").replace("\\ ", " ")


def examples(text: str) -> list[str]:
    """Return the blocks of a page that are shown as they are to be typed."""
    return [shown(block) for block in re.findall(r"^\.nf\n(.*?)^\.fi$", text, re.MULTILINE | re.DOTALL)]


def parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Return ``parser`` and those of all its commands."""
    found = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [deeper for one in action.choices.values() for deeper in parsers(one)]
    return found


@pytest.mark.skipif(shutil.which("man") is None, reason="man is not installed here")
def test_man_has_nothing_to_say_against_a_page(page: Path) -> None:
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "MANROFFSEQ": "", "MANWIDTH": "80"}
    done = subprocess.run(
        ["man", "--warnings", "--encoding=UTF-8", "--local-file", page],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "SEE ALSO" in done.stdout


def test_every_page_has_the_sections_that_readers_look_for() -> None:
    for name in NAMES:
        sections = re.findall(r"^\.SH (.+)$", text_of(name), re.MULTILINE)
        assert sections[:3] == ["NAME", "SYNOPSIS", "DESCRIPTION"]
        assert sections[-2:] == ["EXAMPLES", "SEE ALSO"]
        assert "FILES" in sections
    for name in ("reaperctl.1", "reaperd.8"):
        assert {"OPTIONS", "EXIT STATUS", "ENVIRONMENT"} <= set(
            re.findall(r"^\.SH (.+)$", text_of(name), re.MULTILINE)
        )


@pytest.mark.parametrize(
    ("name", "parser"), [("reaperctl.1", reaperctl.build_parser()), ("reaperd.8", reaperd.parser())]
)
def test_every_command_and_option_is_told_of(name: str, parser: argparse.ArgumentParser) -> None:
    text = shown(text_of(name))
    for one in parsers(parser):
        words = one.prog.partition(" ")[2]
        has_commands = any(isinstance(action, argparse._SubParsersAction) for action in one._actions)
        own = told_of_command(text, words) if words and not has_commands else text
        common = [action for group in one._action_groups[2:] for action in group._group_actions]
        for action in one._actions:
            place = text if action in common or action.dest == "help" else own
            for flag in action.option_strings:
                assert re.search(rf"(?<![\w-]){flag}(?![\w-])", place), f"{one.prog} {flag}"
            if action.option_strings and action.nargs != 0:
                assert f"{action.option_strings[0]} {action.metavar}" in place, f"{one.prog} {action.metavar}"


def told_of_command(text: str, words: str) -> str:
    """Return what stands from the head of a command to that of the next one."""
    (section,) = re.findall(rf"^\.SS {words}(?: [^\n]*)?$(.*?)^\.S[SH] ", text, re.MULTILINE | re.DOTALL)
    return str(section)


def test_every_exit_code_is_told_of() -> None:
    status = shown(text_of("reaperctl.1")).partition(".SH EXIT STATUS")[2].partition(".SH ")[0]
    told = {
        int(word)
        for line in status.splitlines()
        if re.fullmatch(r"[\d, ]+", line)
        for word in line.split(",")
    }
    assert told == {DONE, FAILED, USAGE, NO_DAEMON, NOT_ALLOWED, INTERRUPTED, PIPE_CLOSED, 126, 127}
    status = shown(text_of("reaperd.8")).partition(".SH EXIT STATUS")[2].partition(".SH ")[0]
    assert re.findall(r"^(\d)$", status, re.MULTILINE) == re.findall(
        r"^  (\d)  ", reaperd._EPILOG, re.MULTILINE
    )


def test_every_variable_that_a_person_may_set_is_told_of() -> None:
    marks = {"REAPER_LINEAGE", "REAPER_SPARED", "REAPER_UI"}  # set by Reaper itself
    named = {
        found for file in SOURCES for found in re.findall(r"\bREAPER_[A-Z_]+\b", file.read_text("utf-8"))
    }
    assert {"REAPER_SOCKET", "REAPER_CONFIG"} <= named
    assert named - marks - set(re.findall(r"REAPER_[A-Z_]+", text_of("reaperctl.1"))) == set()


def test_every_setting_is_told_of_with_its_default() -> None:
    text = text_of("reaper.toml.5")
    told = re.split(r"^\.SS \[(\w+)\]$", text, flags=re.MULTILINE)
    tables = dict(zip(told[1::2], told[2::2], strict=True))
    assert list(tables) == list(Config._fields)
    lines = [f"[{name}]\n" + "\n".join(settings_in(table)) for name, table in tables.items()]
    assert parse_config([("page", "\n".join(lines))]) == Config()
    for name, table in tables.items():
        hints = typing.get_type_hints(type(getattr(Config(), name)), include_extras=True)
        keys = [typing.get_args(hint)[1]["key"] for hint in hints.values()]
        assert [line.partition(" ")[0] for line in settings_in(table)] == keys


def settings_in(table: str) -> list[str]:
    """Return the lines of TOML that a table of the page shows as heads."""
    return [shown(line) for line in re.findall(r"^\.TP\n(\\fB\w+\\fP = .+)$", table, re.MULTILINE)]


def test_every_setting_is_followed_by_what_it_does() -> None:
    for _, says in re.findall(r"^\.TP\n\\fB(\w+)\\fP = .+\n(.*)$", text_of("reaper.toml.5"), re.MULTILINE):
        assert len(says) > 30


@pytest.mark.parametrize("name", ["reaperctl.1", "reaperd.8"])
def test_every_command_line_of_the_examples_can_be_typed(name: str) -> None:
    lines = [line for block in examples(text_of(name)) for line in block.splitlines()]
    ours = [
        shlex.split(line.partition(" && ")[0]) for line in lines if line.startswith(("reaperctl", "reaperd"))
    ]
    assert len(ours) >= 3
    for program, *words in ours:
        read: Any = reaperctl.parse if program == "reaperctl" else reaperd.read_options
        read(words)


def test_every_setting_of_the_examples_is_a_good_one() -> None:
    blocks = examples(text_of("reaper.toml.5"))
    assert len(blocks) == 4
    for block in blocks:
        assert parse_config([("example", block)]) != Config()


def test_a_note_speaks_of_a_command_that_there_is() -> None:
    notes = manpages.split_notes((PAGES / "reaperctl.notes.in").read_text("utf-8"))
    (_, control) = generate.programs()
    assert notes.keys() <= {" ".join(words) for words, _ in control.walk()}
    assert notes


def test_nothing_in_a_text_is_taken_for_roff() -> None:
    assert manpages.prose(".dot \\n 'quoted' ~ ^") == r"\&.dot \(rsn \(aqquoted\(aq \(ti \(ha"
    assert manpages.prose("see `a-b .c` and --dry-run, not well-known") == (
        r"see \fBa\-b .c\fP and \fB\-\-dry\-run\fP, not well-known"
    )
    assert manpages.literal("'--x'") == r"\(aq\-\-x\(aq"


def test_no_page_holds_a_character_that_an_old_terminal_cannot_show() -> None:
    for path, text in FILES.items():
        assert text.isascii(), path


def test_the_generator_runs_where_nothing_is_installed_and_leaves_the_tree_as_it_was(tmp_path: Path) -> None:
    if sys.version_info < (3, 11):
        pytest.skip("needs tomli below Python 3.11")
    before = sorted(PAGES.rglob("*"))
    subprocess.run([sys.executable, "-I", "-S", PAGES / "generate.py", tmp_path], check=True)
    assert sorted(PAGES.rglob("*")) == before
    written = {
        str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()
    }
    assert written == FILES


def test_of_every_value_it_is_known_what_completes_it() -> None:
    values = {
        option.dest
        for program in generate.programs()
        for _, command in program.walk()
        for option in (*command.options, *command.positionals)
        if option.metavar
    }
    assert values == set(completions.KINDS) | completions.FREE
    assert not set(completions.KINDS) & completions.FREE
