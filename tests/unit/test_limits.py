"""How many workers: quotas of either version of cgroups, what the environment says, and what estimators ask for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import agent
from agent import limits, session

MANY = len(os.sched_getaffinity(0))


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("LOKY_MAX_CPU_COUNT", "REAPER_MAX_WORKERS"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "process_cpu_count", lambda: 8, raising=False)


def quota(root: Path, cgroup: str, files: dict[str, str]) -> int:
    """Return the CPUs on a machine with this /proc/self/cgroup, and these files below /sys/fs/cgroup."""
    for name, text in {
        "proc/self/cgroup": cgroup,
        **{f"sys/fs/cgroup/{k}": v for k, v in files.items()},
    }.items():
        place = root / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    return limits.usable_cpus(str(root))


@pytest.mark.usefixtures("eight_cpus")
@pytest.mark.parametrize(
    ("cgroup", "files", "cpus"),
    [
        ("0::/\n", {}, 8),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n"}, 8),
        ("0::/a/b\n", {"a/b/cpu.max": "300000 100000\n"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "150000 100000\n"}, 2),  # as loky counts 1.5
        ("0::/a/b\n", {"a/b/cpu.max": "10000 100000\n"}, 1),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "200000 100000\n"}, 2),
        ("0::/seen/from/outside\n", {"cpu.max": "400000 100000\n"}, 4),
        ("0::/a\n", {"unified/a/cpu.max": "500000 100000\n"}, 5),
        ("4:cpu,cpuacct:/a\n", {"cpu,cpuacct/a/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n"}, 8),
        ("4:cpu,cpuacct:/a\n", {"cpu,cpuacct/a/cpu.cfs_quota_us": "600000\n", "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n"}, 6),
        ("4:cpu:/a\n3:memory:/b\n", {"cpu/a/cpu.cfs_quota_us": "50000\n", "cpu/a/cpu.cfs_period_us": "50000\n"}, 1),
        ("0::/a\n", {"a/cpu.max": "odd\n"}, 8),
        ("0::/a\n", {"a/cpu.max": "100000 0\n"}, 8),
        ("no colons at all\n\n0:", {}, 8),
    ],
)  # fmt: skip
def test_a_quota_of_the_cgroup_or_of_one_above_it_is_the_limit(
    tmp_path: Path, cgroup: str, files: dict[str, str], cpus: int
) -> None:
    assert quota(tmp_path, cgroup, files) == cpus


def test_without_proc_the_affinity_counts(tmp_path: Path) -> None:
    count = getattr(os, "process_cpu_count", None)
    assert limits.usable_cpus(str(tmp_path)) == (count() if count else MANY)


@pytest.mark.usefixtures("eight_cpus")
@pytest.mark.parametrize(("text", "cpus"), [("3", 3), ("100", 8), ("0", 1), ("", 8), ("many", 8), ("-2", 8)])
def test_what_loky_is_told_counts_for_us(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, cpus: int
) -> None:
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", text)
    assert limits.usable_cpus(str(tmp_path)) == cpus


def test_n_jobs_is_the_least_of_limit_cpus_and_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "usable_cpus", lambda: 6)
    assert agent.n_jobs() == limits.DEFAULT_MAX_WORKERS == 4
    assert (agent.n_jobs(1), agent.n_jobs(5), agent.n_jobs(100)) == (1, 5, 6)
    monkeypatch.setenv("REAPER_MAX_WORKERS", "2")
    assert (agent.n_jobs(1), agent.n_jobs(5), agent.n_jobs()) == (1, 2, 2)


@pytest.mark.parametrize(
    ("limit", "error"), [(0, ValueError), (-1, ValueError), (True, TypeError), (2.0, TypeError)]
)
def test_what_is_no_limit_is_refused(limit: Any, error: type[Exception]) -> None:
    for call in (agent.n_jobs, lambda limit: agent.training_session(max_workers=limit)):
        with pytest.raises(error, match="the limit of workers must be"):
            call(limit)


def test_of_sessions_within_each_other_the_innermost_limits() -> None:
    found = []
    for limit in (4, 2, 4):
        session.push_limit(limit)
        found.append(session.limit_of_workers())
    for limit in (4, 2, 4):
        session.pop_limit(limit)
        found.append(session.limit_of_workers())
    assert found == [4, 2, 4, 2, 4, None]
