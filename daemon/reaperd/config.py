"""What an administrator can set: text in, one ``Config`` out, or every fault at once.

The rules of this file:

1. A setting is one field of a table's class. Its TOML key, its kind of value with the range, its default and whether
   its feature is built stand there and nowhere else: parsing, suggestions, ``render_config`` and
   ``without_effect`` all read the fields.
2. A field's name carries the unit (``grace_s``), its TOML key does not (``grace``).
3. Pure: files are read in ``config_files``. Whatever the text, only ConfigError leaves.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

from reaperd.config_values import (
    ADDRESS,
    ALERT_URLS,
    COMMAND,
    COUNT,
    CPU_LIMIT,
    MEMORY_LIMIT,
    PERCENT,
    SIZE,
    SWITCH,
    TEXT,
    TEXTS,
    Address,
    Fault,
    Kind,
    RefusedError,
    duration,
    escaped,
    hidden_url,
    list_of,
    must_be,
    one_of,
    shown,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_TEXT_CHARS = 64 * 1024  # of one file; all settings with their explanations are a tenth of it
_MAX_DOTS = 200  # in a line: for a key a.a.a... tomllib takes memory by the square, gigabytes for 64 KiB

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]
Action = Literal["kill", "quarantine", "report"]
OnBreach = Literal["kill-worker", "kill-session", "report"]
SignatureRole = Literal["worker", "tracker"]
EventKind = Literal[
    "registered", "ended", "reaped", "orphan", "killed", "quarantined", "released", "stuck", "breach",
    "reload", "started", "stopped",
]  # fmt: skip


class ConfigError(Exception):
    """A configuration that cannot be used; ``faults`` has one line for each thing to put right."""

    def __init__(self, faults: Iterable[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(self.faults))


# -- the settings ----------------------------------------------------------------------------------------


def _key(key: str, kind: Kind, *, secret: bool = False) -> dict[str, Any]:
    """A ``secret`` value, a list of URLs, stays out of faults, and out of what is shown to strangers."""
    return {"key": key, "kind": kind, "built": True, "secret": secret}


def _key_to_come(key: str, kind: Kind, *, secret: bool = False) -> dict[str, Any]:
    """Parsed and checked like any other, but the feature is not built yet: see ``without_effect``."""
    return {**_key(key, kind, secret=secret), "built": False}


class ExtraSignature(NamedTuple):
    """A framework of the administrator's own, known by the ``tokens`` in its workers' argv."""

    name: Annotated[str, _key("name", TEXT)]
    tokens: Annotated[tuple[str, ...], _key("tokens", list_of(TEXT, "texts", may_be_empty=False))]
    role: Annotated[SignatureRole, _key("role", one_of(SignatureRole))] = "worker"


_SIGNATURE = Kind(
    lambda value: ExtraSignature(**_parse_table(_settings_of(ExtraSignature), value)),
    lambda signature: f"{{ {', '.join(_render_table(_settings_of(ExtraSignature), signature))} }}",
)
_DURATION = duration(more_than=0)
_GRACE = duration(at_least=0)  # none at all is a choice


class DaemonConfig(NamedTuple):
    """The daemon's log."""

    log_level: Annotated[LogLevel, _key("log_level", one_of(LogLevel))] = "info"
    log_format: Annotated[LogFormat, _key("log_format", one_of(LogFormat))] = "text"


class ScanConfig(NamedTuple):
    """How often the daemon looks around, and what is done about orphans that nobody registered."""

    enabled: Annotated[bool, _key("enabled", SWITCH)] = True
    interval_s: Annotated[float, _key("interval", _DURATION)] = 30.0
    orphan_age_limit_s: Annotated[float, _key("orphan_age_limit", _GRACE)] = 300.0
    cpu_threshold_percent: Annotated[float, _key("cpu_threshold", PERCENT)] = 50.0
    cpu_window_s: Annotated[float, _key("cpu_window", _DURATION)] = 30.0
    memory_threshold_bytes: Annotated[int, _key("memory_threshold", SIZE)] = 64 * 1024**2
    action: Annotated[Action, _key("action", one_of(Action))] = "kill"
    quarantine_for_s: Annotated[float, _key("quarantine_for", _DURATION)] = 600.0
    extra_signatures: Annotated[
        tuple[ExtraSignature, ...], _key("extra_signatures", list_of(_SIGNATURE, "tables"))
    ] = ()


class KillConfig(NamedTuple):
    """How what a dead leader left is ended, and what is cleared away after it."""

    grace_s: Annotated[float, _key("grace", _GRACE)] = 5.0
    exit_grace_s: Annotated[float, _key("exit_grace", _GRACE)] = 10.0
    tracker_grace_s: Annotated[float, _key("tracker_grace", _GRACE)] = 10.0
    reclaim_shm: Annotated[bool, _key("reclaim_shm", SWITCH)] = True
    dry_run: Annotated[bool, _key("dry_run", SWITCH)] = False


