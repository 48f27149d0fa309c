"""GPU memory by process: nobody can hold up the core or bring it down, and nothing is told that is not so.

There need be no GPU here. NVIDIA's own nvidia-ml-py talks to a stand-in for NVIDIA's library, built from nvml_standin.c:
what that answers is what the library's manual says of the real one, and no driver is behind it.
"""

from __future__ import annotations

import _ctypes
import ctypes
import ctypes.util
import importlib.util
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from specimens import ME, SOON_S, count_descriptors, nothing_left

from reaperd import gpu, pauses
from reaperd.gpu import GpuMeter
from reaperd.linux import helper
from reaperd.linux.alarm import Alarm
from reaperd.linux.procfs import MACHINES_PID_NAMESPACE, ProcFS

SOURCE = Path(__file__).parents[1] / "support" / "nvml_standin.c"
COMPUTE = "nvmlDeviceGetComputeRunningProcesses_v2"
GIB = 1 << 30
FEW = "0 C 100 1000;0 C 200 2000"

pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler to build the stand-in with"),
    pytest.mark.skipif(importlib.util.find_spec("pynvml") is None, reason="nvidia-ml-py is not installed"),
]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Fail a test that leaves a descriptor or a child behind, or that loads into the core what only a helper may load."""
    with nothing_left():
        yield
    assert sys.modules.get("pynvml") is None


@pytest.fixture(autouse=True)
def no_core_files() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_CORE, limits)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that holds the stand-in."""
    name, path = "libnvidia-ml.so.1", tmp_path_factory.mktemp("nvml")
    command = ["cc", "-D_GNU_SOURCE", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", path / name, SOURCE]
    subprocess.run(command, check=True, timeout=60)
    return path


@pytest.fixture
def library(folder: Path) -> Iterator[None]:
    """Let whoever is forked find the stand-in: one that is loaded already is found by its name."""
    handle = ctypes.CDLL(str(folder / "libnvidia-ml.so.1"))._handle
    yield
    _ctypes.dlclose(handle)


class World(ProcFS):
    """A /proc of a process that lives in the first pid namespace, or in another one."""

    def __init__(self, namespace: str = MACHINES_PID_NAMESPACE) -> None:
        super().__init__()
        self.namespace = namespace

    def pid_namespace(self, pid: int) -> str:
        return self.namespace


def meter(proc: ProcFS | None = None, control_device: str = os.devnull) -> GpuMeter:
    return GpuMeter(proc or World(), control_device)


class Machine:
    """What the stand-in is to say."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch

    def __call__(self, processes: str = FEW, gpus: int = 1, **more: object) -> None:
        self._patch.setenv("NVML_PROCESSES", processes)
        self._patch.setenv("NVML_GPUS", str(gpus))
        for name in ("faults", "divided", "total", "count"):
            if name in more:
                self._patch.setenv(f"NVML_{name.upper()}", str(more[name]))
            else:
                self._patch.delenv(f"NVML_{name.upper()}", raising=False)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, library: None) -> Machine:
    return Machine(monkeypatch)


def let_time_pass(one: GpuMeter, seconds: float) -> None:
    """Make it that much later for all that a meter remembers."""
    later_s = one._failed._clock() + seconds
    one._failed._clock = lambda: later_s


def read_soon(one: GpuMeter, alarm: Alarm | None = None) -> dict[int, int]:
    began_s = time.monotonic()
    held = one.read(alarm)
    assert time.monotonic() - began_s < SOON_S / 2
    return held


def is_left_alone(one: GpuMeter) -> bool:
    """Say whether a reading would start no helper: at once it is told that nothing can be told."""
    return one._failed.until_s(gpu._DRIVER) is not None and one.read() == {}


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "reaperd.gpu"]


@pytest.fixture(autouse=True)
def all_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)


# -- what is told -----------------------------------------------------------------------------------


def test_memory_is_told_by_process(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine()
    one = meter()
    assert one.read() == {100: 1000, 200: 2000}
    assert one.available
    machine("")
    assert one.read() == {}
    assert one.available
    assert lines(caplog) == []


def test_what_a_process_holds_on_several_gpus_is_added_up(machine: Machine) -> None:
    machine("0 C 100 1000;1 C 100 2000;1 C 200 5;2 C 100 4000", gpus=2)
    assert meter().read() == {100: 3000, 200: 5}


def test_who_computes_and_draws_is_told_twice_and_counted_once(machine: Machine) -> None:
    machine("0 C 100 1000;0 G 100 1000;0 G 200 7;0 M 300 8;0 C 300 6;0 C 400 9;0 G 400 2")
    assert meter().read() == {100: 1000, 200: 7, 300: 8, 400: 9}


def test_of_a_divided_gpu_each_instance_is_asked_and_never_the_whole(machine: Machine) -> None:
    machine("0 C 100 1;1 C 100 10000;200 C 100 20;202 C 100 300;206 C 200 4000", gpus=2, divided=1)
    assert meter().read() == {100: 321, 200: 4000}


def test_who_holds_nobody_knows_how_much_is_left_out(machine: Machine) -> None:
    machine("0 C 100 -1;0 C 200 2000;0 C 300 0;0 C 400 -1;0 G 400 3")
    assert meter().read() == {200: 2000, 400: 3}


def test_numbers_that_cannot_be_are_left_out(machine: Machine) -> None:
    # Pids as a library of R535 tells them to whoever expects another layout; a process larger than its GPU.
    machine(f"0 C 0 5;0 C 4294967295 5;0 C 4194305 5;0 C 100 {81 * GIB};0 C 200 {80 * GIB};0 C 300 -2")
    assert meter().read() == {200: 80 * GIB}


def test_a_gpu_that_shares_the_memory_of_the_machine_has_no_total_and_is_read(machine: Machine) -> None:
    machine(f"0 C 100 {90 * GIB};0 C 200 {1 << 50}", faults="nvmlDeviceGetMemoryInfo=3")
    assert meter().read() == {100: 90 * GIB}


def test_counts_that_cannot_be_are_an_error_and_no_harm(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    for count in (4294967295, 2147483647, 1073741824):
        caplog.clear()
        machine(count=count)
        one = meter()
        assert read_soon(one) == {}
        assert len(one._failed._pauses) == 0, "it answered, and nothing crashed"
        assert "its answer makes no sense" in lines(caplog)[0]
    machine(count=7)
    assert read_soon(one) == {100: 1000, 200: 2000}
    machine(gpus=4294967295)
    assert read_soon(one).items() <= {100: 1000, 200: 2000}.items()


def test_a_driver_that_knows_only_the_newer_call_is_read_by_that(machine: Machine) -> None:
    machine(
        faults=";".join(f"nvmlDeviceGet{kind}RunningProcesses_v2=13" for kind in ("Compute", "MPSCompute"))
    )
    assert meter().read() == {100: 1000, 200: 2000}


def test_a_list_that_cannot_be_read_keeps_no_other_from_being_read(machine: Machine) -> None:
    machine("0 C 100 1000;0 G 200 2000", faults="nvmlDeviceGetGraphicsRunningProcesses_v2=4")
    assert meter().read() == {100: 1000}


# -- who is not asked -------------------------------------------------------------------------------


def test_without_a_driver_nobody_is_asked(machine: Machine, tmp_path: Path) -> None:
    machine()
    device = tmp_path / "nvidiactl"
    one = meter(control_device=str(device))
    assert not one.available
    assert one.read() == {}
    device.touch()
    assert one.available
    assert one.read() == {100: 1000, 200: 2000}


def test_in_another_pid_namespace_nobody_is_asked_for_the_pids_may_be_those_of_the_first(
    machine: Machine,
) -> None:
    machine()
    for namespace in ("pid:[4026532000]", ""):
        one = meter(World(namespace))
        assert not one.available
        assert one.read() == {}


# -- what fails -------------------------------------------------------------------------------------


@pytest.mark.skipif(ctypes.util.find_library("nvidia-ml") is not None, reason="the real library is here")
def test_a_library_that_is_absent_is_told_once_and_asked_for_ever_more_seldom(
    caplog: pytest.LogCaptureFixture,
) -> None:
    one = meter()
    assert one.available, "nobody has tried yet"
    for _ in range(3):
        assert one.read() == {}
        assert not one.available
        assert is_left_alone(one)
        let_time_pass(one, pauses.LONGEST_S + 1)
    assert lines(caplog) == ["cannot read GPU memory of any GPU: NVML Shared Library Not Found"]


def test_without_nvidia_ml_py_nothing_is_told(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine()
    monkeypatch.setitem(sys.modules, "pynvml", None)  # import fails, as where it is not installed
    one = meter()
    assert one.read() == {}
    assert not one.available
    assert lines(caplog) == [
        "cannot read GPU memory of any GPU: the Python module pynvml is not installed (nvidia-ml-py)"
    ]


@pytest.mark.parametrize("code", [9, 18, 999, 77777])
def test_a_library_that_only_tells_errors_is_left_alone_until_its_pause_is_over(
    machine: Machine, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    machine(faults=f"nvmlInitWithFlags={code}")
    one = meter()
    assert one.read() == {}
    assert not one.available
    assert len(lines(caplog)) == 1
    machine()
    assert is_left_alone(one)
    let_time_pass(one, pauses.FIRST_S + 0.1)
    assert one.read() == {100: 1000, 200: 2000}
    assert one.available


def test_a_gpu_that_fails_keeps_no_other_from_being_read(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    one = meter()
    for fault in ("nvmlDeviceGetHandleByIndex_v2:0=15", "nvmlDeviceGetMemoryInfo:0=15"):
        machine("0 C 100 1000;1 C 200 2000", gpus=2, faults=fault)
        assert one.read() == {200: 2000}
        assert one.available
    assert lines(caplog) == ["cannot read GPU memory of GPU 0: GPU is lost"]
    machine("0 C 100 1000;1 C 200 2000", gpus=2)
    assert one.read() == {100: 1000, 200: 2000}


def test_a_gpu_of_which_no_list_can_be_read_is_an_error(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    kinds = ("Compute", "Graphics", "MPSCompute")
    machine(faults=";".join(f"nvmlDeviceGet{kind}RunningProcesses_v2=15" for kind in kinds))
    assert meter().read() == {}
    assert lines(caplog) == ["cannot read GPU memory of GPU 0: GPU is lost"]


@pytest.mark.parametrize("how", ["hang", "spin", "crash"])
def test_a_driver_that_hangs_or_a_library_that_crashes_is_ended_and_left_alone(
    machine: Machine, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    one = meter()
    machine(faults=f"nvmlInitWithFlags={how}")
    assert read_soon(one) == {}
    assert ProcFS().children(ME) == [pid for pid in ProcFS().children(ME) if pid in helper._left_behind]
    assert not one.available
    assert is_left_alone(one)
    assert lines(caplog) == ["cannot read GPU memory of any GPU: no answer in time, or its library crashed"]
    machine()
    let_time_pass(one, pauses.FIRST_S + 0.1)
    assert one.read() == {100: 1000, 200: 2000}
    assert one.available


@pytest.mark.parametrize("how", ["hang", "crash"])
def test_a_gpu_that_hangs_or_crashes_the_library_is_left_alone_and_the_others_are_read(
    machine: Machine, how: str
) -> None:
    one = meter()
    everywhere = "0 C 100 1000;1 C 200 2000;2 C 300 3000"
    machine(everywhere, gpus=3, faults=f"{COMPUTE}:1={how}")
    assert read_soon(one) == {100: 1000, 300: 3000}
    assert one.available
    machine(everywhere, gpus=3)
    assert one.read() == {100: 1000, 300: 3000}, "its pause is not over"
    let_time_pass(one, pauses.FIRST_S + 0.1)
    assert one.read() == {100: 1000, 200: 2000, 300: 3000}


def test_the_likeliest_to_hang_is_asked_last(machine: Machine) -> None:
    one = meter()
    machine("0 C 100 1000;1 C 200 2000", gpus=2, faults=f"{COMPUTE}:0=spin")
    read_soon(one)  # it takes all the time that there is
    let_time_pass(one, pauses.FIRST_S + 0.1)
    assert read_soon(one) == {200: 2000}


def test_each_pause_is_longer_until_it_is_read_again(machine: Machine) -> None:
    one = meter()
    for length_s in (pauses.FIRST_S, 2 * pauses.FIRST_S):
        machine(faults="nvmlInitWithFlags=9")
        one.read()
        machine()
        let_time_pass(one, length_s - 0.1)
        assert is_left_alone(one)
        let_time_pass(one, 0.2)
    assert one.read() == {100: 1000, 200: 2000}
    machine(faults="nvmlInitWithFlags=9")
    one.read()
    let_time_pass(one, pauses.FIRST_S + 0.1)
    assert not is_left_alone(one)


def test_the_alarm_ends_a_reading_and_is_nobodys_fault(machine: Machine) -> None:
    one = meter()
    alarm = Alarm()
    ringing, writer = os.pipe()
    alarm.watch(ringing)
    try:
        machine()
        assert one.read(alarm) == {100: 1000, 200: 2000}
        os.write(writer, b"x")
        machine(faults="nvmlInitWithFlags=spin")
        took_s = []
        for _ in range(5):
            began_s = time.monotonic()
            assert one.read(alarm) == {}
            took_s.append(time.monotonic() - began_s)
        assert min(took_s) < gpu._MAX_S, "it was waited for in spite of the alarm"
        machine()
        assert one.read() == {100: 1000, 200: 2000}
    finally:
        os.close(ringing)
        os.close(writer)
        alarm._epoll.close()


def test_where_no_process_can_be_made_nothing_is_told_and_it_is_nobodys_fault(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine()
    one = meter()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count_descriptors(), limits[1]))
    try:
        assert one.read() == {}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert one.available
    assert one.read() == {100: 1000, 200: 2000}


# -- who loads it -----------------------------------------------------------------------------------


def test_the_library_is_loaded_by_its_name_in_a_helper_that_ends_and_the_core_stays_as_it_was(
    folder: Path,
) -> None:
    script = f"""
import json, os, sys
sys.path[:0] = {[path for path in sys.path if path]!r}
from reaperd import gpu
from reaperd.linux.procfs import MACHINES_PID_NAMESPACE, ProcFS

class World(ProcFS):
    def pid_namespace(self, pid):
        return MACHINES_PID_NAMESPACE

before = set(sys.modules)
held = gpu.GpuMeter(World(), os.devnull).read()
with open("/proc/self/maps") as file:
    mapped = "nvidia" in file.read()
loaded = sorted({{"pynvml", "ctypes"}} & set(sys.modules))
print(json.dumps([held, mapped, loaded, sorted(set(sys.modules) - before), ProcFS().children(os.getpid())]))
"""
    environment = {"LD_LIBRARY_PATH": str(folder), "NVML_PROCESSES": FEW}
    done = subprocess.run(
        [sys.executable, "-s", "-c", script], env=environment, capture_output=True, check=True, timeout=60
    )
    assert json.loads(done.stdout) == [{"100": 1000, "200": 2000}, False, [], [], []]
    assert done.stderr == b""
