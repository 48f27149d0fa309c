"""A machine that exists in memory only: processes that fork, exec and exit, what /proc says of them, and what is true.

What is true is known by who started whom, and never by what the daemon makes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from reaperd.linux.alarm import Alarm
from reaperd.linux.procfs import PF_FORKNOEXEC, TICKS_PER_S, ProcessGone, ProcFS, parse_uid
from reaperd.model import SIGCONT, SIGKILL, SIGSTOP, SIGTERM, ProcessId

FIRST_PID, THREAD = 100, 1_000_000
UID = 1000


@dataclass(frozen=True)
class Program:
    """What a process can run."""

    comm: str
    argv: tuple[str, ...] = ()
    variable: str = ""  # is in its environment
    owned: bool = False  # certainly a pool's: a worker, or a tracker
    worker: bool = False
    pools: bool = False  # may start workers
    adopts: bool = False  # is known to adopt, and to start no pool


def python(*argv: str, worker: bool = True, owned: bool = True, variable: str = "") -> Program:
    return Program("python3", ("/usr/bin/python3", *argv), variable, owned, owned and worker, pools=True)


TRAINER = python("train.py", owned=False)
SHELL = Program("bash", ("bash",))
WORKERS = (
    python("-m", "joblib.externals.loky.backend.popen_loky_posix", "--pipe", "9"),
    python("-c", "from multiprocessing.spawn import spawn_main; spawn_main(5)", "--multiprocessing-fork"),
    python("-c", "from multiprocessing.forkserver import main; main(4)"),
)
TRACKER = replace(
    python("-c", "from multiprocessing.resource_tracker import main;main(4)", worker=False), pools=False
)
RANK = python("train.py", owned=False, variable="TORCHELASTIC_RUN_ID")
ALIKE = python("train.py", "-c", WORKERS[1].argv[2], owned=False)
STARTED = (*WORKERS, TRACKER, RANK)  # by pools
EMBEDDING = Program("blender", ("blender",), pools=True)
MANAGER = Program("systemd", ("systemd", "--user"), adopts=True)
OTHERS = (TRAINER, EMBEDDING, ALIKE, SHELL, MANAGER, Program("sleep", ("sleep", "9")))
INITS = (
    Program("systemd", adopts=True),
    Program("tini", adopts=True),
    Program("bash", adopts=True),
    Program("own-init", pools=True),
    TRAINER,
)
LOADS_DATA = "pt_data_worker"  # the name that a DataLoader's workers give themselves


@dataclass(eq=False)
class Being:
    """One process. ``starter`` is its pool's parent, or who it would be; ``parent`` may have adopted it."""

    id: ProcessId
    inode: int
    program: Program
    starter: Being | None
    parent: Being | None
    sid: int
    forked: bool = True
    image: int = 1
    born: int = 0
    execed: int = 0  # when it last became another program, as the machine counts
    changed: int = 0  # or got another name
    read: int = 0  # when it was last read
    owned: bool = False  # has been a pool's
    subreaper: bool = False
    deaf: bool = False
    within_exec: bool = False
    headless: bool = False  # its main thread is dead, another one is not
    stopped: bool = False
    alive: bool = True
    comm: str = ""
    children: list[Being] = field(default_factory=list)

    @property
    def bears(self) -> bool:
        """Whether it certainly is a pool's worker, or was forked by one, now."""
        return self.program.worker or self.comm == LOADS_DATA

    @property
    def lost(self) -> bool:
        """Whether its pool is dead: who started it has ended, or became another program, or is a worker of a dead pool."""
        starter = self.starter
        if starter is None:
            return False
        return not starter.alive or starter.execed > self.born or (starter.owned and starter.lost)

    def __str__(self) -> str:
        """Say who it is, and who is above it."""
        above = [
            f"{one.id.pid}{'' if one.alive else ' (dead)'}" for one in (self.starter, self.parent) if one
        ]
        return f"{self.id.pid} {self.comm} {' '.join(self.program.argv)!r}, of {' now below '.join(above)}"


