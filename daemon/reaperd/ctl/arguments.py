"""The command line of ``reaperctl``: its commands, what each may be given, and what ``--help`` says of them.

Imports next to nothing, so that ``--help`` is instant.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from reaperd import __version__
from reaperd.ctl import values
from reaperd.kinds import EVENT_KINDS

_OF_USERS = ("events", "report")  # the commands whose --user may name one
_DESCRIPTION = """\
See and steer reaperd, the daemon that ends the training workers which a dead script left behind."""

_EPILOG = """\
exit codes:
  0  done
  1  failed, or something remains
  2  wrong usage, or a bad configuration
  3  no daemon answers
  4  not allowed
`run` ends as its command did, or with 126 (may not be run) or 127 (not found).

Which daemon: the one on --socket or $REAPER_SOCKET, else your own if it answers, else the system's.
Sessions and processes of your own uid are yours to act on; root and the admins act on all.
Times are UTC. Set NO_COLOR to do without colours."""


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose usage errors also say where to read on, and quote arguments safely."""

    def error(self, message: str) -> NoReturn:
        from reaperd.ctl.text import plain

        self.exit(2, f"{self.prog}: {plain(message)}\nTry `{self.prog} --help`.\n")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of one command line; its ``command`` is ``ps``, ``config show`` and the like."""
    parser = build_parser()
    options = parser.parse_args(
        argv, argparse.Namespace(user=False, system=False, socket=None, timeout=5.0, json=False, owner=None)
    )
    if options.user + options.system + (options.socket is not None) > 1:
        parser.error("--user, --system and --socket exclude each other")
    return options


def build_parser() -> argparse.ArgumentParser:
    common = _common_options()
    parser = _Parser(
        prog="reaperctl",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"reaperctl {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    for name, help_text, extend in _COMMANDS:
        _add_command(commands, name, name, help_text, extend)
    for group, help_text, actions in _GROUPS:
        named = commands.add_parser(group, help=help_text, parents=[common], allow_abbrev=False)
        metavar = "|".join(name for name, _, _ in actions)
        below = named.add_subparsers(metavar=metavar, required=True, title="actions")
        for name, help_of_action, extend in actions:
            _add_command(below, name, f"{group} {name}", help_of_action, extend)
    return parser


class _UserOption(argparse.Action):
    """``--user``: without a value the caller's own daemon, with one whose events are meant, as ``--owner``."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        del parser, option_string
        if values is None:
            namespace.user = True
        else:
            namespace.owner = values


def _common_options(command: str = "") -> _Parser:
    """Return the options that go before and after the command: absent ones must not undo what stood before it."""
    common = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    group = common.add_argument_group("which daemon")
    if command in _OF_USERS:
        group.add_argument(
            "--user",
            action=_UserOption,
            nargs="?",
            metavar="USER",
            type=values.parse_uid,
            help="only your own daemon; with a name or a uid, the same as --owner",
        )
    else:
        group.add_argument("--user", action="store_true", help="only your own daemon")
    group.add_argument("--system", action="store_true", help="only the system's daemon")
    group.add_argument(
        "--socket", metavar="PATH", type=values.parse_path, help="only the daemon on this socket"
    )
    group.add_argument(
        "--timeout",
        metavar="S",
        type=values.parse_seconds,
        help="seconds to wait for an answer, more than 0 (default 5)",
    )
    return common


def _add_command(
    group: Any, name: str, command: str, help_text: str, extend: Callable[[argparse.ArgumentParser], None]
) -> None:
    parser: argparse.ArgumentParser = group.add_parser(
        name,
        help=help_text,
        description=help_text[0].upper() + help_text[1:] + ".",
        parents=[_common_options(command)],
        allow_abbrev=False,
    )
    parser.set_defaults(command=command)
    extend(parser)


def _reads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON: one document")


def _status_options(parser: argparse.ArgumentParser) -> None:
    _reads(parser)
    parser.add_argument("--check", action="store_true", help="exit 1 if processes are stuck or quarantined")