class SessionsConfig(NamedTuple):
    """What a session may have; ``max_workers`` is told to the script, which is not made to keep to it."""

    max_workers: Annotated[int, _key("max_workers", COUNT)] = 4
    max_per_uid: Annotated[int, _key("max_per_uid", COUNT)] = 1000
    isolate: Annotated[bool, _key("isolate", SWITCH)] = False


class LimitsConfig(NamedTuple):
    """``None`` is no limit; a CPU limit of 200.0 percent is two whole cores."""

    worker_memory_bytes: Annotated[int | None, _key_to_come("worker_memory", MEMORY_LIMIT)] = None
    session_memory_bytes: Annotated[int | None, _key_to_come("session_memory", MEMORY_LIMIT)] = None
    worker_cpu_percent: Annotated[float | None, _key_to_come("worker_cpu", CPU_LIMIT)] = None
    session_cpu_percent: Annotated[float | None, _key_to_come("session_cpu", CPU_LIMIT)] = None
    on_breach: Annotated[OnBreach, _key_to_come("on_breach", one_of(OnBreach))] = "kill-worker"


class ProtectConfig(NamedTuple):
    """Who is never signalled: by login name, by process name, by systemd unit."""

    users: Annotated[tuple[str, ...], _key("users", TEXTS)] = ()
    names: Annotated[tuple[str, ...], _key("names", TEXTS)] = ()
    units: Annotated[tuple[str, ...], _key("units", TEXTS)] = ()


class AccessConfig(NamedTuple):
    """Who may see and stop what is another user's, besides root."""

    admins: Annotated[tuple[str, ...], _key("admins", TEXTS)] = ("root",)


class MetricsConfig(NamedTuple):
    """Where figures for Prometheus are served."""

    enabled: Annotated[bool, _key("enabled", SWITCH)] = False
    listen: Annotated[Address, _key("listen", ADDRESS)] = Address("127.0.0.1", 9478)


class AlertsConfig(NamedTuple):
    """The URLs carry passwords and tokens, so they are kept out of ``repr`` as well."""

    urls: Annotated[tuple[str, ...], _key("urls", ALERT_URLS, secret=True)] = ()
    command: Annotated[tuple[str, ...], _key("command", COMMAND)] = ()
    on: Annotated[tuple[EventKind, ...], _key("on", list_of(one_of(EventKind), "kinds of event"))] = (
        "reaped",
        "stuck",
        "quarantined",
        "breach",
    )
    group_within_s: Annotated[float, _key("group_within", duration(at_least=1))] = 60.0

    def __repr__(self) -> str:
        return f"AlertsConfig(on={self.on!r})"


class HistoryConfig(NamedTuple):
    """How long events are kept."""

    keep_s: Annotated[float, _key("keep", _DURATION)] = 90 * 86_400.0


class Config(NamedTuple):
    """One field for each table of ``reaper.toml``; ``Config()`` is what an empty file means."""

    daemon: DaemonConfig = DaemonConfig()
    scan: ScanConfig = ScanConfig()
    kill: KillConfig = KillConfig()
    sessions: SessionsConfig = SessionsConfig()
    limits: LimitsConfig = LimitsConfig()
    protect: ProtectConfig = ProtectConfig()
    access: AccessConfig = AccessConfig()
    metrics: MetricsConfig = MetricsConfig()
    alerts: AlertsConfig = AlertsConfig()
    history: HistoryConfig = HistoryConfig()


class Setting(NamedTuple):
    """What the annotation of a field says, and the field's own name; ``required`` where it has no default."""

    field: str
    required: bool
    key: str
    kind: Kind
    built: bool
    secret: bool


def _settings_of(table: Any) -> dict[str, Setting]:
    hints = get_type_hints(table, include_extras=True)
    found = (Setting(f, f not in table._field_defaults, **hints[f].__metadata__[0]) for f in table._fields)
    return {setting.key: setting for setting in found}


# table -> key -> setting, in the order of the file.
SETTINGS: Mapping[str, Mapping[str, Setting]] = {
    name: _settings_of(type(table)) for name, table in Config()._asdict().items()
}


# -- text to Config --------------------------------------------------------------------------------------


def parse_config(sources: Sequence[tuple[str, str]]) -> Config:
    """Return what the (file name, TOML text) pairs say together, a later one winning key by key.

    Raises ConfigError with every fault of every text, also where a later text sets the same key.
    """
    values: dict[str, dict[str, Any]] = {table: {} for table in SETTINGS}
    faults = []
    for name, text in sources:
        try:
            _merge(text, values)
        except RefusedError as refused:
            faults += [f"{escaped(name)}: {_in_words(fault)}" for fault in refused.faults]
    if faults:
        raise ConfigError(faults)
    defaults = Config()
    return Config(
        **{table: getattr(defaults, table)._replace(**changed) for table, changed in values.items()}
    )


def _merge(text: str, values: dict[str, dict[str, Any]]) -> None:
    faults: list[Fault] = []
    for table, given in _load(text).items():
        if table not in SETTINGS:
            faults.append(_unknown_table(table, given))
            continue
        try:
            values[table].update(_parse_table(SETTINGS[table], given))
        except RefusedError as refused:
            faults += [f._replace(where=f"[{table}] {f.where}".rstrip()) for f in refused.faults]
    if faults:
        raise RefusedError(*faults)


