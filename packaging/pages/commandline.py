"""What a command line may hold, read from its argparse parser: the one source of man pages and completions.

argparse has no public way to list what a parser knows. The private names used here are those that other generators
(argparse-manpage, shtab) rely on; Python 3.10 to 3.14 have them all.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple


class Option(NamedTuple):
    """One option, or, without ``flags``, one positional argument."""

    flags: tuple[str, ...]  # the long one first
    dest: str
    metavar: str  # "" where it takes no value
    help: str
    is_common: bool  # stands in a group of its own, and goes with every command
    is_optional: bool  # of a positional
    is_rest: bool  # takes all words that follow

    @property
    def takes_value(self) -> bool:
        return bool(self.flags and self.metavar)


class Command(NamedTuple):
    """A program or one of its commands."""

    name: str
    help: str
    options: tuple[Option, ...]
    positionals: tuple[Option, ...]
    commands: tuple[Command, ...]

    def walk(self, above: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Command]]:
        """Return this and all commands below it, each with the words that lead to it; ``()`` for this one."""
        found = [(above, self)]
        for command in self.commands:
            found += command.walk((*above, command.name))
        return found


def read_command(parser: argparse.ArgumentParser, name: str, help_text: str = "") -> Command:
    """Return what ``parser`` accepts; what it hides from --help is left out."""
    common = {
        id(action)
        for group in parser._action_groups[2:]
        for action in group._group_actions
        if action.option_strings
    }
    options: list[Option] = []
    positionals: list[Option] = []
    commands: list[Command] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            told = {choice.dest: choice.help or "" for choice in action._choices_actions}
            commands += [
                read_command(one, word, told[word]) for word, one in action.choices.items() if word in told
            ]
        elif action.help != argparse.SUPPRESS:
            (options if action.option_strings else positionals).append(
                _option(parser, action, is_common=id(action) in common)
            )
    return Command(
        name, help_text or parser.description or "", tuple(options), tuple(positionals), tuple(commands)
    )


def _option(parser: argparse.ArgumentParser, action: argparse.Action, *, is_common: bool) -> Option:
    # What an option may do without is no part of it for who lists or completes: the next word may be anything.
    takes_value = action.nargs != 0 and not (action.option_strings and action.nargs == argparse.OPTIONAL)
    metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    return Option(
        flags=tuple(sorted(action.option_strings, key=lambda flag: not flag.startswith("--"))),
        dest=action.dest,
        metavar=metavar if takes_value else "",
        help=parser._get_formatter()._expand_help(action) if action.help else "",
        is_common=is_common,
        is_optional=action.nargs == argparse.OPTIONAL,
        is_rest=action.nargs == argparse.REMAINDER,
    )