def _events_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON: one line an event")
    parser.add_argument("--follow", "-f", action="store_true", help="go on with new events until interrupted")
    parser.add_argument(
        "--since",
        metavar="WHEN",
        type=values.parse_when,
        help="a UTC time (2026-01-31, 2026-01-31T12:00:00Z) or an age (10min, 2h, 3d); "
        "the default is the whole history, and with --follow now",
    )
    parser.add_argument(
        "--session",
        metavar="S",
        type=values.parse_some_text,
        help="only those of the session with this id or name, or whose id begins so",
    )
    _owner(parser)
    parser.add_argument(
        "--kind",
        metavar="KIND[,KIND]",
        type=values.parse_event_kinds,
        action="extend",
        default=[],
        help="only events of these kinds: " + ", ".join(EVENT_KINDS),
    )


def _report_options(parser: argparse.ArgumentParser) -> None:
    _reads(parser)
    parser.add_argument(
        "--since",
        metavar="WHEN",
        type=values.parse_when,
        help="a UTC time (2026-01-31, 2026-01-31T12:00:00Z) or an age (10min, 2h, 3d); the default is the whole history",
    )
    _owner(parser)
    parser.add_argument(
        "--by",
        metavar="framework|user|cause",
        type=values.parse_grouping,
        help="only the table by this (default: all three)",
    )


def _stop_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "session",
        metavar="SESSION",
        type=values.parse_some_text,
        help="its id, its name, or the beginning of its id if that is unique",
    )
    parser.add_argument(
        "--wait",
        metavar="S",
        type=values.parse_seconds,
        default=60.0,
        help="seconds to wait for its end (default 60)",
    )


def _here(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--local", action="store_true", help="ask no daemon: look from here, with your own rights"
    )


def _owner(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--owner",
        metavar="USER",
        type=values.parse_uid,
        help="only what is this user's, a name or a uid (default: all you may see)",
    )


def _orphans_options(parser: argparse.ArgumentParser) -> None:
    _reads(parser)
    _here(parser)
    _owner(parser)
    parser.add_argument("--all", action="store_true", help="those as well that only look like orphans")
    parser.add_argument(
        "--leftovers",
        action="store_true",
        help="shared memory and temporary files as well that dead workers left behind",
    )
    parser.add_argument(
        "--score",
        action="store_true",
        help="instead: what became of those that the rules would have had ended, to judge the rules by",
    )


def _process_options(parser: argparse.ArgumentParser) -> None:
    _reads(parser)
    parser.add_argument("pid", metavar="PID", type=values.parse_pid, help="the process")


def _protect_options(parser: argparse.ArgumentParser) -> None:
    _process_options(parser)
    parser.add_argument(
        "--undo", action="store_true", help="have it judged as any other again, after protect or release"
    )


def _explain_options(parser: argparse.ArgumentParser) -> None:
    _process_options(parser)
    _here(parser)


def _cleanup_options(parser: argparse.ArgumentParser) -> None:
    _reads(parser)
    _here(parser)
    _owner(parser)
    parser.add_argument(
        "--except",
        dest="leave",
        metavar="PID",
        type=values.parse_pid,
        action="append",
        default=[],
        help="leave this one alone (may be given several times)",
    )
    parser.add_argument("--dry-run", action="store_true", help="only show what would be ended, and why")
    parser.add_argument("--yes", "-y", action="store_true", help="do not ask")
    parser.add_argument(
        "--leftovers",
        action="store_true",
        help="also remove shared memory and temporary files that dead workers left behind",
    )
    parser.add_argument(
        "--wait",
        metavar="S",
        type=values.parse_seconds,
        default=60.0,
        help="seconds to wait for their end (default 60)",
    )


def _monitor_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON: one line an interval")
    _here(parser)
    parser.add_argument(
        "--duration",
        metavar="N",
        type=values.parse_duration,
        default=0.0,
        help="seconds after which to leave (default 0: go on until interrupted)",
    )
    parser.add_argument(
        "--interval",
        metavar="S",
        type=values.parse_interval,
        default=2.0,
        help="seconds from one look to the next (default 2)",
    )


