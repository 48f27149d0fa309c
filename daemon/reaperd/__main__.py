"""``reaperd``: reads the command line and the settings, sets up logging, and runs the daemon."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from reaperd import __version__, alert_check, logs
from reaperd.config import Config, ConfigError
from reaperd.config_files import open_to_others_in_words, read_config, secrets_open_to_others
from reaperd.loop import Daemon, StartError, set_log_level
from reaperd.paths import default_paths

if TYPE_CHECKING:
    import argparse

_EPILOG = """exit codes:
  0  ended by SIGTERM or SIGINT, or the configuration is good (--check-config)
  1  cannot start, or failed
  2  wrong usage, bad configuration, or root without a capability that it must have: trying again does not help

SIGHUP reloads the configuration; a bad one is reported and the old settings stay.
"""


def main(arguments: list[str] | None = None) -> None:
    """Run the command and leave with its exit code."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = read_options(sys.argv[1:] if arguments is None else arguments)
    if options.pidfile and not options.detach:
        print("reaperd: --pidfile goes with --detach", file=sys.stderr)
        return 2
    paths = default_paths()
    config_path = os.path.abspath(options.config or os.environ.get("REAPER_CONFIG") or paths.config)
    required = bool(options.config or os.environ.get("REAPER_CONFIG"))

    def read() -> Config:
        config = read_config(config_path, required=required)
        return config if not options.dry_run else _with_dry_run(config)

    try:
        config = read()
        if options.check_config:
            return _check_alerts(config_path, config)
        logs.set_up(config.daemon.log_format)
        set_log_level(config)
        daemon = Daemon(
            mode=paths.mode,
            socket_path=options.socket or os.environ.get("REAPER_SOCKET") or paths.socket,
            state_dir=os.path.abspath(options.state_dir or paths.state),
            config_path=config_path,
            config=config,
            read_config=read,
        )
        if options.detach:
            _run_detached(daemon, options.pidfile)
        else:
            daemon.run()
    except ConfigError as error:
        for fault in error.faults:
            logs.say_fault(fault)
        return 2
    except StartError as error:
        logging.getLogger("reaperd").error("%s", error)
        return error.code
    return 0


def _check_alerts(path: str, config: Config) -> int:
    """Not at a start: whom the daemon can alert must keep it from nothing, and who sends the alerts says the same."""
    faults, warnings = alert_check.faults_and_warnings(config.alerts.urls)
    if faults:
        raise ConfigError([f"{path}: {fault}" for fault in faults])
    for name in secrets_open_to_others(path):
        logs.say_fault(f"warning: {open_to_others_in_words(name)}")
    for warning in warnings:
        logs.say_fault(f"warning: {warning}")
    print(f"{path}: the configuration is good")
    return 0


class Options(NamedTuple):
    """What the command line says."""

    config: str | None = None
    socket: str | None = None
    state_dir: str | None = None
    pidfile: str | None = None
    detach: bool = False
    check_config: bool = False
    dry_run: bool = False


def read_options(arguments: Sequence[str]) -> Options:
    """Return what ``arguments`` say; SystemExit after ``--help``, ``--version`` or a mistake."""
    return parse_plainly(arguments) or Options(**vars(parser().parse_args(arguments)))


def parse_plainly(arguments: Sequence[str]) -> Options | None:
    """Return what ``arguments`` say where each option is spelled out and has what it needs; None for all else.

    A daemon is started so, and argparse with what it imports would take a MiB for as long as it lives.
    """
    found: dict[str, str | bool] = {}
    words = iter(arguments)
    for word in words:
        option, equals, value = word.partition("=")
        name = option[2:].replace("-", "_")
        if option in ("--detach", "--check-config", "--dry-run") and not equals:
            found[name] = True
        elif option in ("--config", "--socket", "--state-dir", "--pidfile"):
            value = value if equals else next(words, "-")
            if value.startswith("-") and not equals:
                return None
            found[name] = value
        else:
            return None
    return Options(**found)  # type: ignore[arg-type]


def parser() -> argparse.ArgumentParser:
    """Return what reads every command line, and explains them all."""
    import argparse

    reader = argparse.ArgumentParser(
        prog="reaperd",
        description="Ends the training workers that a dead parent left behind. Runs in the foreground.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = reader.add_argument
    add(
        "--config",
        metavar="FILE",
        help="settings (default: /etc/reaper/reaper.toml, for users ~/.config/reaper/reaper.toml)",
    )
    add("--socket", metavar="PATH", help="where agents and reaperctl reach this daemon")
    add("--state-dir", metavar="DIR", help="where reaper.db is kept")
    add("--detach", action="store_true", help="go into the background, for hosts without systemd")
    add("--pidfile", metavar="FILE", help="with --detach: write the daemon's pid into FILE")
    add("--check-config", action="store_true", help="report every fault in the settings and leave")
    add("--dry-run", action="store_true", help="signal nobody: say what would have been done")
    add("--version", action="version", version=f"reaperd {__version__}")
    return reader


def _with_dry_run(config: Config) -> Config:
    return config._replace(kill=config.kill._replace(dry_run=True))


def _run_detached(daemon: Daemon, pidfile: str | None) -> None:
    """Go into the background as daemon(7) describes; python-daemon knows the steps."""
    import lockfile

    import daemon as python_daemon
    from daemon import pidfile as python_daemon_pidfile

    daemon.check_start()
    folder = os.path.dirname(os.path.abspath(pidfile)) if pidfile else "/"
    if not os.access(folder, os.W_OK):
        raise StartError(f"cannot use {pidfile}: {folder} is no directory that can be written to")
    lock = python_daemon_pidfile.TimeoutPIDLockFile(os.path.abspath(pidfile), -1) if pidfile else None
    try:
        if lock is not None and lock.is_locked():
            if _is_reaperd(lock.read_pid()):
                raise StartError(f"cannot use {pidfile}: reaperd runs already with pid {lock.read_pid()}")
            lock.break_lock()
        with python_daemon.DaemonContext(
            pidfile=lock, umask=0o022, stdout=None, stderr=sys.stderr, detach_process=True
        ):
            daemon.run()
    except (lockfile.Error, OSError) as error:
        raise StartError(f"cannot use {pidfile}: {error}") from None


def _is_reaperd(pid: int | None) -> bool:
    """Say whether the pid in an old file is still a daemon's, and not somebody else's by now."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return b"reaperd" in file.read()
    except OSError:
        return False


if __name__ == "__main__":
    main()
