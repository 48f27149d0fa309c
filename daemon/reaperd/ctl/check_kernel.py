"""The checks of ``reaperctl doctor`` that ask the kernel: each makes the very call that Reaper depends on."""

from __future__ import annotations

import errno
import os

from reaperd.ctl import probes
from reaperd.ctl.findings import Check, Finding, limit, ok, problem
from reaperd.linux import transient
from reaperd.linux.mounts import Mount, parse_mount_table
from reaperd.linux.procfs import ProcFS
from reaperd.surroundings import hiding_options
from reaperd.words import size

# Below this, worker pools that share arrays run into its end (Docker gives 64 MiB).
_SHM_BYTES = 256 * 1024 * 1024
_SHM = "/dev/shm"  # noqa: S108
_YAMA = "/proc/sys/kernel/yama/ptrace_scope"
_SECCOMP = "a container's seccomp profile may forbid it: allow pidfd_open and pidfd_send_signal"


def kernel() -> Finding:
    """Name the kernel; what it can do is for the other checks."""
    system = os.uname()
    if system.sysname != "Linux":
        return problem(
            f"this is {system.sysname}", "Reaper needs Linux; on other systems `agent` does nothing"
        )
    return ok(f"Linux {system.release} on {system.machine}")


def own_proc() -> Finding:
    """Whether a pid in /proc is whom this process would signal under it."""
    if ProcFS().is_of_our_pid_namespace():
        return ok("/proc is of this pid namespace")
    return problem(
        "/proc shows another pid namespace than this one: a pid there is another process's here, so nothing can be told",
        "run this where the processes are, or mount a /proc of this namespace (unshare --mount-proc)",
    )


def pidfd() -> Finding:
    """pidfd_open(2), without which Reaper signals nobody."""
    try:
        probes.send_by_pidfd()
    except AttributeError:
        return problem(
            "this Python was built without pidfd_open", "use a Python built on Linux 5.3 headers or newer"
        )
    except OSError as error:
        advice = "use Linux 5.3 or newer" if error.errno == errno.ENOSYS else _SECCOMP
        return problem(f"processes cannot be held by a descriptor: {error.strerror}", advice)
    return ok("a process is held and signalled by a descriptor, never by a pid that may be another's by now")


def exit_information() -> Finding:
    """PIDFD_GET_INFO with PIDFD_INFO_EXIT, Linux 6.15."""
    if probes.reads_exit_code():
        return ok("how a leader ended can be told even after its parent has waited for it (PIDFD_GET_INFO)")
    return limit(
        "how a leader ended can be told only until its parent has waited for it; else its cause is `unknown`",
        "Linux 6.15 or newer tells it always; who is reaped does not depend on it",
    )


def children() -> Finding:
    """/proc/PID/task/TID/children, a kernel option."""
    if probes.lists_children():
        return ok("the kernel lists the children of a process")
    return limit(
        "the kernel does not list the children of a process (CONFIG_PROC_CHILDREN is off)",
        "use a kernel with it: until then workers with a scrubbed environment may be missed",
    )


def session_page() -> Finding:
    """The sealed memfd that marks forked workers."""
    if probes.seal_memfd():
        return ok("a session page can be made and sealed (memfd, F_SEAL_FUTURE_WRITE)")
    return problem(
        "a sealed memfd can still be written", "this kernel or sandbox does not keep seals: use Linux 5.1"
    )


def session_page_or_reason() -> Finding:
    """As ``session_page``, with the kernel's refusal as a finding."""
    try:
        return session_page()
    except (OSError, AttributeError) as error:
        return problem(
            f"a session page cannot be made: {error}", "use Linux 5.1 or newer, and a Python built for it"
        )


def cgroups() -> Finding:
    """Whether the cgroup tells one login or job from another."""
    from agent.wire import parse_cgroup

    own = parse_cgroup(probes.read_text("/proc/self/cgroup"))
    layout = cgroup_layout(_mounts())
    if own != "/":
        return ok(f"{layout}; yours is {own}, which tells your session from other jobs")
    return limit(
        f"{layout}; yours is the root, which does not tell your session from other jobs, so descent decides alone",
        "nothing, for ordinary pools; a login through systemd or a unit of its own gives a job its own cgroup",
    )


def isolation() -> Finding:
    """Whether sessions can have control groups of their own (docs/isolation.md)."""
    nothing = "nothing, unless sessions are to be isolated"
    if not any(mount.kind == "cgroup2" for mount in _mounts()):
        return limit(
            "no session can have a control group of its own: the unified hierarchy is not mounted", nothing
        )
    if not transient.is_running():
        return limit(
            "no systemd runs here: sessions can have control groups of their own below that of the daemon alone",
            f"{nothing}; then start the daemon in one that is made for it",
        )
    bus = transient.SYSTEM_BUS.partition("=")[2]
    if not os.path.exists(bus):
        return limit(
            f"systemd runs here, but there is no {bus}, by which it could be asked for control groups",
            f"{nothing}; then install dbus",
        )
    return ok("systemd gives sessions that ask for it a control group of their own")


