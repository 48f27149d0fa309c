"""The architecture, checked on the source: what is pure, who may signal, and which way imports run."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PURE = [
    *("model", "policy", "signatures", "lineage", "decide", "escalation", "ledger", "report"),
    *("verdicts", "hunt", "stored", "words", "isolation", "rights", "kinds", "questions", "counters"),
    *("config", "config_values", "gate_frames", "pages", "roster", "turns", "waiters", "alert_groups"),
]
PURE_MODULES = ["agent.wire", *(f"reaperd.{name}" for name in PURE)]
# A list of what is allowed: nobody can name everything that touches the world.
ALLOWED_IN_PURE = {
    *(
        "__future__",
        "_json",
        "bisect",
        "collections",
        "difflib",
        "enum",
        "functools",
        "heapq",
        "ipaddress",
        "json",
    ),
    *("itertools", "math", "re", "struct", "sys", "tomli", "tomllib", "types", "typing", "unicodedata"),
}
TOUCHES_THE_WORLD = {"open", "print", "input", "exec", "eval", "compile", "__import__", "breakpoint"}

SIGNALLING = {
    *("killpg", "tgkill", "pidfd_send_signal", "send_signal", "raise_signal", "pthread_kill", "sigqueue"),
}
# Who may do so, and why it cannot hit anyone else.
SIGNALLERS = {
    "reaperd.reaper": {"send_signal", "kill"},  # the only way out for a kill; a whole control group
    "reaperd.linux.pidfd": {"pidfd_send_signal"},  # the call itself
    "reaperd.linux.helper": {"pidfd_send_signal"},  # our own child
    "reaperd.linux.child": {"pidfd_send_signal"},  # our own child
    "reaperd.gate_link": {"kill"},  # our own child, not waited for yet
    "reaperd.companion": {"kill"},  # the same
    "reaperd.ctl.probes": {"pidfd_send_signal"},  # signal 0, to our own child
    "agent.family": {
        "pidfd_send_signal",
        "terminate",
    },  # what this process or its dead child has started, and its own pools
    "agent.launch": {"terminate", "kill"},  # our own child, not waited for yet
    "agent.stopping": {"pidfd_send_signal"},  # the leader of a status file, and who supervises it
    "agent.training": {"raise_signal"},  # itself, once it is told a second time
    "reaperd.ctl.run": {"pidfd_send_signal", "raise_signal"},  # our own child; itself, to end as that did
    "reaperd.ctl.ui.serve": {"terminate", "kill"},  # our own child
    "reaperd.ctl.screen": {"raise_signal"},  # itself: Ctrl-Z stops it once the terminal is put back
}

# Who asks the clock on the wall, which is set back and forward at any time, and what for: no deadline and no verdict.
WALL_CLOCK = {"time", "time_ns", "now", "utcnow", "today", "CLOCK_REALTIME", "localtime", "ctime"}
READERS_OF_THE_WALL_CLOCK = {
    "reaperd.times": {"now"},  # what people are told
    "reaperd.sessions": {"time"},  # when an event was
    "reaperd.store": {"time"},  # how old an event is
    "reaperd.database": {"time_ns"},  # the name of a file that is moved aside
    "reaperd.core": {"time"},  # when a leader died, for files have no other time; in doubt a file stays
    "reaperd.linux.shm": {"time"},  # when it started; the same
    "reaperd.leftovers": {"time"},  # how old a file is; who lives decides
    "reaperd.metrics": {"time"},  # what Prometheus is told
    "reaperd.exporter": {"time"},  # the same
    "agent.status": {"now"},  # what people are told
    "agent.checkpoint": {"time"},  # how old a file is
}

MAX_FUNCTION_LINES = 60


def _sources() -> dict[str, Path]:
    found = {}
    for base, package in ((ROOT, "agent"), (ROOT / "daemon", "reaperd")):
        for path in sorted((base / package).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


SOURCES = _sources()


@functools.cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text("utf-8"))


@functools.cache
def imports_of(module: str) -> frozenset[str]:
    """Return every module that ``module`` imports anywhere, in functions and for type checkers too."""
    found: set[str] = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{module} imports relatively"
            assert not node.level, f"{module} imports relatively"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & SOURCES.keys()
            found |= submodules
            if len(submodules) < len(node.names):
                found.add(node.module)
    return frozenset(found)


def ours_in(module: str) -> frozenset[str]:
    return imports_of(module) & SOURCES.keys()


def reached_from(module: str) -> set[str]:
    reached, pending = set(), [module]
    while pending:
        name = pending.pop()
        if name not in reached:
            reached.add(name)
            pending += ours_in(name)
    return reached


def modules_after(statement: str) -> set[str]:
    """Return the modules that ``statement`` loads in a fresh interpreter which knows nothing but this tree."""
    code = (
        f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'daemon')]!r}; before = set(sys.modules)\n"
        f"{statement}\nprint(*set(sys.modules) - before)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, timeout=30
    )
    return set(done.stdout.split())


def calls_in(module: str) -> Iterator[str]:
    """Yield the bare name of everything that ``module`` calls."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute):
                yield node.func.attr
            elif isinstance(node.func, ast.Name):
                yield node.func.id


