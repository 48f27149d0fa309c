"""Reads the configuration from its file and the drop-ins beside it; what the text means is for ``config``."""

from __future__ import annotations

import os
import stat

from reaperd.config import MAX_TEXT_CHARS, Config, ConfigError, parse_config

_DEV_NULL = os.makedev(1, 3)  # Linux: Documentation/admin-guide/devices.txt


def read_config(path: str | None, *, required: bool) -> Config:
    """Return what ``path`` and ``<path>.d/*.toml``, in name order, say together; ``None`` is the defaults.

    A file that is not there says nothing, unless it is ``required``; its drop-ins count either way.
    Raises ConfigError with the faults of all files, those that cannot be read included.
    """
    if not path:  # "" too: its drop-ins would be looked for in the working directory
        if required:
            raise ConfigError(["cannot read the configuration: no file was named"])
        return Config()
    sources, faults = [], []
    try:
        names = [path, *_drop_ins(f"{path}.d")]
    except ConfigError as error:
        names, faults = [path], [*error.faults]
    for name in names:
        try:
            sources.append((name, _read_text(name)))
        except FileNotFoundError as error:
            if required or name != path:
                faults.append(_cannot_read(name, error))
        except (OSError, ValueError) as error:  # ValueError: no UTF-8, a NUL in the path, our own below
            faults.append(_cannot_read(name, error))
    return _parse(sources, faults)


def secrets_open_to_others(path: str | None) -> list[str]:
    """Return those of ``path`` and its drop-ins that hold URLs of alerts, with their passwords, and that any user can read."""
    found = []
    for name in [path, *_drop_ins(f"{path}.d")] if path else []:
        try:
            holds_secrets = bool(parse_config([(name, _read_text(name))]).alerts.urls)
            if holds_secrets and _is_open_to_others(os.path.realpath(name)):
                found.append(name)
        except (OSError, ValueError, ConfigError):  # it has become another since
            continue
    return found


def open_to_others_in_words(name: str) -> str:
    """Return what is said of such a file, and what to do."""
    return f"every user can read the passwords of [alerts] urls in {name}: chmod o-r it"


def _is_open_to_others(path: str) -> bool:
    """Say whether anybody may read a file, and reach it through the folders that it is in."""
    if not os.stat(path).st_mode & stat.S_IROTH:
        return False
    while (folder := os.path.dirname(path)) != path:
        if not os.stat(folder).st_mode & stat.S_IXOTH:
            return False
        path = folder
    return True


def _parse(sources: list[tuple[str, str]], faults: list[str]) -> Config:
    try:
        config = parse_config(sources)
    except ConfigError as error:
        raise ConfigError([*faults, *error.faults]) from None
    if faults:
        raise ConfigError(faults)
    return config


def _drop_ins(directory: str) -> list[str]:
    """Return the drop-ins in name order; a hidden one is an editor's lock or backup."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise ConfigError([_cannot_read(directory, error)]) from None
    return [f"{directory}/{name}" for name in sorted(names) if name.endswith(".toml") and name[0] != "."]


def _read_text(path: str) -> str:
    """Return the text of one file; raise OSError or ValueError.

    /dev/null is an empty file, by itself or as the link that masks a drop-in. Every other device, and a
    FIFO, which would block a daemon that reloads, is refused.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if stat.S_ISCHR(status.st_mode) and status.st_rdev == _DEV_NULL:
            return ""
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(
                "it is a directory" if stat.S_ISDIR(status.st_mode) else "it is not a regular file"
            )
        data = _read_up_to(descriptor, MAX_TEXT_CHARS + 1)
    finally:
        os.close(descriptor)
    if len(data) > MAX_TEXT_CHARS:
        raise ValueError(f"it is larger than {MAX_TEXT_CHARS} bytes")
    return data.decode("utf-8-sig")  # a byte order mark, as Windows editors leave it, is no fault


def _read_up_to(descriptor: int, limit: int) -> bytes:
    data = b""
    while len(data) < limit and (chunk := os.read(descriptor, limit - len(data))):
        data += chunk
    return data


def _cannot_read(path: str, error: OSError | ValueError) -> str:
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in path)
    return f"cannot read {shown}: {_reason(error)}"


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, OSError):
        return (error.strerror or str(error)).lower()
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 at byte {error.start}"
    return str(error)
