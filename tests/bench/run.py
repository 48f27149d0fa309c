"""Print every promised figure beside what it is compared with: ``run.py [--quick] [--only ROW,...] [--json] [--record]``.

Ours and theirs are measured in the same run, in turn, and the medians compared: on a busy host only ratios mean something.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import signal
import sys
import time
from collections.abc import Callable, Generator
from typing import NoReturn, TextIO

sys.path.insert(1, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "support"))

import record
import row_agent
import row_alerts
import row_growth
import row_idle
import row_orphans
import row_reap
import row_scan
import row_start
import row_syscalls
import row_training
from figures import Row, shown
from harness import Scratch
from processes import count_processes
from scene import Bench, Unmeasured

Measure = Callable[[Bench], Generator[Row]]

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DOCS = os.path.join(ROOT, "docs")
PAGE = os.path.join(DOCS, "performance.md")

ROWS: dict[str, Measure] = {
    "reap": row_reap.measure,
    "alerts": row_alerts.measure,
    "scan": row_scan.measure,
    "idle": row_idle.measure,
    "import": row_agent.measure_import,
    "register": row_agent.measure_register,
    "progress": row_agent.measure_progress,
    "training": row_training.measure,
    "syscalls": row_syscalls.measure,
    "start": row_start.measure,
    "growth": row_growth.measure,
    "orphans": row_orphans.measure,
}


def main() -> None:
    options = parse_arguments()
    signal.signal(signal.SIGTERM, _leave)
    # Users run from compiled files: without them a start of Python measures its compiler.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    out = sys.stderr if options.json else sys.stdout
    host = describe_host()
    print(host, file=out)
    began_s = time.monotonic()
    scratch = Scratch()
    try:
        bench = Bench.begin(scratch, quick=options.quick, plots=DOCS if options.record else options.plots)
        rows, skipped = measure(bench, options.only, out)
    finally:
        scratch.remove()
    missed = [row.name for row in rows if row.reached is False and not row.aim]
    print(f"\n{time.monotonic() - began_s:.0f} s; not reached: {'; '.join(missed) or 'nothing'}", file=out)
    if options.record:
        record.put_between_marks(PAGE, record.as_markdown(host, rows, skipped))
    if options.json:
        document = {"host": host, "rows": [row.as_json() for row in rows], "skipped": skipped}
        print(json.dumps(document, indent=1))


def measure(bench: Bench, names: list[str], out: TextIO) -> tuple[list[Row], dict[str, str]]:
    """Print the rows of ``names`` as they come; return them, and why others could not be measured."""
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    for name in names:
        began_s = time.monotonic()
        print(f"\n-- {name}", file=out, flush=True)
        with contextlib.closing(ROWS[name](bench)) as measuring:
            try:
                for row in measuring:
                    rows.append(row)
                    print(as_text(row), file=out, flush=True)
            except Unmeasured as reason:
                skipped[name] = str(reason)
                print(f"not measured: {reason}", file=out, flush=True)
        print(f"   ({time.monotonic() - began_s:.0f} s, load {os.getloadavg()[0]:.2f})", file=out, flush=True)
    return rows, skipped


def _leave(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="fewer repetitions: about three minutes, and more noise"
    )
    parser.add_argument(
        "--only",
        type=_names,
        default=list(ROWS),
        metavar="ROW[,ROW]",
        help=f"of {', '.join(ROWS)}",
    )
    parser.add_argument(
        "--json", action="store_true", help="one document on stdout; the table goes to stderr"
    )
    parser.add_argument(
        "--plots",
        default=os.path.join(ROOT, "build"),
        metavar="DIRECTORY",
        help="where plots go (default: %(default)s)",
    )
    parser.add_argument(
        "--record", action="store_true", help="put figures and plots of a whole run into docs/"
    )
    options = parser.parse_args()
    if options.record and (options.quick or options.only != list(ROWS)):
        parser.error("--record is for a whole run")
    return options


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in ROWS:
            raise argparse.ArgumentTypeError(f"there is no {name!r}, there are {', '.join(ROWS)}")
    return names


def describe_host() -> str:
    return (
        f"Linux {platform.release()}, Python {platform.python_version()}, {os.cpu_count()} cores,"
        f" {count_processes()} processes, load {os.getloadavg()[0]:.2f}"
    )


def as_text(row: Row) -> str:
    compared = f"{shown(row.theirs, row.unit)} ({row.peer})" if row.theirs is not None else ""
    ratio = "" if row.ratio is None else f"{row.ratio:.3g} x"
    line = f"{row.name:58} {shown(row.ours, row.unit):>12}  {compared:45} {ratio:>8}  {row.bound:14} {row.verdict}"
    return f"{line.rstrip()}\n    {row.note}" if row.note else line.rstrip()


if __name__ == "__main__":
    main()
