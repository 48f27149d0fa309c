"""Hostile text by the hundred thousand for everything that parses it: ``run.py [--runs N] [--seed S] [--target NAME ...]``.

Each target runs in a process of its own, guided by coverage where atheris is installed. An input that breaks a promise is
kept below build/fuzz, with how to repeat it, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from typing import Any, NamedTuple

TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ROOT = os.path.dirname(TESTS)
sys.path.insert(0, os.path.join(ROOT, "daemon"))
sys.path.insert(0, ROOT)
sys.path.insert(0, os.path.join(TESTS, "support"))

from fuzzing import engine  # noqa: E402

DEFAULT_RUNS = 100_000
_SHM = "/dev/shm"
_LAST_LINE = re.compile(r"#(\d+)\s+(?:DONE|\w+)\s+(?:cov: (\d+) ft: (\d+) corp: (\d+)\S* )?.*?exec/s: (\d+)")
_TELLS_OF_FINDING = re.compile(r"Test unit written to (\S+)")


class Done(NamedTuple):
    """How one target came out."""

    runs: int
    lines: str  # of coverage: edges, features and inputs that reach something new
    per_s: float
    output: str
    failed: bool


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=DEFAULT_RUNS, help="inputs, of all targets together")
    parser.add_argument("--seed", type=int, default=None, help="default: one at random, which is printed")
    parser.add_argument("--target", action="append", default=[], help="only this one; may be given again")
    parser.add_argument("--engine", choices=("atheris", "chance"), default=None)
    parser.add_argument(
        "--findings", default=os.path.join(ROOT, "build", "fuzz"), help="where inputs are kept"
    )
    parser.add_argument("--repeat", metavar="FILE", help="run one kept input, and nothing else")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    # Whoever takes part is ended on the way out.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    if options.work:
        return _work(json.loads(options.work))
    if options.repeat:
        return engine.repeat(options.repeat)
    raise SystemExit(_run(options))


def _work(told: dict[str, Any]) -> None:
    work = engine.Work(*told["work"])
    (engine.guided if told["engine"] == "atheris" else engine.by_chance)(work)


def _run(options: argparse.Namespace) -> int:
    from fuzzing.alltargets import TARGETS, shares

    unknown = [name for name in options.target if name not in TARGETS]
    if unknown:
        raise SystemExit(f"there is no target {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    targets = [target for name, target in TARGETS.items() if not options.target or name in options.target]
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    which = options.engine or _engine()
    told = (
        "guided by coverage" if which == "atheris" else "by chance: atheris is not to be had for this Python"
    )
    print(f"seed {seed}, {options.runs} inputs for {len(targets)} targets, {told}", flush=True)
    print(f"  {'target':12} {'inputs':>8} {'inputs/s':>9}  reached", flush=True)
    os.makedirs(options.findings, exist_ok=True)
    runs, failed, began_s = 0, [], time.monotonic()
    for name, share in shares(options.runs, targets).items():
        done = _fuzz(engine.Work(name, share, seed ^ zlib.crc32(name.encode()), options.findings, ""), which)
        runs += done.runs
        print(f"  {name:12} {done.runs:8} {done.per_s:9.0f}  {done.lines}", flush=True)
        if done.failed:
            failed.append(name)
            _tell_finding(done)
    took_s = time.monotonic() - began_s
    print(
        f"seed {seed}: {runs} inputs in {took_s:.0f} s, {len(failed)} of {len(targets)} targets failed {' '.join(failed)}"
    )
    return 1 if failed else 0


def _engine() -> str:
    try:
        import atheris  # noqa: F401
    except ImportError:
        return "chance"
    return "atheris"


def _fuzz(work: engine.Work, which: str) -> Done:
    """Run one target in a process of its own, with a folder for temporary files that goes with it."""
    # Whatever a target makes goes with it: libFuzzer ends the process past all that would tidy up.
    scratch = tempfile.mkdtemp(prefix="reaper-fuzz-", dir=_SHM if os.access(_SHM, os.W_OK) else None)
    try:
        work = work._replace(corpus=os.path.join(scratch, "corpus"))
        began_s = time.monotonic()
        done = subprocess.run(
            [
                sys.executable,
                os.path.abspath(__file__),
                "--work",
                json.dumps({"work": work, "engine": which}),
            ],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            env={**os.environ, "TMPDIR": scratch, "PYTHONHASHSEED": "0"},
        )
        took_s = time.monotonic() - began_s
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    output = done.stdout + done.stderr
    runs, reached = 0, ""
    for match in _LAST_LINE.finditer(output):
        runs = int(match[1])
        if match[2]:
            reached = f"{match[2]} edges, {match[3]} features, {match[4]} inputs that reached something new"
    return Done(runs, reached, runs / took_s, output, done.returncode != 0)


def _tell_finding(done: Done) -> None:
    kept = _TELLS_OF_FINDING.search(done.output)
    lines = [line for line in done.output.splitlines() if not line.startswith(("INFO:", "#", "Dictionary:"))]
    print("\n".join(f"    {line}" for line in lines[-60:]))
    if kept:
        print(
            f"    to repeat: {sys.executable} {os.path.relpath(__file__)} --repeat {os.path.relpath(kept[1])}"
        )


if __name__ == "__main__":
    main()
