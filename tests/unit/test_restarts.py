"""When ``reaperctl run`` starts its command again, and when it has seen enough."""

from __future__ import annotations

import signal

import pytest

from reaperd.ctl.restarts import FORGIVEN_AFTER_S, LONGEST_PAUSE_S, LOOP, QUICK_S, Ended, Rules, decide, halve
from reaperd.ctl.run import name_of

RULES = Rules(restarts=5, pause_s=2.0)
LONG_S = QUICK_S + 1


def exited(code: int, lasted_s: float = LONG_S, **more: bool | int) -> Ended:
    return Ended(code << 8, lasted_s, **more)  # type: ignore[arg-type]


def killed(number: int, lasted_s: float = LONG_S, **more: bool | int) -> Ended:
    return Ended(int(number), lasted_s, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "ended", [exited(1), exited(255), killed(signal.SIGKILL), killed(signal.SIGSEGV), exited(137)]
)
def test_a_failure_is_tried_again(ended: Ended) -> None:
    following = decide(RULES, [ended])
    assert following.again
    assert following.after_s == RULES.pause_s


@pytest.mark.parametrize(
    "ended",
    [
        exited(0),
        exited(130),
        exited(143),
        exited(129),
        *(killed(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE)),
        exited(1, asked=True),
        killed(signal.SIGKILL, asked=True),
        exited(1, asked=True, out_of_memory=True),
    ],
)
def test_a_good_end_and_one_that_was_asked_for_are_not(ended: Ended) -> None:
    following = decide(RULES, [ended])
    assert not following.again
    assert following.reason == ""


def test_without_restarts_there_are_none() -> None:
    assert decide(Rules(0, 1.0), [exited(1)]) == (False, 0.0, "")


def test_a_number_of_restarts_is_kept_to() -> None:
    attempts = [exited(code) for code in range(1, 7)]
    assert decide(RULES, attempts[:5]).again
    last = decide(RULES, attempts)
    assert not last.again
    assert "the last of 6 attempts" in last.reason


def test_each_pause_is_twice_as_long_as_the_one_before_and_none_is_endless() -> None:
    rules = Rules(restarts=1000, pause_s=2.0)
    attempts = [exited(1 + at % 2) for at in range(1000)]
    pauses = [decide(rules, attempts[:count]).after_s for count in range(1, 1001)]
    assert pauses[:4] == [2.0, 4.0, 8.0, 16.0]
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE_S


def test_after_a_long_attempt_the_pauses_begin_anew() -> None:
    attempts = [exited(1), exited(2), exited(1, FORGIVEN_AFTER_S)]
    assert decide(RULES, attempts).after_s == RULES.pause_s
    assert decide(RULES, [*attempts, exited(2)]).after_s == RULES.pause_s
    assert decide(RULES, [*attempts, exited(2), exited(1)]).after_s == 2 * RULES.pause_s


def test_a_command_that_fails_at_once_in_the_same_way_again_and_again_is_given_up() -> None:
    assert decide(RULES, [exited(1, 0.1)] * (LOOP - 1)).again
    given_up = decide(RULES, [exited(1, 0.1)] * LOOP)
    assert not given_up.again
    assert "in the same way 3 times in a row" in given_up.reason


@pytest.mark.parametrize(
    "odd", [exited(1, LONG_S), exited(2, 0.1), killed(signal.SIGKILL, 0.1), exited(1, 0.1, workers=2)]
)
def test_one_that_is_different_among_them_is_no_loop(odd: Ended) -> None:
    quick = exited(1, 0.1)
    for place in range(LOOP):
        attempts = [quick] * LOOP
        attempts[place] = odd
        assert decide(RULES, attempts).again


def test_an_oom_kill_is_a_failure_though_the_script_ends_as_if_it_was_asked() -> None:
    assert decide(RULES, [exited(143, out_of_memory=True)]).again


def test_half_the_workers_are_one_at_least() -> None:
    assert [halve(count) for count in (64, 5, 2, 1)] == [32, 2, 1, 1]


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["python", "train.py", "--x"], "train.py"),
        (["/opt/bin/python3.12", "-u", "-W", "ignore", "/home/a/train.py"], "train.py"),
        (["python", "-X", "dev", "-m", "package.train"], "package.train"),
        (["python", "-c", "print(1)"], "python"),
        (["python"], "python"),
        (["./train.sh", "python", "x.py"], "train.sh"),
    ],
)
def test_a_run_is_called_as_its_script_is(command: list[str], name: str) -> None:
    assert name_of(command) == name
