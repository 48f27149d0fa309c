"""The image of packaging/docker, built and run by Podman: a daemon in a container ends what trainings outside of it left.

`make test-docker` runs this in mounts of its own: /run and /dev/shm are ours alone here. No registry of images is asked:
the base is REAPER_DOCKER_BASE, an image that Podman can get, else a small Debian that debootstrap(8) makes once.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import requires
from pathlib import Path

import pytest
from harness import (
    FAMILY_MARK,
    ROOT,
    RUN_MARK,
    STRANGER,
    WORKERS_GONE_S,
    Leader,
    broken_promise,
    end_process,
    marked,
    pids_within,
    repeat_until,
    wait_gone,
)

StartLeader = Callable[..., Leader]

BUILD = Path(ROOT, "build", "docker")
STORAGE = BUILD / "storage"
WHEELS = BUILD / "wheels"
BASE_FILE = BUILD / "base.tar"
RUN_ROOT = "/run/reaper-test-podman"  # the storage remembers where that was
SOCKET_FOLDER = "/run/reaper"
SOCKET = f"{SOCKET_FOLDER}/reaper.sock"
IMAGE, BASE = "localhost/reaper:test", "localhost/reaper-base:test"
CAPABILITIES = ["KILL", "SYS_PTRACE", "DAC_READ_SEARCH", "SETUID", "SETGID"]
PACKAGES = "python3,python3-venv,ca-certificates"
MIRROR = os.environ.get("REAPER_DEBIAN_MIRROR", "http://deb.debian.org/debian")
SUITE = "bookworm"
# Where the hard limit is lower than what Podman asks for, and cannot be raised.
LIMITS = ["--ulimit", "nofile=4096:4096", "--ulimit", "nproc=4096:4096"]

# What runs in a container of its own. Its shell is process 1 there, and outlives it.
TRAINING = """
import json, multiprocessing, os, subprocess, time
import agent
session = agent.register("inside", required=True)
pool = multiprocessing.get_context("spawn").Pool(2)
forked = multiprocessing.get_context("fork").Process(target=time.sleep, args=(120,))
forked.start()
command = subprocess.Popen(["setsid", "sleep", "120"])
workers = [*(one.pid for one in pool._pool), forked.pid, command.pid]
status = dict(line.split(":\t") for line in open("/proc/self/status").read().splitlines())
told = {"seccomp": status["Seccomp"], "capabilities": status["CapEff"], "no_new_privs": status["NoNewPrivs"]}
print(json.dumps({"leader": os.getpid(), "session": session.id, "workers": workers, **told}), flush=True)
time.sleep(120)
"""


class Podman:
    """Podman with images and containers of our own, removed with us."""

    def __init__(self, runtime: str = "") -> None:
        self._options = ["--root", str(STORAGE), "--runroot", RUN_ROOT, "--cgroup-manager=cgroupfs"]
        self._options += ["--runtime", runtime] if runtime else []
        self.started: list[str] = []

    def command(self, *words: str) -> list[str]:
        return ["podman", *self._options, *words]

    def __call__(
        self, *words: str, check: bool = True, timeout_s: float = 300.0
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*words), capture_output=True, text=True, check=False, timeout=timeout_s, cwd=ROOT
        )
        assert not check or done.returncode == 0, f"podman {' '.join(words)}: {done.stderr or done.stdout}"
        return done

    def start(self, *options: str, image: str = IMAGE, command: Sequence[str] = ()) -> str:
        """Start a container in the background and return its id."""
        done = self("run", "--detach", *LIMITS, *options, image, *command)
        self.started.append(done.stdout.strip())
        return self.started[-1]

    def log(self, container: str) -> str:
        done = self("logs", container)
        return done.stdout + done.stderr

    def remove_all(self) -> None:
        for container in self.started:
            self("rm", "--force", "--time", "5", container, check=False)
        self.started.clear()


def make_base() -> None:
    """Make the file system of a small Debian, once."""
    if shutil.which("debootstrap") is None:
        pytest.skip("needs debootstrap for a base image, or REAPER_DOCKER_BASE, an image that Podman can get")
    root = BUILD / "rootfs"
    shutil.rmtree(root, ignore_errors=True)
    words = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(root), MIRROR]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"debootstrap: {done.stdout.strip().splitlines()[-1:]}")
    fresh = BASE_FILE.with_suffix(".new")
    subprocess.run(
        ["tar", "-C", str(root), "--exclude=./var/cache/apt/*", "-cf", str(fresh), "."], check=True
    )
    fresh.rename(BASE_FILE)
    shutil.rmtree(root)


def fetch_wheels(version: str) -> None:
    """Have pip get what the image is built of: inside of the build there need be neither a network nor this host's settings."""
    wanted = [one for one in requires("reaperd") or [] if "extra ==" not in one]
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--dest",
                str(WHEELS),
                "--only-binary=:all:",
            ),
            *("--python-version", version, *wanted, "hatchling>=1.27"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"pip download: {done.stderr.strip().splitlines()[-1:]}")


