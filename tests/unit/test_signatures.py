"""What the frameworks' processes are recognised by, and what only looks alike."""

from __future__ import annotations

import pytest

from reaperd.model import Role
from reaperd.signatures import SIGNATURES, TORCHRUN_VARIABLE, Signature, find

PYTHON = "/usr/bin/python3"
SPAWN = (
    "-c",
    "from multiprocessing.spawn import spawn_main; spawn_main(tracker_fd=5)",
    "--multiprocessing-fork",
)
OURS = Signature("ours", Role.WORKER, "", tokens=("-m", "ourpool.worker"))


@pytest.mark.parametrize(
    ("argv", "framework", "role"),
    [
        ((PYTHON, *SPAWN), "multiprocessing spawn", "worker"),
        ((PYTHON, "-B", "-X", "dev", "-W", "error", *SPAWN), "multiprocessing spawn", "worker"),
        ((PYTHON, "-m", "joblib.externals.loky.backend.popen_loky_posix", "--pipe", "9"), "loky", "worker"),
        ((PYTHON, "-m", "loky.backend.popen_loky_posix", "--pipe", "9"), "loky", "worker"),
        ((PYTHON, "-c", "from loky.backend.resource_tracker import main; main(3)"), "loky", "tracker"),
        ((PYTHON, "-c", "from multiprocessing.resource_tracker import main;main(4)"), "multiprocessing", "tracker"),
        ((PYTHON, "-c", "from multiprocessing.forkserver import main; main(4)"), "multiprocessing forkserver", "worker"),
        (("ray::train()",), "Ray", "worker"),
        ((PYTHON, "/opt/x/ray/_private/workers/default_worker.py", "--node"), "Ray", "worker"),
    ],
)  # fmt: skip
def test_a_process_is_known_by_what_its_interpreter_was_given(
    argv: tuple[str, ...], framework: str, role: str
) -> None:
    found = find("python3", argv)
    assert found is not None
    assert (found.framework, found.role.value, found.certain) == (framework, role, True)


@pytest.mark.parametrize(
    "argv",
    [
        (),
        (PYTHON,),
        (PYTHON, "train.py", *SPAWN),
        (PYTHON, "-m", "train", *SPAWN),
        (PYTHON, "-c", "import train", *SPAWN),
        (PYTHON, "-c", "joblib.externals.loky.backend.popen_loky_posix"),
        (PYTHON, "-X", *SPAWN[:1], "train.py"),
        (PYTHON, "/home/a/loky.backend.popen_loky_posix/train.py"),
        (PYTHON, "/home/a/xray/_private/workers/default_worker.py"),
        ("grep", "multiprocessing.spawn"),
        ("bash", "-c", "echo from multiprocessing.spawn import spawn_main"),
    ],
)
def test_a_pattern_elsewhere_in_the_command_line_tells_nothing(argv: tuple[str, ...]) -> None:
    assert find("python3", argv) is None


def test_a_data_loader_is_known_by_the_whole_name_of_its_main_thread() -> None:
    for comm in ("pt_data_worker", "pt_multiprocess"):
        found = find(comm, (PYTHON, "train.py"))
        assert found is not None
        assert found.framework == "torch DataLoader"
    assert find("pt_data_worker2", (PYTHON, "train.py")) is None


def test_a_rank_of_torchrun_and_a_title_of_dask_are_never_certain() -> None:
    for found in (
        find("python3", (PYTHON, "train.py"), (TORCHRUN_VARIABLE,)),
        find("dask worker [t", ("dask worker [tcp://h:1]",)),
        find("dask nanny [t", ("dask nanny [tcp://h:1]",)),
    ):
        assert found is not None
        assert not found.certain


def test_words_of_an_administrators_own_follow_nothing_but_the_interpreters_options() -> None:
    for argv in ((PYTHON, "-m", "ourpool.worker"), (PYTHON, "-u", "-X", "dev", "-m", "ourpool.worker", "7")):
        assert find("python3", argv, extra=[OURS]) is OURS
    for argv in ((PYTHON, "train.py", "-m", "ourpool.worker"), (PYTHON, "-m", "ourpool.workers")):
        assert find("python3", argv, extra=[OURS]) is None
    binary = OURS._replace(tokens=("our-worker", "--serve"))
    assert find("our-worker", ("/opt/our-worker", "--serve", "1"), extra=[binary]) is binary
    assert find("our-worker", ("/opt/our-worker", "--help"), extra=[binary]) is None


def test_each_row_says_what_such_a_process_does_by_itself_and_is_recognised_by_something() -> None:
    for row in SIGNATURES:
        assert row.alone
        assert sum(map(bool, (row.begins, row.script, row.title, row.comm, row.variable, row.tokens))) == 1
