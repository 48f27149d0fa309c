"""Completions for bash, zsh and fish, from one description of the command line.

Each is a frame written by hand, which asks the daemon for names and pids, and tables that are filled in here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from commandline import Command, Option

from reaperd.kinds import EVENT_KINDS

# What completes a value or an argument, by the name under which argparse keeps it.
KINDS = {
    **dict.fromkeys(("config", "file", "pidfile", "socket", "status_file"), "file"),
    "state_dir": "directory",
    "pid": "pid",
    "leave": "pid",
    "session": "session",
    "owner": "user",
    "restart": "restart",
    "kind": "event_kind",
    "by": "grouping",
    "command_line": "command",
}
# Numbers, times and names of one's own choice.
FREE = frozenset(
    {"timeout", "wait", "duration", "interval", "since", "name", "max_workers", "backoff", "port", "address"}
)


# The values of those that have but a few.
WORDS = {"event_kind": EVENT_KINDS, "grouping": ("framework", "user", "cause")}
MAY_REPEAT = ("leave", "kind")


def kind_of(option: Option) -> str:
    """Return what completes the value of ``option``; "nothing" where there is none to guess."""
    return KINDS.get(option.dest, "nothing")


def bash(program: Command, frame: str) -> str:
    """Return a script for bash; ``frame`` has the functions around the tables."""
    cases = []
    for words, command in program.walk():
        flags = [flag for option in command.options for flag in option.flags]
        names = [one.name for one in command.commands]
        argument = kind_of(command.positionals[0]) if command.positionals else "nothing"
        cases += [
            f"        {_case(words)})",
            f"            options='{' '.join(flags)}'",
            *([f"            commands='{' '.join(names)}'"] if names else []),
            f"            argument={argument} ;;",
        ]
    values = [
        f"        {'|'.join(_value_cases(program, kind))}) kind={kind} ;;"
        for kind in _kinds_of_values(program)
    ]
    few = [
        f"""        {kind}) mapfile -t COMPREPLY < <(compgen -W '{" ".join(found)}' -- "$1") ;;"""
        for kind, found in WORDS.items()
    ]
    parts = {"commands": cases, "values": values, "words": few}
    return _fill(frame, program, {name: "\n".join(lines) for name, lines in parts.items()})


def zsh(program: Command, frame: str) -> str:
    """Return a function for zsh's completion system."""
    functions = [_zsh_function(program, words, command) for words, command in program.walk()]
    return _fill(frame, program, {"functions": "\n\n".join(functions)})


def fish(program: Command, frame: str) -> str:
    """Return commands for fish; its conditions ask a function of the frame which command is being typed."""
    lines = []
    for words, command in program.walk():
        # Options that go with every command are told of once, without a condition.
        common = {option.flags for option in command.options if option.is_common or option.dest == "help"}
        place = f"__reaper_at {'/'.join(words) or 'start'}"
        here = f" -n '{place}'" if program.commands else ""
        for option in command.options:
            if option.flags in common and words:
                continue
            where = "" if option.flags in common else here
            lines.append(f"complete -c {program.name}{where}{_fish_option(option)}")
        for one in command.commands:
            lines.append(f"complete -c {program.name}{here} -a {one.name} -d {_fish_quoted(one.help)}")
        for positional in command.positionals:
            if what := _fish_values(positional):
                where = f" -n '{place}{'' if positional.is_rest else ' alone'}'"
                lines.append(f"complete -c {program.name}{where}{what}")
    valued = sorted(
        {
            flag
            for _, command in program.walk()
            for one in command.options
            if one.takes_value
            for flag in one.flags
        }
    )
    groups = [one.name for one in program.commands if one.commands]
    return _fill(
        frame, program, {"lines": "\n".join(lines), "valued": " ".join(valued), "groups": " ".join(groups)}
    )


# -- what they have in common ---------------------------------------------------------------------


def _fill(frame: str, program: Command, parts: dict[str, str]) -> str:
    """Put ``parts`` where the frame says ``# @NAME@`` in a line of its own, or ``@NAME@`` in one.

    What only a program with commands needs stands between ``# @asking{@`` and ``# @}asking@``.
    """
    kept = r"\1" if program.commands else ""
    frame = re.sub(r"^ *# @asking\{@\n(.*?)^ *# @\}asking@\n", kept, frame, flags=re.MULTILINE | re.DOTALL)
    for name, text in {**parts, "program": program.name}.items():
        whole = re.compile(rf"^ *# @{name}@$|@{name}@", re.MULTILINE)
        frame = whole.sub(text.replace("\\", r"\\"), frame)
    return frame


def _kinds_of_values(program: Command) -> list[str]:
    return sorted(
        {kind_of(one) for _, command in program.walk() for one in command.options if one.takes_value}
    )


