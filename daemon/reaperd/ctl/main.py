"""``reaperctl``: the command line, and the exit code of whatever came of it.

Imports next to nothing, so that ``--help`` is instant; a command's own modules come when it runs.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence

from reaperd.ctl import DONE, FAILED, INTERRUPTED, PIPE_CLOSED, CommandError, arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; what is expected to go wrong becomes one sentence on stderr."""
    # An ignored SIGCHLD is inherited, and who ignores it cannot wait for a helper.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        try:
            return _run(argv)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader (`| head`) has seen enough
        _discard_output()
        return PIPE_CLOSED
    except CommandError as failure:
        return _fail(str(failure), failure.code)
    except OSError as error:  # a full disk under stdout, a file that cannot be read
        _discard_output()
        what = f"{error.filename}: " if isinstance(error.filename, str) else ""
        return _fail(f"{what}{error.strerror or error}", FAILED)


def _run(argv: Sequence[str] | None) -> int:
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")  # a name may hold what the locale cannot show
    try:
        options = arguments.parse(argv)
    except SystemExit as error:  # argparse has printed --help, --version or a usage message
        return error.code if isinstance(error.code, int) else DONE
    return _dispatch(options)


# Where each command is: one module for each, so that none is imported for another's sake.
_CODE = {
    "alerts test": "alerts.test",
    "cleanup": "cleanup.cleanup",
    "config check": "config.check",
    "config default": "config.default",
    "config show": "config.show",
    "doctor": "doctor.doctor",
    "events": "events.events",
    "explain": "orphans.explain",
    "monitor": "monitor.monitor",
    "orphans": "orphans.orphans",
    "ping": "commands.ping",
    "protect": "orphans.protect",
    "ps": "commands.ps",
    "release": "orphans.release",
    "report": "report.report",
    "run": "run.run",
    "status": "commands.status",
    "stop": "events.stop",
    "top": "top.top",
    "ui": "ui.serve.ui",
}
_WITHOUT_AGENT = ("doctor", "config")  # they must work where `agent` is somebody else's module


def _dispatch(options: argparse.Namespace) -> int:
    """Run the command."""
    if options.command.partition(" ")[0] not in _WITHOUT_AGENT:
        try:
            importlib.import_module("reaperd.ctl.commands")
        except ImportError as error:
            if (error.name or "").partition(".")[0] != "agent":
                raise
            raise CommandError(
                f"cannot import Reaper's `agent` module: {error}. `reaperctl doctor` says more"
            ) from None
    module, _, function = _CODE[options.command].rpartition(".")
    run: Callable[[argparse.Namespace], int] = getattr(
        importlib.import_module(f"reaperd.ctl.{module}"), function
    )
    return run(options)


def _fail(message: str, code: int) -> int:
    from reaperd.ctl.terminal import tell

    tell(message)
    return code


def _discard_output() -> None:
    """Point stdout at nothing, or Python would try to flush it once more at exit and complain."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


if __name__ == "__main__":
    sys.exit(main())
