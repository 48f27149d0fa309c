"""The command line of the daemon: the short way of reading it and argparse never disagree."""

from __future__ import annotations

import contextlib
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reaperd.__main__ import Options, parse_plainly, parser, read_options

WORDS = [
    *("--config", "--socket", "--state-dir", "--pidfile", "--detach", "--check-config", "--dry-run"),
    *("--config=/etc/r", "--socket=", "--state-dir=-x", "--pidfile=a=b", "--detach=", "--dry-run=yes"),
    *("--conf", "--so=x", "--dry", "--help", "-h", "--version", "--nothing", "--check_config"),
    *("/etc/reaper.toml", "", "-", "--", "-1", "-x y", "a b", "x=y"),
]


def test_what_a_unit_or_a_test_says_needs_no_argparse() -> None:
    assert parse_plainly([]) == Options()
    assert parse_plainly(["--config", "/c", "--socket=/s", "--state-dir", "/d", "--dry-run"]) == Options(
        config="/c", socket="/s", state_dir="/d", dry_run=True
    )


def test_the_rest_is_read_all_the_same() -> None:
    assert parse_plainly(["--conf", "/c"]) is None
    assert read_options(["--conf", "/c", "--check"]) == Options(config="/c", check_config=True)


@pytest.mark.parametrize("arguments", [["--nothing"], ["--config"], ["--detach=yes"], ["word"]])
def test_a_mistake_is_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        read_options(arguments)
    assert left.value.code == 2
    assert "usage: reaperd" in capsys.readouterr().err


@given(st.lists(st.sampled_from(WORDS), max_size=5))
def test_both_ways_agree(arguments: list[str]) -> None:
    plain = parse_plainly(arguments)
    if plain is not None:
        with contextlib.redirect_stderr(io.StringIO()):
            assert Options(**vars(parser().parse_args(arguments))) == plain