@pytest.fixture(scope="module")
def podman() -> Iterator[Podman]:
    if os.geteuid() != 0:
        pytest.skip("needs root: the daemon's container looks after every user")
    if shutil.which("podman") is None:
        pytest.skip("podman is not installed here")
    if os.path.exists(SOCKET):
        pytest.skip(
            f"{SOCKET_FOLDER} is a daemon's already: run this by `make test-docker`, which has a /run of its own"
        )
    BUILD.mkdir(parents=True, exist_ok=True)
    os.makedirs(SOCKET_FOLDER, exist_ok=True)
    engine = Podman()
    base = os.environ.get("REAPER_DOCKER_BASE", "")
    if not base:
        if not BASE_FILE.exists():
            make_base()
        if engine("image", "exists", BASE, check=False).returncode:
            engine("import", str(BASE_FILE), BASE)
        base = BASE
    engine = runnable(base)
    version = engine(
        "run",
        "--rm",
        *LIMITS,
        "--network=none",
        base,
        "python3",
        "-c",
        "import sys; print('%d.%d' % sys.version_info[:2])",
    )
    fetch_wheels(version.stdout.strip())
    build(engine, base)
    # For as long as one container runs, Podman keeps the mount of its storage.
    holder = engine.start("--network=none", "--entrypoint=sleep", command=["3600"])
    engine.started.clear()
    yield engine
    engine.remove_all()
    engine("rm", "--force", "--time", "0", holder)


def runnable(base: str) -> Podman:
    """Return a Podman with a runtime that can start a container here."""
    said = []
    for runtime in ("", "runc", "crun"):
        engine = Podman(runtime)
        done = engine("run", "--rm", *LIMITS, "--pid=host", "--network=none", base, "true", check=False)
        if done.returncode == 0:
            return engine
        said.append(f"{runtime or 'podman'}: {done.stderr.strip()}")
    pytest.skip(f"no container can be started here: {'; '.join(said)}")


def build(engine: Podman, base: str) -> None:
    engine(
        *("build", "--quiet", "--isolation=chroot", "--format=docker", "--tag", IMAGE),
        *(
            "--file",
            "packaging/docker/Dockerfile",
            "--ignorefile",
            "packaging/docker/Dockerfile.dockerignore",
        ),
        *(
            "--build-arg",
            f"BASE={base}",
            "--build-arg",
            "PIP_ARGS=--no-index --find-links build/docker/wheels",
            ".",
        ),
        timeout_s=900.0,
    )


class Daemon:
    """A container with a daemon, as compose.yaml starts it."""

    def __init__(self, podman: Podman, state: str, *, lacks: str = "", pid: str = "--pid=host") -> None:
        self._podman = podman
        given = [f"--cap-add={one}" for one in CAPABILITIES if one != lacks]
        self.id = podman.start(
            *([pid] if pid else []),
            *(
                "--cap-drop=all",
                *given,
                "--security-opt=no-new-privileges",
                "--read-only",
                "--tmpfs=/tmp",
                "--network=none",
            ),
            *(
                f"--volume={SOCKET_FOLDER}:{SOCKET_FOLDER}",
                f"--volume={state}:/var/lib/reaper",
                "--volume=/dev/shm:/dev/shm",
            ),
        )
        repeat_until(self._is_healthy, 30.0, "the daemon in the container does not answer its health check")

    def _is_healthy(self) -> bool | None:
        if self._podman("healthcheck", "run", self.id, check=False).returncode == 0:
            return True
        running = self._podman("inspect", "--format={{.State.Running}}", self.id).stdout.strip()
        assert running == "true", self._podman.log(self.id)
        return None

    def ctl(self, *words: str) -> list[dict[str, object]]:
        done = self._podman("exec", self.id, "reaperctl", *words, "--json", check=False)
        found = (
            [json.loads(line) for line in done.stdout.splitlines()]
            if words[0] == "events"
            else json.loads(done.stdout)
        )
        return found if isinstance(found, list) else [found]

    def wait_end(self, session: str) -> dict[str, object]:
        def closed() -> dict[str, object] | None:
            events = self.ctl("events")
            return next(
                (e for e in events if e["session"] == session and e["kind"] in ("reaped", "ended")), None
            )

        return repeat_until(closed, 20.0, f"no event says how session {session} ended")

    def limits(self) -> str:
        (status,) = self.ctl("status")
        return json.dumps(status["limits"])

    def log(self) -> str:
        return self._podman.log(self.id)

    def stop(self) -> int:
        self._podman("stop", "--time", "15", self.id)
        return int(self._podman("inspect", "--format={{.State.ExitCode}}", self.id).stdout)


@pytest.fixture
def state(tmp_path: Path) -> str:
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    return str(folder)


@pytest.fixture
def daemon(podman: Podman, state: str) -> Iterator[Daemon]:
    yield Daemon(podman, state)
    podman.remove_all()