def _load(text: str) -> dict[str, object]:
    if len(text) > MAX_TEXT_CHARS:
        raise RefusedError(Fault("", f"must be at most {MAX_TEXT_CHARS} characters long"))
    for number, line in enumerate(text.split("\n"), 1):
        if line.count(".") > _MAX_DOTS:
            raise RefusedError(Fault(f"line {number}", f"must have at most {_MAX_DOTS} dots"))
    try:
        text.encode()  # half a surrogate pair would pass, and could never be written back
        document: dict[str, object] = tomllib.loads(text)
    except UnicodeEncodeError:
        raise RefusedError(Fault("", "holds a character that is not Unicode text")) from None
    except tomllib.TOMLDecodeError as error:
        raise RefusedError(_syntax_fault(str(error), text)) from None
    except RecursionError:
        raise RefusedError(Fault("", "is nested too deeply")) from None
    except ValueError:  # int() refuses more than 4300 digits
        raise RefusedError(Fault("", "holds a number or a date that cannot be read")) from None
    return document


def _syntax_fault(message: str, text: str) -> Fault:
    match = re.fullmatch(r"(?s)(.*) \(at (line \d+, column \d+|end of document)\)", message)
    if match is None:
        return Fault("", message)
    end = f"line {text.count(chr(10)) + 1}, end of file"
    return Fault(end if match[2] == "end of document" else match[2], match[1])


def _parse_table(settings: Mapping[str, Setting], given: object) -> dict[str, Any]:
    """Return field -> value for the keys in ``given``; raise RefusedError with every fault in it."""
    if not isinstance(given, dict):
        raise must_be("a table", given)
    values = {}
    faults = [Fault(key, "must be given") for key, s in settings.items() if s.required and key not in given]
    for key, value in given.items():
        if key not in settings:
            faults.append(Fault(_name(key), _unknown_key(key, settings)))
            continue
        try:
            values[settings[key].field] = settings[key].kind.parse(value)
        except RefusedError as refused:
            found = refused.inside(key)
            faults += [f._replace(got=()) for f in found] if settings[key].secret else found
    if faults:
        raise RefusedError(*faults)
    return values


# -- faults in words -------------------------------------------------------------------------------------


def _in_words(fault: Fault) -> str:
    text = f"{fault.where}: {fault.what}" if fault.where else fault.what
    return f"{text}, got {shown(fault.got[0])}" if fault.got else text


def _unknown_table(name: str, given: object) -> Fault:
    homes = _homes(name)
    if homes or not isinstance(given, dict | list):  # a list is [[name]]
        return Fault(_name(name), f"must stand under {homes or 'a table such as [scan]'}")
    close = _closest(name, SETTINGS)
    hint = f"did you mean [{close}]?" if close else f"there are {', '.join(SETTINGS)}"
    return Fault(f"[{_name(name)}]", f"unknown table, {hint}")


def _unknown_key(key: str, settings: Mapping[str, Setting]) -> str:
    if close := _closest(key, settings):
        return f"unknown key, did you mean {close}?"
    homes = _homes(key)
    return "unknown key, " + (f"it belongs under {homes}" if homes else f"there are {', '.join(settings)}")


def _homes(key: str) -> str:
    return " or ".join(f"[{table}]" for table, settings in SETTINGS.items() if key in settings)


def _closest(word: str, known: Iterable[str]) -> str | None:
    import difflib  # only a mistake needs it

    return next(iter(difflib.get_close_matches(word, known, n=1)), None)


def _name(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]{1,40}", key) else shown(key)


# -- Config to text --------------------------------------------------------------------------------------


def render_config(config: Config, *, show_secrets: bool = True) -> str:
    """Return every setting as TOML that ``parse_config`` reads back as the same Config.

    Without ``show_secrets`` of each alert URL only its service is left, ``"slack://***"``: for people who may see the rest.
    """
    tables = [
        "\n".join([f"[{table}]", *_render_table(settings, getattr(config, table), show_secrets=show_secrets)])
        for table, settings in SETTINGS.items()
    ]
    return "\n\n".join(tables) + "\n"


def _render_table(settings: Mapping[str, Setting], table: Any, *, show_secrets: bool = True) -> list[str]:
    lines = []
    for setting in settings.values():
        value = getattr(table, setting.field)
        if setting.secret and not show_secrets:
            value = tuple(map(hidden_url, value))
        lines.append(f"{setting.key} = {setting.kind.render(value)}")
    return lines


def without_effect(config: Config) -> tuple[str, ...]:
    """Return the settings, as ``scan.action``, that were changed though their feature is not built yet."""
    defaults = Config()
    return tuple(
        f"{table}.{setting.key}"
        for table, settings in SETTINGS.items()
        for setting in settings.values()
        if not setting.built
        and getattr(getattr(config, table), setting.field) != getattr(getattr(defaults, table), setting.field)
    )
