"""Which capabilities a daemon lacks, and what doctor makes of that."""

from __future__ import annotations

import pytest

from reaperd.ctl.check_setup import judge_reach
from reaperd.ctl.findings import LIMIT, OK, PROBLEM
from reaperd.linux.capability import parse_missing
from reaperd.linux.procfs import ProcFS
from reaperd.rights import RIGHTS
from reaperd.surroundings import Lack

BITS = {"CAP_DAC_READ_SEARCH": 2, "CAP_KILL": 5, "CAP_SETGID": 6, "CAP_SETUID": 7, "CAP_SYS_PTRACE": 19}


def status(*names: str, uid: int = 0) -> bytes:
    effective = sum(1 << BITS[name] for name in names)
    uids = "\t".join([str(uid)] * 4)
    return f"Name:\treaperd\nUid:\t{uids}\nCapPrm:\tffffffffffffffff\nCapEff:\t{effective:016x}\n".encode()


@pytest.mark.parametrize("missing", BITS)
def test_a_capability_that_is_not_in_effect_is_named(missing: str) -> None:
    assert parse_missing(status(*(BITS.keys() - {missing})), RIGHTS) == [missing]
    assert parse_missing(status(*BITS), RIGHTS) == []


def test_a_text_without_capabilities_and_our_own_are_read() -> None:
    assert parse_missing(b"Name:\tx\n", RIGHTS) == []
    assert set(parse_missing(ProcFS().status(1), RIGHTS)) <= RIGHTS.keys()


@pytest.mark.parametrize(
    ("missing", "level"),
    [
        ("CAP_KILL", PROBLEM),
        ("CAP_SETUID", PROBLEM),
        ("CAP_SETGID", PROBLEM),
        ("CAP_SYS_PTRACE", LIMIT),
        ("CAP_DAC_READ_SEARCH", LIMIT),
    ],
)
def test_doctor_names_what_the_daemon_lacks_what_that_costs_and_what_to_do(missing: str, level: str) -> None:
    lack = Lack(f"without {missing} {RIGHTS[missing].without}", f"grant {missing}")
    found = judge_reach([lack, Lack("/dev/shm is another one", "mount it in")], "the daemon")
    assert found.level == level
    assert found.fact == f"of the daemon: {lack.fact}; /dev/shm is another one"
    assert found.advice == f"grant {missing}; mount it in"


def test_doctor_asks_nothing_of_a_daemon_that_has_all() -> None:
    assert judge_reach([], "the daemon").level == OK
