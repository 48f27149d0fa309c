"""Writes the man pages and the completions, as they lie below a prefix: ``python generate.py DIRECTORY``.

It reads the command lines and config/reaper.toml of the tree that it stands in, and needs nothing that is not in
Python, but tomli below 3.11.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.dont_write_bytecode = True  # a clone, or an unpacked archive, stays as it was
sys.path[:0] = [str(HERE), str(ROOT / "daemon"), str(ROOT)]

import completions  # noqa: E402
import manpages  # noqa: E402
from commandline import Command, read_command  # noqa: E402

from reaperd import __main__ as reaperd  # noqa: E402
from reaperd import __version__  # noqa: E402
from reaperd.ctl import arguments as reaperctl  # noqa: E402


def read(name: str) -> str:
    return (HERE / name).read_text("utf-8")


def programs() -> tuple[Command, Command]:
    """Return the command lines of reaperd and reaperctl."""
    return read_command(reaperd.parser(), "reaperd"), read_command(reaperctl.build_parser(), "reaperctl")


def man_pages() -> Iterator[tuple[str, str]]:
    """Yield each page's name and text."""
    daemon, control = programs()
    toml = (ROOT / "config/reaper.toml").read_text("utf-8")
    common = [option for option in control.options if option.is_common]
    own = [option for option in control.options if not option.is_common]
    parts = {
        "reaperd.8": {"options": manpages.options(daemon.options)},
        "reaperctl.1": {
            "commands": manpages.commands(control, manpages.split_notes(read("reaperctl.notes.in"))),
            "common_options": manpages.options(common),
            "own_options": manpages.options(own),
        },
        "reaper.toml.5": {"head": manpages.settings_head(toml), "settings": manpages.settings(toml)},
    }
    for name, parts_of_page in parts.items():
        yield name, manpages.fill(read(f"{name}.in"), __version__, parts_of_page)


def files() -> Iterator[tuple[str, str]]:
    """Yield each file's path below a prefix, and its text."""
    for name, text in man_pages():
        yield f"share/man/man{name[-1]}/{name}", text
    for program in programs():
        name = program.name
        bash, zsh, fish = (read(f"completion.{shell}.in") for shell in ("bash", "zsh", "fish"))
        yield f"share/bash-completion/completions/{name}", completions.bash(program, bash)
        yield f"share/zsh/site-functions/_{name}", completions.zsh(program, zsh)
        yield f"share/fish/vendor_completions.d/{name}.fish", completions.fish(program, fish)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: generate.py DIRECTORY")
    for path, text in files():
        target = Path(sys.argv[1], path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