def _value_cases(program: Command, kind: str) -> Iterator[str]:
    """Yield ``command:--flag`` for each option of a command whose value is of ``kind``."""
    for words, command in program.walk():
        for option in command.options:
            if option.takes_value and kind_of(option) == kind:
                yield from (f"'{' '.join(words)}:{flag}'" for flag in option.flags)


def _case(words: Sequence[str]) -> str:
    return f"'{' '.join(words)}'"


def _short(text: str) -> str:
    """Return the beginning of a help text, without what stands in brackets."""
    return re.sub(r" *\([^)]*\)", "", text).partition(";")[0].strip().rstrip(":,")


# -- zsh ------------------------------------------------------------------------------------------


_ZSH_OUTER = '-C -s -S -A "-*" :'
_ZSH_ACTIONS = {
    "file": "_files",
    "directory": "_files -/",
    "user": "_users",
    "pid": "_reaper_pids",
    "session": "_reaper_sessions",
    "restart": "(no on-failure)",
    **{kind: f"({' '.join(found)})" for kind, found in WORDS.items()},
    "command": "_normal",
    "nothing": "",
}


def _zsh_function(program: Command, words: Sequence[str], command: Command) -> str:
    name = _zsh_name(program, words)
    specs = [*map(_zsh_option, command.options), *map(_zsh_positional, command.positionals)]
    if not command.commands:
        return "\n".join([f"{name}() {{", _zsh_arguments("-s -S :", specs), "}"])
    specs += [f"'1: :{name}_commands'", "'*:: :->arguments'"]
    return "\n".join(
        [
            f"{name}() {{",
            *([] if words else ["    local -a reaper_words=($words)"]),
            "    local curcontext=$curcontext state state_descr line failed=1",
            "    typeset -A opt_args",
            # Options of the command itself end where the next command begins.
            f"{_zsh_arguments(_ZSH_OUTER, specs)} && failed=0",
            "    [[ $state != arguments ]] || case $words[1] in",
            *(f"        {one.name}) {name}_{one.name} && failed=0 ;;" for one in command.commands),
            "    esac",
            "    return failed",
            "}",
            "",
            f"{name}_commands() {{",
            "    local -a commands=(",
            *(f"        {_zsh_quoted(f'{one.name}:{one.help}')}" for one in command.commands),
            "    )",
            "    _describe -t commands command commands",
            "}",
        ]
    )


def _zsh_arguments(how: str, specs: Sequence[str]) -> str:
    return " \\\n        ".join([f"    _arguments {how}", *specs])


def _zsh_name(program: Command, words: Sequence[str]) -> str:
    return "_".join(["", program.name, *words])


def _zsh_option(option: Option) -> str:
    told = re.sub(r"([\[\]\\:])", r"\\\1", _short(option.help))
    value = (
        f":{option.metavar.replace(':', ' ')}:{_ZSH_ACTIONS[kind_of(option)]}" if option.takes_value else ""
    )
    may_repeat = "*" if option.dest in MAY_REPEAT else ""
    if len(option.flags) == 1:
        equals = "=" if value else ""
        return _zsh_quoted(f"{may_repeat}{option.flags[0]}{equals}[{told}]{value}")
    together = " ".join(option.flags)
    return f"'({together})'{{{','.join(option.flags)}}}{_zsh_quoted(f'[{told}]{value}')}"


def _zsh_positional(option: Option) -> str:
    action = _ZSH_ACTIONS[kind_of(option)]
    if option.is_rest:
        return f"'(-)1:command:_command_names -e' '*::arguments:{action}'"
    return _zsh_quoted(f"1{':' if option.is_optional else ''}:{option.metavar}:{action}")


def _zsh_quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


# -- fish -----------------------------------------------------------------------------------------


def _fish_option(option: Option) -> str:
    flags = "".join(
        f" -l {flag[2:]}" if flag.startswith("--") else f" -s {flag[1:]}" for flag in option.flags
    )
    value = " -x" if option.takes_value and not _fish_values(option) else ""
    return f"{flags}{value}{_fish_values(option) if option.takes_value else ''} -d {_fish_quoted(_short(option.help))}"


def _fish_values(option: Option) -> str:
    words, flag = "no on-failure", "-x" if option.flags else "-"
    return {
        "file": " -rF" if option.flags else " -F",
        "directory": f" {flag}a '(__fish_complete_directories)'",
        "user": f" {flag}a '(__fish_complete_users)'",
        "pid": f" {flag}a '(__reaper_pids)'",
        "session": f" {flag}a '(__reaper_sessions)'",
        "restart": f" {flag}a '{words}'",
        **{kind: f" {flag}a '{' '.join(found)}'" for kind, found in WORDS.items()},
        "command": f" {flag}a '(__reaper_command)'",
        "nothing": "",
    }[kind_of(option)]


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
