"""What an administrator can set: text in, one ``Config`` out, or every fault at once.

The rules of this file:

1. A setting is one dataclass field. Its TOML key, its kind of value with the range, its default and whether
   its feature is built stand there and nowhere else: parsing, suggestions, ``render_config`` and
   ``without_effect`` all read the fields.
2. A field's name carries the unit (``grace_s``), its TOML key does not (``grace``).
3. Pure: files are read in ``config_files``. Whatever the text, only ConfigError leaves.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

from reaperd.config_values import (
    ADDRESS,
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
    """A ``secret`` value stays out of faults, and out of what is shown to strangers."""
    return {"key": key, "kind": kind, "built": True, "secret": secret}


def _key_to_come(key: str, kind: Kind, *, secret: bool = False) -> dict[str, Any]:
    """Parsed and checked like any other, but the feature is not built yet: see ``without_effect``."""
    return {**_key(key, kind, secret=secret), "built": False}


@dataclass(frozen=True, slots=True)
class ExtraSignature:
    """A framework of the administrator's own, known by the ``tokens`` in its workers' argv."""

    name: str = field(metadata=_key("name", TEXT))
    tokens: tuple[str, ...] = field(metadata=_key("tokens", list_of(TEXT, "texts", may_be_empty=False)))
    role: SignatureRole = field(default="worker", metadata=_key("role", one_of(SignatureRole)))


_SIGNATURE = Kind(
    lambda value: ExtraSignature(**_parse_table(_settings_of(ExtraSignature), value)),
    lambda signature: f"{{ {', '.join(_render_table(signature))} }}",
)
_DURATION = duration(more_than=0)
_GRACE = duration(at_least=0)  # none at all is a choice


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """The daemon's log."""

    log_level: LogLevel = field(default="info", metadata=_key("log_level", one_of(LogLevel)))
    log_format: LogFormat = field(default="text", metadata=_key("log_format", one_of(LogFormat)))


@dataclass(frozen=True, slots=True)
class ScanConfig:
    """How often the daemon looks around, and, to come, what is done about orphans that nobody registered."""

    enabled: bool = field(default=True, metadata=_key_to_come("enabled", SWITCH))
    interval_s: float = field(default=30.0, metadata=_key("interval", _DURATION))
    orphan_age_limit_s: float = field(default=300.0, metadata=_key_to_come("orphan_age_limit", _GRACE))
    cpu_threshold_percent: float = field(default=50.0, metadata=_key_to_come("cpu_threshold", PERCENT))
    cpu_window_s: float = field(default=30.0, metadata=_key_to_come("cpu_window", _DURATION))
    memory_threshold_bytes: int = field(default=64 * 1024**2, metadata=_key_to_come("memory_threshold", SIZE))
    action: Action = field(default="kill", metadata=_key_to_come("action", one_of(Action)))
    quarantine_for_s: float = field(default=600.0, metadata=_key_to_come("quarantine_for", _DURATION))
    extra_signatures: tuple[ExtraSignature, ...] = field(
        default=(), metadata=_key_to_come("extra_signatures", list_of(_SIGNATURE, "tables"))
    )


@dataclass(frozen=True, slots=True)
class KillConfig:
    """How what a dead leader left is ended, and what is cleared away after it."""

    grace_s: float = field(default=5.0, metadata=_key("grace", _GRACE))
    exit_grace_s: float = field(default=10.0, metadata=_key("exit_grace", _GRACE))
    tracker_grace_s: float = field(default=10.0, metadata=_key("tracker_grace", _GRACE))
    reclaim_shm: bool = field(default=True, metadata=_key("reclaim_shm", SWITCH))
    dry_run: bool = field(default=False, metadata=_key("dry_run", SWITCH))