class Machine:
    """All processes, by pid, and all that there ever were."""

    def __init__(self, init: Program) -> None:
        self.now_s = 1000.0
        self.count = 0  # of all that ever happened
        self._free: list[int] = []
        self._next_pid = FIRST_PID
        self.table: dict[int, Being] = {}
        self.ever: dict[ProcessId, Being] = {}
        self.init = self._born(1, None, init)
        self.init.forked = False

    def living(self) -> list[Being]:
        return [one for one in self.table.values() if one.alive]

    def beings(self, *, pools: bool = False) -> list[Being]:
        """Return who lives and is not init, or all who may start workers."""
        return [one for one in self.living() if (one.program.pools if pools else one is not self.init)] or [
            self.init
        ]

    # -- what happens

    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    def _tick(self) -> int:
        self.count += 1
        return self.count

    def _born(self, pid: int, starter: Being | None, program: Program) -> Being:
        self.wait(1 / TICKS_PER_S)  # nobody gets the same pid twice within a tick
        at = self._tick()
        one = Being(
            ProcessId(pid, int(self.now_s * TICKS_PER_S)), at, program, starter, starter,
            sid=starter.sid if starter else 1, born=at, changed=at, comm=program.comm,
        )  # fmt: skip
        self.table[pid] = self.ever[one.id] = one
        return one

    def fork(self, starter: Being, *, reuse: bool = False) -> Being:
        """``reuse``: it gets the pid of one that is gone, where there is one."""
        if reuse and self._free:
            pid = self._free.pop()
        else:
            pid = self._next_pid = self._next_pid + 1
        one = self._born(pid, starter, starter.program)
        one.comm, one.image, one.owned = starter.comm, starter.image, starter.bears or starter.program.owned
        starter.children.append(one)
        return one

    def begin_exec(self, one: Being, program: Program) -> None:
        """The new program has no memory yet that anybody could read."""
        one.changed = one.execed = one.image = self._tick()
        one.program, one.comm, one.forked, one.within_exec = program, program.comm, False, True
        one.owned = one.owned or one.bears or program.owned

    def end_exec(self, one: Being) -> None:
        one.within_exec = False

    def exec(self, one: Being, program: Program) -> None:
        self.begin_exec(one, program)
        self.end_exec(one)

    def name(self, one: Being, comm: str) -> None:
        one.comm, one.changed = comm, self._tick()
        one.owned = one.owned or one.bears

    def exit(self, one: Being, *, zombie: bool = False) -> None:
        """End ``one``; its children are adopted. A zombie keeps its pid until its parent has waited for it."""
        assert one is not self.init
        self._tick()
        one.alive = False
        above = one.parent
        while above is not None and not (above.subreaper and above.alive):
            above = above.parent
        adopter = above or self.init
        for child in one.children:
            child.parent = adopter
        adopter.children += one.children
        one.children = []
        for child in [child for child in adopter.children if not child.alive]:
            self.reap(child)
        if not zombie:
            self.reap(one)

    def reap(self, one: Being) -> None:
        if one.parent is not None and one in one.parent.children and self.table.get(one.id.pid) is one:
            one.parent.children.remove(one)
            del self.table[one.id.pid]
            self._free.append(one.id.pid)

    def signal(self, one: Being, number: int) -> None:
        if number == SIGKILL or (number == SIGTERM and not one.deaf):
            self.exit(one, zombie=bool(one.id.pid % 2))
        elif number in (SIGSTOP, SIGCONT):
            one.stopped = number == SIGSTOP


class Proc(ProcFS):
    """/proc of a machine, on which more can happen between any two reads."""

    def __init__(self, machine: Machine) -> None:
        super().__init__("/dev/null")  # what is asked for beside files is not to be had
        self._machine = machine
        self.happens: dict[int, Callable[[], None]] = {}  # before the read of that number
        self.reads = 0
        self.unlisted: set[int] = set()
        self.childless: set[int] = set()  # those of whose children half is not told
        self.gone: set[int] = set()  # of whom every read fails
        self.torn: int | None = None  # the number of a stat that is read that comes in part

    def tell_all(self) -> None:
        """From now on all goes well."""
        self.happens, self.reads = {}, 0
        self.unlisted, self.childless, self.gone, self.torn = set(), set(), set(), None

    @property
    def tells_all(self) -> bool:
        return not (self.happens or self.unlisted or self.childless or self.gone or self.torn is not None)

    def listing(self) -> dict[int, int]:
        return {pid: one.inode for pid, one in self._machine.table.items() if pid not in self.unlisted}

    def tasks(self, pid: int) -> list[int]:
        one = self._machine.table.get(pid)
        return [] if one is None else [pid, pid + THREAD] if one.headless else [pid]

    def _read(self, name: str, *, records: bool = False) -> bytes:
        self.reads += 1
        if happening := self.happens.get(self.reads):
            happening()
        pid, *_, file = name.split("/")
        one = self._machine.table.get(int(pid))
        if one is None or one.id.pid in self.gone:
            raise ProcessGone(name)
        if file == "stat":
            one.read = self._machine.count
            text = self._stat(one, other_thread=name.count("/") > 1 and f"task/{pid}/" not in name)
            return text[: len(text) // 2] if self.reads == self.torn else text
        if file == "status":
            return (f"Name:\t{one.comm}\nUid:" + f"\t{UID}" * 4 + f"\nNSpid:\t{pid}\n").encode()
        if file == "children":
            pids = [child.id.pid for child in one.children]
            pids = pids[::2] if one.id.pid in self.childless else pids
            return " ".join(map(str, pids)).encode()
        if file == "cgroup":
            return b"0::/\n"
        if one.within_exec or not one.alive or file == "maps":
            return b""
        if file == "cmdline":
            return b"".join(word.encode() + b"\0" for word in one.program.argv)
        assert file == "environ", name
        return b"HOME=/\0" + (f"{one.program.variable}=1\0".encode() if one.program.variable else b"")

    def _stat(self, one: Being, *, other_thread: bool) -> bytes:
        rest = [0] * 49
        rest[0] = one.parent.id.pid if one.parent else 0
        rest[1] = rest[2] = one.sid
        rest[5] = PF_FORKNOEXEC if one.forked else 0
        rest[16] = 2 if one.headless and one.alive else 1
        rest[18], rest[20] = one.id.start_ticks, 1000
        if not one.within_exec:
            rest[24] = rest[44] = one.image
        dead = not one.alive or (one.headless and not other_thread)
        state = "Z" if dead else "T" if one.stopped else "S"
        return f"{one.id.pid} ({one.comm}) {state} {' '.join(map(str, rest))}".encode()

    def uid_of(self, pid: int) -> int | None:
        return parse_uid(self.status(pid))


class Bell(Alarm):
    """An alarm that rings from a certain question on."""

    def __init__(self) -> None:
        self.left: int | None = None

    def rings(self) -> bool:
        if self.left is None:
            return False
        self.left -= 1
        return self.left < 0
