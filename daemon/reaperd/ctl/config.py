"""The ``config`` commands: check a file, show what the daemon uses, print what is built in."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from typing import Any

from reaperd.ctl import DONE, USAGE, CommandError
from reaperd.ctl.terminal import put, put_json, tell
from reaperd.ctl.text import plain


def check(options: Namespace) -> int:
    """Check a configuration file and its drop-ins, and name every fault in them."""
    from reaperd.alert_check import faults_and_warnings
    from reaperd.config import ConfigError
    from reaperd.config_files import open_to_others_in_words, read_config, secrets_open_to_others
    from reaperd.paths import default_paths

    asked = options.file or os.environ.get("REAPER_CONFIG")
    path = asked or default_paths().config
    faults: list[str] = []
    warnings = [open_to_others_in_words(name) for name in secrets_open_to_others(path)]
    try:
        found, more = faults_and_warnings(read_config(path, required=bool(asked)).alerts.urls)
        faults, warnings = [plain(f"{path}: {fault}") for fault in found], [*warnings, *more]
    except ConfigError as error:
        faults = [plain(fault) for fault in error.faults]
    for warning in warnings:
        tell(f"warning: {warning}")
    if options.json:
        put_json({"ok": not faults, "file": path, "faults": faults, "warnings": warnings})
    elif faults:
        put(faults)
    elif os.path.exists(path):
        put(f"{plain(path)}: no faults")
    else:
        put(f"{plain(path)} does not exist: the built-in settings apply")
    return USAGE if faults else DONE


def show(options: Namespace) -> int:
    """Print the settings that the running daemon uses."""
    from reaperd.ctl.link import Link

    return _put_toml(str(Link.of(options).ask("config").get("toml", "")), as_json=options.json)


def default(options: Namespace) -> int:
    """Print the built-in settings, for which no daemon is needed."""
    from reaperd.config import Config, render_config

    return _put_toml(render_config(Config()), as_json=options.json)


def _put_toml(text: str, *, as_json: bool) -> int:
    if as_json:
        put_json(_document(text))
    elif sys.stdout is not None and sys.stdout.isatty():
        put(plain(line) for line in text.splitlines())
    else:  # what is redirected into a file must be the same text
        put(text.removesuffix("\n"))
    return DONE


def _document(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        found: dict[str, Any] = tomllib.loads(text)
        json.dumps(found)  # a date is none of our settings
    except (ValueError, TypeError, RecursionError) as error:
        raise CommandError(f"cannot read the daemon's settings: {error}") from None
    return found
