"""Shells that complete what is typed: bash and zsh at a terminal, by their own line editors, fish by its `complete -C`."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import shlex
import struct
import subprocess
import termios
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

ANSWERED_WITHIN_S = 30.0
WIDE = struct.pack("HHHH", 50, 9000, 0, 0)  # rows and columns: no line is wrapped
# Typed: have every completion put into the line, print the line between two record separators, and clear it.
ALL, SHOW = "\x18\x01", "\x18\x0c"

BASH = """\
PS1= PS2=
bind 'set bell-style none'
bind 'set enable-bracketed-paste off'
bind '"\\C-x\\C-a": insert-completions'
_show() { printf '\\036%s\\036\\n' "$READLINE_LINE"; READLINE_LINE=; }
bind -x '"\\C-x\\C-l": _show'
for file in FOLDER/share/bash-completion/completions/*; do . "$file"; done
"""
ZSH = """\
PS1= PS2=
unsetopt prompt_sp prompt_cr beep
fpath=(FOLDER/share/zsh/site-functions $fpath)
autoload -U compinit && compinit -u -D
bindkey -e
zle -C all-matches complete-word _generic
zstyle ':completion:all-matches:*' completer _all_matches _complete
zstyle ':completion:all-matches:*' insert true
bindkey '^X^A' all-matches
_show() { printf '\\036%s\\036\\n' "$BUFFER"; BUFFER= }
zle -N _show
bindkey '^X^L' _show
"""


class Completer(Protocol):
    """Something that completes the last word of a line."""

    def complete(self, line: str) -> set[str]:
        """Return all that the last word of ``line`` may become."""

    def close(self) -> None:
        """End it."""


class Terminal:
    """A shell with a line editor, at a terminal of its own."""

    def __init__(self, command: list[str], setup: str, environment: Mapping[str, str]) -> None:
        self._terminal, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, WIDE)
        self._process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**environment, "TERM": "dumb"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)
        self._unread = b""
        self._type(setup)
        self._type("printf '\\036%s\\036\\n' up\n")
        while self._shown() != "up":  # what is typed is echoed meanwhile
            pass

    def complete(self, line: str) -> set[str]:
        """Return all that the last word of ``line`` may become."""
        self._type(line + ALL + SHOW)
        shown = self._shown()
        head = line[: line.rfind(" ") + 1]
        assert shown.startswith(head), f"{line!r} became {shown!r}"
        found = set(shlex.split(shown[len(head) :]))
        return found - {line[len(head) :]} if shown == line else found

    def close(self) -> None:
        """Hang up, and kill what does not go."""
        os.close(self._terminal)
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def _shown(self) -> str:
        """Return what stands between the next two record separators."""
        end_s = time.monotonic() + ANSWERED_WITHIN_S
        while not (found := re.search(rb"\x1e([^\x1e]*)\x1e", self._unread)):
            ready, _, _ = select.select([self._terminal], [], [], max(0.0, end_s - time.monotonic()))
            assert ready, f"nothing within {ANSWERED_WITHIN_S:g} s, only {self._unread!r}"
            self._unread += os.read(self._terminal, 65536)
        self._unread = self._unread[found.end() :]
        return found[1].decode()


class Fish:
    """fish, which tells its completions without a terminal."""

    def __init__(self, setup: str, environment: Mapping[str, str]) -> None:
        self._setup = setup
        self._environment = dict(environment)

    def complete(self, line: str) -> set[str]:
        """Return all that the last word of ``line`` may become."""
        done = subprocess.run(
            ["fish", "--no-config", "-c", f"{self._setup}; complete -C {shlex.quote(line)}"],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=ANSWERED_WITHIN_S,
            check=True,
        )
        assert done.stderr == ""
        return {found.partition("\t")[0] for found in done.stdout.splitlines()}

    def close(self) -> None:
        """There is nothing to end."""


def start(shell: str, folder: Path, environment: Mapping[str, str]) -> Completer:
    """Start a shell that has the completions below ``folder``."""
    if shell == "fish":
        return Fish(f"for file in {folder}/share/fish/vendor_completions.d/*; source $file; end", environment)
    if shell == "zsh":
        return Terminal(["zsh", "-f", "-i"], ZSH.replace("FOLDER", str(folder)), environment)
    return Terminal(["bash", "--norc", "--noprofile", "-i"], BASH.replace("FOLDER", str(folder)), environment)