def _top_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--interval",
        metavar="S",
        type=values.parse_interval,
        default=1.0,
        help="seconds from one look to the next (default 1)",
    )


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.usage = "reaperctl run [OPTIONS] [--] COMMAND [ARGS ...]"
    parser.add_argument(
        "--name", metavar="NAME", type=values.parse_name, help="what people see (default: the script's name)"
    )
    parser.add_argument(
        "--max-workers",
        metavar="N",
        type=values.parse_count,
        help="at most N workers, never more than the command asks for (REAPER_MAX_WORKERS, LOKY_MAX_CPU_COUNT)",
    )
    parser.add_argument(
        "--status-file",
        metavar="FILE",
        type=values.parse_path,
        help="write there, as JSON, that the command runs, and in the end how it ended (agent.read_status() reads it)",
    )
    parser.add_argument(
        "--isolate",
        action="store_true",
        help="give it a control group of its own, which nothing that it starts can leave",
    )
    parser.add_argument(
        "--restart",
        metavar="no|on-failure[:N]",
        type=values.parse_restarts,
        default=0,
        help="start the command again where it fails, at most N times (default 3), after an OOM kill with half the workers",
    )
    parser.add_argument(
        "--backoff",
        metavar="S",
        type=values.parse_seconds,
        default=1.0,
        help="seconds to wait before the first restart, twice as long before each that follows (default 1)",
    )
    parser.add_argument(
        "command_line",
        metavar="COMMAND",
        nargs=argparse.REMAINDER,
        help="the command and its arguments",
    )


def _ui_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--port",
        metavar="N",
        type=values.parse_port,
        default=8501,
        help="the port, 0 for any that is free (default 8501)",
    )
    parser.add_argument(
        "--address",
        metavar="A",
        type=values.parse_some_text,
        default="127.0.0.1",
        help="the address, one that no other machine reaches (default 127.0.0.1)",
    )


def _check_options(parser: argparse.ArgumentParser) -> None:
    _reads(parser)
    parser.add_argument("file", metavar="FILE", nargs="?", help="default: the file that reaperd would read")


_COMMANDS: tuple[tuple[str, str, Callable[[argparse.ArgumentParser], None]], ...] = (
    ("status", "print what the daemon is doing", _status_options),
    ("ps", "print the sessions and their workers as a tree", _reads),
    ("orphans", "print the workers that outlived their pool, and what becomes of them", _orphans_options),
    ("explain", "print how one process is judged, and on what evidence", _explain_options),
    ("cleanup", "end the orphans now: show them, ask, and end them", _cleanup_options),
    ("protect", "have one running process left alone", _protect_options),
    ("release", "let a process go on that was stopped, and leave it alone", _process_options),
    ("monitor", "show what there is, and what it takes, again and again", _monitor_options),
    ("top", "watch sessions, orphans and events on a live screen, and act on them with keys", _top_options),
    ("run", "run a command as a session, and start it again where it fails", _run_options),
    ("events", "print what happened: to sessions, to orphans, and to the daemon itself", _events_options),
    ("report", "sum up the history: what was ended, what that freed, and how fast", _report_options),
    ("stop", "end a session: its leader, then what that leaves behind", _stop_options),
    ("ui", "serve a page for the browser, on this machine alone", _ui_options),
    ("ping", "ask the daemon whether it is there", _reads),
    ("doctor", "check whether this machine lets Reaper do its work, and say what to do if not", _reads),
)
_CONFIG_ACTIONS: tuple[tuple[str, str, Callable[[argparse.ArgumentParser], None]], ...] = (
    ("check", "check a configuration file and name every fault; exit 2 if there is one", _check_options),
    ("show", "print the settings that the running daemon uses", _reads),
    ("default", "print the built-in settings; needs no daemon", _reads),
)
_ALERTS_ACTIONS: tuple[tuple[str, str, Callable[[argparse.ArgumentParser], None]], ...] = (
    ("test", "send a message to everyone who is alerted, and say what came of each; for admins", _reads),
)
_GROUPS = (
    ("alerts", "try out whether alerts arrive", _ALERTS_ACTIONS),
    ("config", "check or print settings", _CONFIG_ACTIONS),
)
