"""The man pages: written by hand where they tell, filled in from the code where they list.

A template is a page in man(7)'s language. A line ``.\\" @NAME@`` in it is replaced by what is listed there, and
``@version@`` by the version.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from commandline import Command, Option

_SLOT = re.compile(r'^\.\\" @(\w+)@$', re.MULTILINE)
# Code in backticks; else an option among words. What is in between is prose.
_CODE = re.compile(r"`([^`]+)`|(?<![\w/.-])(--?[A-Za-z][\w-]*)")
_SPECIAL = {"\\": r"\(rs", "'": r"\(aq", '"': r"\(dq", "`": r"\(ga", "^": r"\(ha", "~": r"\(ti"}
_SETTING = re.compile(r"(\w+) = (.+)")
_TABLE = re.compile(r"\[(\w+)\](?:\s+# (.+))?")
_LABELLED = re.compile(r"([A-Z][\w ]*):  +(\S.*)")


def fill(template: str, version: str, parts: Mapping[str, str]) -> str:
    """Return the page; KeyError where the template asks for a part that there is not."""
    return _SLOT.sub(lambda slot: parts[slot[1]].rstrip("\n"), template).replace(
        "@version@", literal(version)
    )


# -- text -----------------------------------------------------------------------------------------


def prose(text: str) -> str:
    """Return ``text`` as roff: `code` and options bold, nothing in it taken for a request or an escape."""
    done, at = [], 0
    for found in _CODE.finditer(text):
        done += [_escaped(text[at : found.start()]), rf"\fB{literal(found[1] or found[2])}\fP"]
        at = found.end()
    return _apart("".join([*done, _escaped(text[at:])]))


def literal(text: str) -> str:
    """Return ``text`` to be printed as it is, its hyphens such that they can be copied into a shell."""
    return _apart(_escaped(text).replace("-", r"\-"))


def _escaped(text: str) -> str:
    return "".join(_SPECIAL.get(character, character) for character in text)


def _apart(line: str) -> str:
    return rf"\&{line}" if line[:1] in (".", "'") else line


# -- commands and options -------------------------------------------------------------------------


def options(found: Iterable[Option]) -> str:
    """Return a list of options, each with what it does."""
    return "\n".join(f".TP\n{_synopsis(option)}\n{prose(_sentence(option.help))}" for option in found)


def commands(program: Command, notes: Mapping[str, str]) -> str:
    """Return a section for each command of ``program``: what it does, its options, and its note."""
    lines = []
    for words, command in program.walk():
        if not words or command.commands:
            continue
        own = [option for option in command.options if not option.is_common and option.dest != "help"]
        positionals = " ".join(_positional(one) for one in command.positionals)
        usage = " ".join(
            [rf"\fB{literal(' '.join(words))}\fP", *(["[\\fIoptions\\fP]"] if own else []), positionals]
        )
        lines += [f".SS {usage.rstrip()}", prose(_sentence(command.help))]
        lines += [f".PP\n{note}" for note in [notes.get(" ".join(words), "").strip("\n")] if note]
        told = [one for one in command.positionals if one.help]
        lines += [f".TP\n{_positional(one)}\n{prose(_sentence(one.help))}" for one in told]
        lines += [options(own)] if own else []
    return "\n".join(lines)


def split_notes(text: str) -> dict[str, str]:
    """Return what is said by hand of each command: roff behind lines ``.\\" @command words@``."""
    parts = re.split(r'^\.\\" @([\w ]+)@\n', text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _synopsis(option: Option) -> str:
    value = rf"\ \fI{literal(option.metavar)}\fP" if option.metavar else ""
    return ", ".join(rf"\fB{literal(flag)}\fP{value}" for flag in reversed(option.flags))


def _positional(option: Option) -> str:
    name = rf"\fI{literal(option.metavar)}\fP"
    if option.is_rest:
        return rf"[\fB\-\-\fP] {name} [\fIARGS\fP ...]"
    return f"[{name}]" if option.is_optional else name


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


# -- settings -------------------------------------------------------------------------------------


def settings_head(toml: str) -> str:
    """Return what the commented file of all settings says of itself, above its first table."""
    blocks: list[list[str]] = [[".PP"]]
    for comment in toml.partition("\n\n\n")[0].splitlines():
        text = comment.removeprefix("#").removeprefix(" ")
        if label := _LABELLED.fullmatch(text):
            blocks.append([f".TP\n{prose(label[1])}", label[2][:1].upper() + label[2][1:]])
        elif text.strip():
            blocks[-1].append(text.strip())
        else:
            blocks.append([".PP"])
    return "\n".join(f"{head}\n{prose(' '.join(text))}" for head, *text in blocks if text)


def settings(toml: str) -> str:
    """Return every table and setting of ``toml`` with the comment above it and its default."""
    lines: list[str] = []
    comment: list[str] = []
    for line in toml.partition("\n\n\n")[2].splitlines():
        if line.startswith("#"):
            comment.append(line.removeprefix("#").strip())
        elif table := _TABLE.fullmatch(line):
            lines += [f".SS [{literal(table[1])}]", *([prose(_sentence(table[2]))] if table[2] else [])]
        elif setting := _SETTING.fullmatch(line):
            lines += [
                ".TP",
                rf"\fB{literal(setting[1])}\fP = {literal(setting[2])}",
                prose(" ".join(comment)),
            ]
            comment = []
        elif comment:  # what stands under a table's head, and above no setting
            lines += [*([] if lines[-1].startswith(".SS") else [".PP"]), prose(" ".join(comment))]
            comment = []
    return "\n".join(lines)