def test_a_training_outside_is_reaped_with_all_that_it_has_in_shared_memory(
    daemon: Daemon, start_leader: StartLeader
) -> None:
    """Of root and of another user: the container has the capabilities that its compose file gives it, and no more."""
    for uid in (None, STRANGER):
        leader = start_leader("gridsearch.py", socket=SOCKET, uid=uid)
        assert leader.shm, "nothing is to be freed"
        leader.kill9()
        assert broken_promise(leader) == ""
        event = daemon.wait_end(leader.session)
        assert event["cause"] == {"kind": "signal", "code": 9}
        assert [name for name in leader.shm if os.path.exists(f"/dev/shm/{name}")] == []
    lacks = [line for line in daemon.log().splitlines() if "WARNING" in line]
    # This /dev/shm is the test's own.
    expected = ("temporary folders are not those of the sessions outside", "/dev/shm is not the machine's")
    assert [line for line in lacks if not any(f"limited here: {fact}" in line for fact in expected)] == []


def test_a_training_in_another_container_is_reaped(podman: Podman, daemon: Daemon, run: str) -> None:
    """That container has the socket, the default seccomp profile, its own pids, /tmp and /dev/shm, and no right of its own."""
    mark = f"{run}.inside"
    marks = {RUN_MARK: run, FAMILY_MARK: mark}
    environment = [word for name, value in marks.items() for word in ("--env", f"{name}={value}")]
    words = [
        "run",
        "--rm",
        "--interactive",
        *LIMITS,
        "--cap-drop=all",
        "--security-opt=no-new-privileges",
        "--network=none",
    ]
    words += [*environment, f"--volume={SOCKET_FOLDER}:{SOCKET_FOLDER}:ro", "--entrypoint=/bin/sh", IMAGE]
    inside = ["-c", 'python3 -c "$0" & read end; exit 0', TRAINING]
    with subprocess.Popen(
        podman.command(*words, *inside), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as box:
        assert box.stdin is not None
        assert box.stdout is not None
        told = json.loads(box.stdout.readline())
        assert (told["seccomp"], told["capabilities"], told["no_new_privs"]) == ("2", "0" * 16, "1")
        names = {within[-1]: pid for pid in marked(FAMILY_MARK, mark) if len(within := pids_within(pid)) > 1}
        leader, workers = names[told["leader"]], [names[pid] for pid in told["workers"]]
        assert pids_within(leader)[0] != told["leader"]
        end_process(leader)
        assert wait_gone(workers, WORKERS_GONE_S) == []
        event = daemon.wait_end(told["session"])
        assert event["cause"] == {"kind": "signal", "code": 9}
        # The container itself is nobody's worker.
        assert box.poll() is None
        box.stdin.close()
        box.wait(20)


def test_a_daemon_whose_container_was_made_anew_goes_on(
    podman: Podman, daemon: Daemon, state: str, start_leader: StartLeader
) -> None:
    leader = start_leader("kin.py", "everything-left", socket=SOCKET)
    assert daemon.stop() == 0
    after = Daemon(podman, state)
    assert leader.still_alive(leader.family.workers) == leader.family.workers
    leader.kill9()
    assert broken_promise(leader) == ""
    after.wait_end(leader.session)


@pytest.mark.parametrize("capability", ["KILL", "SYS_PTRACE", "DAC_READ_SEARCH"])
def test_a_container_without_a_capability_says_which(podman: Podman, state: str, capability: str) -> None:
    daemon = Daemon(podman, state, lacks=capability)
    assert re.search(f"limited here: without CAP_{capability} .*--cap-add {capability}", daemon.log())
    assert f"CAP_{capability}" in daemon.limits()
    podman.remove_all()


@pytest.mark.parametrize("capability", ["SETUID", "SETGID"])
def test_a_container_whose_gate_cannot_become_another_user_ends_and_says_so(
    podman: Podman, state: str, capability: str
) -> None:
    with pytest.raises(
        AssertionError, match=f"cannot start without CAP_{capability}: the gate cannot give up root's"
    ):
        Daemon(podman, state, lacks=capability)
    podman.remove_all()


def test_a_container_with_pids_of_its_own_says_that_it_sees_nobody_else(
    podman: Podman, state: str, start_leader: StartLeader
) -> None:
    daemon = Daemon(podman, state, pid="")
    assert "only the processes of this pid namespace are seen" in daemon.limits()
    leader = start_leader("kin.py", "subprocess", socket=SOCKET)
    assert "refused: your user or process has no number where the daemon runs" in leader.read_log()
    leader.kill9()
    leader.end_family()
    podman.remove_all()


def test_the_image_holds_no_tool_to_install_more(podman: Podman) -> None:
    done = podman(
        "run",
        "--rm",
        *LIMITS,
        "--network=none",
        "--entrypoint=/bin/sh",
        IMAGE,
        "-c",
        "ls /opt/reaper/bin; reaperd --version",
    )
    assert "reaperctl" in done.stdout
    assert "pip" not in done.stdout
