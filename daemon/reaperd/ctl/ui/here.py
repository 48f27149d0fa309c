"""Answers one question about orphans without a daemon, in a process of its own: JSON in, JSON out.

The engine reads others' memory through a helper that it forks, which a server with threads had better not do.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from agent.isolated import run_module
from reaperd.ctl import CommandError

_WITHIN_S = 180.0


def ask(owner: int | None, op: str, **fields: Any) -> dict[str, Any]:
    """Return what a daemon would reply; only what is ``owner``'s, unless that is None. CommandError."""
    question = json.dumps({"owner": owner, "op": op, "fields": fields})
    try:
        done = subprocess.run(
            run_module("reaperd.ctl.ui.here"),
            input=question,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_WITHIN_S,
        )
        reply = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise CommandError(f"no answer from here within {_WITHIN_S:g} s") from None
    except ValueError:
        lines = done.stderr.strip().splitlines()
        raise CommandError(
            lines[-1] if lines else f"looking from here ended with {done.returncode}"
        ) from None
    if "error" in reply:
        raise CommandError(str(reply["error"]))
    return dict(reply)


def main() -> None:
    """Answer the question on standard input."""
    from reaperd.ctl import orphans

    question = json.loads(sys.stdin.read())
    try:
        reply = orphans.complete(orphans.ask_here, question["owner"])(question["op"], **question["fields"])
    except CommandError as error:
        reply = {"error": str(error)}
    print(json.dumps(reply))


if __name__ == "__main__":
    main()