# -- the pure core --------------------------------------------------------------------------------


def test_a_pure_module_imports_nothing_that_touches_the_world() -> None:
    for module in PURE_MODULES:
        foreign = {name.partition(".")[0] for name in imports_of(module) - SOURCES.keys()}
        assert foreign <= ALLOWED_IN_PURE, module


def test_a_pure_module_imports_only_pure_modules_of_ours() -> None:
    for module in PURE_MODULES:
        assert ours_in(module) <= set(PURE_MODULES), module


def test_a_pure_module_opens_prints_and_evaluates_nothing() -> None:
    for module in PURE_MODULES:
        nodes = list(ast.walk(tree_of(module)))
        called = {
            node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not called & TOUCHES_THE_WORLD, module
        taken_from_sys = {
            node.attr
            for node in nodes
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sys"
        }
        assert taken_from_sys <= {"version_info"}, module


# -- who imports whom -----------------------------------------------------------------------------


def test_the_agent_never_imports_the_daemon() -> None:
    agent = [module for module in SOURCES if module.partition(".")[0] == "agent"]
    assert len(agent) >= 5
    for module in agent:
        assert not {name for name in imports_of(module) if name.partition(".")[0] == "reaperd"}, module


def test_importing_the_agent_loads_what_register_needs_and_no_more() -> None:
    loaded = modules_after("import agent")
    native = {"_json", "_socket", "_thread", "atexit", "fcntl", "mmap"}
    assert {name.partition(".")[0] for name in loaded} <= {"agent", "__future__", *native}
    assert not modules_after("import agent; before = set(sys.modules); from agent import page, session")


def test_the_daemon_and_its_gate_load_of_the_agent_only_what_both_must_see_alike() -> None:
    for module in ("reaperd.__main__", "reaperd.gate"):
        loaded = modules_after(f"import {module}")
        assert {name for name in loaded if name.startswith("agent.")} <= {
            "agent.sockets",
            "agent.strays",
            "agent.wire",
        }


def test_the_work_of_the_agent_loads_only_the_standard_library() -> None:
    loaded = modules_after("import agent.client, agent.page, agent.session, agent.wire")
    assert {"agent.session", "_json", "mmap"} <= loaded
    assert {name.partition(".")[0] for name in loaded} <= {*sys.stdlib_module_names, "agent"}


def test_who_registers_does_not_wait_for_what_takes_long_to_load() -> None:
    loaded = modules_after("from agent import page, session")
    assert "agent.zmtp" in loaded
    slow = {
        "collections",
        "contextlib",
        "ctypes",
        "enum",
        "json",
        "re",
        "socket",
        "struct",
        "threading",
        "typing",
    }
    assert not loaded & slow


def test_nothing_that_the_core_imports_imports_zeromq() -> None:
    reached = reached_from("reaperd.loop")
    assert {"reaperd.core", "reaperd.gate_link", "reaperd.reaper", "reaperd.server"} <= reached
    assert "reaperd.gate" not in reached
    for module in reached:
        assert not {name for name in imports_of(module) if name.partition(".")[0] == "zmq"}, module


def test_the_daemon_runs_without_zeromq_loaded() -> None:
    loaded = modules_after("import reaperd.__main__")
    assert "reaperd.loop" in loaded
    assert "zmq" not in loaded


def test_what_serves_keeps_no_module_in_memory_that_it_can_do_without() -> None:
    """Each of these takes a quarter of a MiB and more, for months: what needs one now and then imports it then."""
    for module in ("reaperd.__main__", "reaperd.gate"):
        found = modules_after(f"import {module}") & {
            *("argparse", "asyncio", "difflib", "gettext", "ipaddress", "locale", "multiprocessing"),
            *("shutil", "subprocess", "tempfile", "tracemalloc", "unittest", "urllib.parse"),
            *("dataclasses", "inspect"),
        }
        if sys.version_info < (3, 11) and module == "reaperd.gate":
            found -= {"subprocess"}  # which platform loads there, and pyzmq platform
        assert not found, module
    assert "ctypes" not in modules_after("import reaperd.__main__")


def test_a_daemon_without_figures_loads_nothing_of_what_serves_them() -> None:
    loaded = modules_after("import reaperd.__main__")
    assert not loaded & {"reaperd.metrics", "reaperd.counters", "prometheus_client"}


def test_the_core_never_loads_what_its_companions_need() -> None:
    for module in reached_from("reaperd.loop"):
        foreign = {name.partition(".")[0] for name in imports_of(module)}
        assert not foreign & {"prometheus_client", "asyncio"}, module


def test_the_core_knows_nothing_of_the_control_command() -> None:
    assert not {name for name in reached_from("reaperd.__main__") if name.startswith("reaperd.ctl")}


def test_the_gate_imports_nothing_of_ours_that_decides_reads_or_kills() -> None:
    assert reached_from("reaperd.gate") - {"reaperd.gate"} <= {
        "agent.wire",
        "reaperd.gate_frames",
        "reaperd.linux",
        "reaperd.linux.prctl",
        "reaperd.unprivileged",
    }


def test_the_kernel_interfaces_know_only_each_other_and_the_facts() -> None:
    for module in SOURCES:
        if module.startswith("reaperd.linux"):
            foreign = {name for name in ours_in(module) if not name.startswith("reaperd.linux")}
            assert foreign <= {"reaperd.model", "reaperd.pages", "agent.wire"}, module


def test_imports_never_run_in_a_circle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for name in ours_in(module):
                visit(name, (*path, module))
            done.add(module)

    for module in SOURCES:
        visit(module, ())


# -- who signals ----------------------------------------------------------------------------------


def test_only_those_who_may_signal_anyone_do() -> None:
    found: dict[str, set[str]] = {}
    for module in SOURCES:
        names = {node.attr for node in ast.walk(tree_of(module)) if isinstance(node, ast.Attribute)}
        signals = (names & SIGNALLING) | ({"kill", "terminate"} & set(calls_in(module)))
        if signals:
            found[module] = signals
    assert found == SIGNALLERS


def test_nobody_signals_a_bare_pid() -> None:
    for module in SOURCES:
        for node in ast.walk(tree_of(module)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("os", "kill"), ("os", "killpg")}, module
            if isinstance(node, ast.ImportFrom) and node.module in ("os", "signal"):
                assert not {alias.name for alias in node.names} & {"kill", "killpg", *SIGNALLING}, module


def test_only_one_request_and_one_session_at_a_time_are_guarded_against_every_exception() -> None:
    catching = {
        module
        for module in SOURCES
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or (isinstance(node.type, ast.Name) and node.type.id == "Exception"))
    }
    assert catching == {
        "reaperd.aside",
        "reaperd.server",
        "agent.checkpoint",
    }  # damaged pickles raise anything


# -- which clock ----------------------------------------------------------------------------------


def test_no_decision_reads_the_clock_on_the_wall() -> None:
    """All that waits, ages or expires goes by clocks that nobody sets: it is enough to know who reads the other."""
    found: dict[str, set[str]] = {}
    for module in SOURCES:
        if module.startswith("reaperd.ctl"):
            continue  # shows times, and decides nothing
        for node in ast.walk(tree_of(module)):
            if (
                isinstance(node, ast.Attribute)
                and node.attr in WALL_CLOCK
                and isinstance(node.value, ast.Name)
                and node.value.id in ("time", "datetime", "date")
            ):
                found.setdefault(module, set()).add(node.attr)
            if isinstance(node, ast.ImportFrom) and node.module == "time":
                assert not {alias.name for alias in node.names} & WALL_CLOCK, module
    assert found == READERS_OF_THE_WALL_CLOCK


# -- how it reads ---------------------------------------------------------------------------------


def test_no_function_is_longer_than_a_screen() -> None:
    long = [
        f"{module}.{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for module in SOURCES
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert long == []


def test_every_module_says_first_what_it_is_for() -> None:
    assert [module for module in SOURCES if not ast.get_docstring(tree_of(module))] == []