@dataclass(frozen=True, slots=True)
class SessionsConfig:
    """What a session may have; ``max_workers`` is told to the script, which is not made to keep to it."""

    max_workers: int = field(default=4, metadata=_key("max_workers", COUNT))
    max_per_uid: int = field(default=1000, metadata=_key("max_per_uid", COUNT))
    isolate: bool = field(default=False, metadata=_key_to_come("isolate", SWITCH))


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """``None`` is no limit; a CPU limit of 200.0 percent is two whole cores."""

    worker_memory_bytes: int | None = field(
        default=None, metadata=_key_to_come("worker_memory", MEMORY_LIMIT)
    )
    session_memory_bytes: int | None = field(
        default=None, metadata=_key_to_come("session_memory", MEMORY_LIMIT)
    )
    worker_cpu_percent: float | None = field(default=None, metadata=_key_to_come("worker_cpu", CPU_LIMIT))
    session_cpu_percent: float | None = field(default=None, metadata=_key_to_come("session_cpu", CPU_LIMIT))
    on_breach: OnBreach = field(default="kill-worker", metadata=_key_to_come("on_breach", one_of(OnBreach)))


@dataclass(frozen=True, slots=True)
class ProtectConfig:
    """Who is never signalled: by login name, by process name, by systemd unit."""

    users: tuple[str, ...] = field(default=(), metadata=_key("users", TEXTS))
    names: tuple[str, ...] = field(default=(), metadata=_key("names", TEXTS))
    units: tuple[str, ...] = field(default=(), metadata=_key("units", TEXTS))


@dataclass(frozen=True, slots=True)
class AccessConfig:
    """Who may see and stop what is another user's, besides root."""

    admins: tuple[str, ...] = field(default=("root",), metadata=_key("admins", TEXTS))


@dataclass(frozen=True, slots=True)
class MetricsConfig:
    """Where figures for Prometheus are served."""

    enabled: bool = field(default=False, metadata=_key_to_come("enabled", SWITCH))
    listen: Address = field(default=Address("127.0.0.1", 9478), metadata=_key_to_come("listen", ADDRESS))


@dataclass(frozen=True, slots=True)
class AlertsConfig:
    """The URLs carry passwords and tokens, so they are kept out of ``repr`` as well."""

    urls: tuple[str, ...] = field(default=(), repr=False, metadata=_key_to_come("urls", TEXTS, secret=True))
    on: tuple[EventKind, ...] = field(
        default=("reaped", "stuck", "quarantined", "breach"),
        metadata=_key_to_come("on", list_of(one_of(EventKind), "kinds of event")),
    )


@dataclass(frozen=True, slots=True)
class HistoryConfig:
    """How long events are kept."""

    keep_s: float = field(default=90 * 86_400.0, metadata=_key("keep", _DURATION))


@dataclass(frozen=True, slots=True)
class Config:
    """One field for each table of ``reaper.toml``; ``Config()`` is what an empty file means."""

    daemon: DaemonConfig = field(default_factory=DaemonConfig)
    scan: ScanConfig = field(default_factory=ScanConfig)
    kill: KillConfig = field(default_factory=KillConfig)
    sessions: SessionsConfig = field(default_factory=SessionsConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    protect: ProtectConfig = field(default_factory=ProtectConfig)
    access: AccessConfig = field(default_factory=AccessConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    alerts: AlertsConfig = field(default_factory=AlertsConfig)
    history: HistoryConfig = field(default_factory=HistoryConfig)


class Setting(NamedTuple):
    """What the metadata of a dataclass field says, and the field's own name; ``required`` where it has no default."""

    field: str
    required: bool
    key: str
    kind: Kind
    built: bool
    secret: bool


def _settings_of(table: Any) -> dict[str, Setting]:
    found = (Setting(f.name, f.default is MISSING, **f.metadata) for f in fields(table))
    return {setting.key: setting for setting in found}


SETTINGS: Mapping[str, Mapping[str, Setting]] = {
    table.name: _settings_of(table.default_factory) for table in fields(Config)
}  # table -> key -> setting, in the order of the file


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
        **{table: replace(getattr(defaults, table), **changed) for table, changed in values.items()}
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

    Without ``show_secrets`` the alert URLs become ``"(hidden)"``: for people who may see only the rest.
    """
    tables = [
        "\n".join([f"[{table}]", *_render_table(getattr(config, table), show_secrets=show_secrets)])
        for table in SETTINGS
    ]
    return "\n\n".join(tables) + "\n"


def _render_table(table: Any, *, show_secrets: bool = True) -> list[str]:
    lines = []
    for setting in _settings_of(table).values():
        value = getattr(table, setting.field)
        hidden = setting.secret and not show_secrets and value
        lines.append(f"{setting.key} = " + ('["(hidden)"]' if hidden else setting.kind.render(value)))
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
