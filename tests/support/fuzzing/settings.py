"""The configuration: an administrator's text, or one that anybody hands to ``reaperctl config check``."""

from __future__ import annotations

import os

from fuzzing.target import Refused, Target, assert_printable, stateless

from reaperd.config import Config, ConfigError, parse_config, render_config, without_effect
from reaperd.config_files import read_config

_CONFIG = os.path.normpath(os.path.join(os.path.dirname(__file__), "../../../config"))
_WORDS = (
    *(b"[scan]\n", b"[kill]\n", b"[alerts]\n", b"[protect]\n", b"[[scan]]\n", b"[limits]\n", b"[a.b]\n"),
    *(b"interval = ", b"grace = ", b"urls = ", b"extra_signatures = ", b"worker_cpu = ", b"listen = "),
    *(b'"""', b"'''", b'"30s"', b'"1h30min"', b'"512MiB"', b"nan", b"inf", b"-0.0", b"1e400", b"0x7f"),
    *(b"1979-05-27T07:32:00Z", b"{ name = ", b'tokens = ["x"]', b"\\u0000", b"\\U0010FFFF", b"\xef\xbb\xbf"),
)


def _read(data: bytes) -> Config | Refused:
    descriptor = os.memfd_create("reaper.toml", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, data)
        return read_config(f"/proc/self/fd/{descriptor}", required=True)
    except ConfigError as error:
        refused = error
    finally:
        os.close(descriptor)
    assert refused.faults
    for fault in refused.faults:
        assert_printable(fault)
    return Refused(refused)


def check_config(data: bytes) -> None:
    """A file is taken or refused with sentences; what is taken means the same when it is written out and read again."""
    found = _read(data)
    if isinstance(found, Refused):
        return
    text = render_config(found)
    assert_printable(text.replace("\n", ""))
    assert parse_config([("again", text)]) == found
    assert render_config(parse_config([("again", text)])) == text
    own = data.decode("utf-8-sig")
    assert parse_config([("first", own), ("second", own)]) == found
    assert parse_config([("default", render_config(Config())), ("own", own)]) == found
    assert set(without_effect(found)) >= set(without_effect(parse_config([("own", own)])))
    shown = parse_config([("shown", render_config(found, show_secrets=False))])
    assert all(url.endswith("://***") for url in shown.alerts.urls)
    assert len(shown.alerts.urls) == len(found.alerts.urls)
    assert shown._replace(alerts=shown.alerts._replace(urls=found.alerts.urls)) == found


def _seeds() -> list[bytes]:
    found = [render_config(Config()).encode(), b"\xef\xbb\xbf[kill]\ngrace = 1\n"]
    for folder, _, names in os.walk(_CONFIG):
        for name in sorted(names):
            if name.endswith(".toml"):
                with open(os.path.join(folder, name), "rb") as file:
                    found.append(file.read()[:4000])
    found.append(
        b'[scan]\nextra_signatures = [{ name = "a", tokens = ["b"], role = "tracker" }]\n'
        b'[alerts]\nurls = ["mailto://u:p@h"]\non = ["reaped"]\n[limits]\nworker_cpu = "2 cores"\n'
        b'session_memory = "1.5GiB"\n[metrics]\nlisten = "[::1]:9478"\n[history]\nkeep = "90d"\n'
    )
    found.append(b'[protect]\nnames = ["a\\u0000\\u202e\\"\\\\b", "\xc2\x85"]\n')
    found.append(b"[scan]\ninterval = nan\ncpu_threshold = inf\n[kill]\ngrace = -0.0\nx = " + b"[" * 1500)
    return found


TARGETS = (Target("config", stateless(check_config), _seeds, _WORDS, cost=8),)