def _mounts() -> list[Mount]:
    return parse_mount_table(probes.read_text("/proc/self/mounts"))


def cgroup_layout(mounts: list[Mount]) -> str:
    """Return the layout in words."""
    second = [mount for mount in mounts if mount.kind == "cgroup2"]
    first = [mount for mount in mounts if mount.kind == "cgroup"]
    if second and first:
        return "cgroups are hybrid (v1 controllers beside v2)"
    return "cgroups are unified (v2)" if second else "cgroups are v1" if first else "no cgroups are mounted"


def oom_counter() -> Finding:
    """The memory cgroup's count, the only thing that tells an OOM kill from a kill -9."""
    from reaperd.linux.oom import counter_file, read_kills

    count = read_kills(counter_file(probes.read_text("/proc/self/cgroup")))
    if count is not None:
        return ok(f"the memory cgroup counts OOM kills ({count} so far in yours)")
    return limit(
        "no memory cgroup counts OOM kills here, so one is reported as `killed by SIGKILL`",
        "start training in a cgroup with the memory controller: a systemd unit, a login session, a container",
    )


def reading_processes() -> Finding:
    """Whether /proc/PID/environ of others can be read, which needs ptrace rights (PTRACE_MODE_READ)."""
    yama = _yama()
    if not probes.reads_environ(of_another_user=False):
        return problem(
            f"not even the environment of your own processes can be read ({yama})",
            "a security module or sandbox forbids it: let reaperd read /proc/PID/environ",
        )
    if os.geteuid() != 0:
        return ok(f"your own processes can be read, which is all that a daemon of yours needs ({yama})")
    if probes.reads_environ(of_another_user=True):
        return ok(f"the processes of every user can be read ({yama})")
    return limit(
        f"root here cannot read other users' processes ({yama}), so their exec'ed workers are not recognised",
        "grant CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH (docker run --cap-add SYS_PTRACE --cap-add DAC_READ_SEARCH)",
    )


def _yama() -> str:
    """Return what Yama says; it restricts attaching to a process, which Reaper never does, not reading one."""
    try:
        scope = probes.read_text(_YAMA).strip()
    except FileNotFoundError:
        return "no Yama"
    return f"Yama ptrace_scope {scope}, which does not hinder reading"


def hidden_processes() -> Finding:
    """hidepid on /proc (proc(5))."""
    hiding = hiding_options(_mounts())
    if "subset=pid" in hiding:
        return limit(
            f"/proc is mounted with {', '.join(hiding)}", "mount /proc without subset=pid for the daemon"
        )
    if not hiding:
        return ok("/proc shows every process")
    if os.geteuid() == 0 and probes.reads_environ(of_another_user=True):
        return ok(f"/proc is mounted with {hiding[0]}, which does not bind CAP_SYS_PTRACE")
    if os.geteuid() == 0:
        return limit(
            f"/proc is mounted with {hiding[0]}: root here sees its own processes only",
            "grant CAP_SYS_PTRACE",
        )
    return limit(
        f"/proc is mounted with {hiding[0]}: you see your own processes only",
        "nothing, for your own daemon; a daemon for everybody must run as root",
    )


def shared_memory() -> Finding:
    """The tmpfs where pools share arrays and where Reaper reclaims them."""
    kind = next((mount.kind for mount in reversed(_mounts()) if mount.point == _SHM), "")
    try:
        probes.write_in(_SHM)
    except OSError as error:
        return limit(
            f"{_SHM} cannot be used: {error.strerror}", f"mount a tmpfs on {_SHM} that you may write"
        )
    found = os.statvfs(_SHM)
    total, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    if kind != "tmpfs":
        return limit(
            f"{_SHM} is {kind or 'no mount of its own'}", "mount a tmpfs on it: shared arrays go to disk"
        )
    if total < _SHM_BYTES:
        return limit(
            f"{_SHM} has only {size(total)}, {size(free)} of it free",
            "give it more (docker run --shm-size 2g): workers that share arrays die of SIGBUS when it is full",
        )
    return ok(f"{_SHM} is a tmpfs of {size(total)}, {size(free)} of it free")


CHECKS: tuple[tuple[str, Check], ...] = (
    ("pidfd", pidfd),
    ("cause of death", exit_information),
    ("children", children),
    ("session page", session_page_or_reason),
    ("cgroups", cgroups),
    ("isolation", isolation),
    ("OOM kills", oom_counter),
    ("reading processes", reading_processes),
    ("/proc", hidden_processes),
    (_SHM, shared_memory),
)
