"""Chaos for a real daemon: ``run.py [--steps N] [--seed S] [--keep DIRECTORY]``.

Leaders, workers, bystanders and the daemon come and go as a plan made from the seed says, while every promise is checked.
The exit code is 1 where one was broken; the evidence and the daemon's log are then in the directory.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import time
import uuid

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "support"))

from chaos.kin import Violation
from chaos.perform import Performance, abilities, evidence
from chaos.plan import Abilities, Step, plan
from chaos.stage import Stage
from harness import ROOT, Scratch

TELL_EVERY = 100  # steps


class Teller:
    """Prints how far it is."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._began_s = time.monotonic()

    def __call__(self, step: Step) -> None:
        if step.number % TELL_EVERY == 0 and step.op != "start-daemon":
            self.tell(step.number)

    def tell(self, number: int) -> None:
        counts, took_s = self._stage.counts, time.monotonic() - self._began_s
        ended = counts.get("event reaped", 0) + counts.get("event ended", 0)
        print(
            f"step {number}: {took_s:.0f} s, {number / took_s:.1f} steps/s, lives of the daemon"
            f" {self._stage.life.number}, leaders {counts.get('leader', 0)}, workers {counts.get('worker', 0)},"
            f" untouchable {sum(counts.get(fate, 0) for fate in ('spared', 'stranger', 'bystander'))},"
            f" ends on record {ended}, signals seen {counts.get('signals', 0)}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=None, help="default: one at random, which is printed")
    parser.add_argument("--keep", default=os.path.join(ROOT, "build", "chaos"), help="where evidence goes")
    parser.add_argument("--print-plan", action="store_true", help="print the steps, and do nothing")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    if options.print_plan:
        root = os.geteuid() == 0
        every = Abilities(other_users=root, cgroups=root, freezing=root, mounts=root)
        for step in plan(seed, options.steps, every):
            print(step)
        return
    print(
        f"seed {seed}, {options.steps} steps, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.2f}",
        flush=True,
    )
    raise SystemExit(run(seed, options.steps, options.keep))


def run(seed: int, steps: int, keep: str) -> int:
    """Perform the plan of ``seed`` and return the exit code."""
    # Whoever takes part is ended on the way out.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    scratch = Scratch()
    stage = Stage(scratch, uuid.uuid4().hex[:12])
    performance, teller = Performance(stage), Teller(stage)
    try:
        performance.run(plan(seed, steps, abilities(stage)), teller)
    except BaseException as error:
        directory = os.path.join(keep, f"seed-{seed}")
        os.makedirs(directory, exist_ok=True)
        if isinstance(error, Violation):
            text = f"seed {seed}, step {performance.last[-1].number if performance.last else 0}\n" + evidence(
                error, performance
            )
            with open(os.path.join(directory, "evidence"), "w", encoding="utf-8") as file:
                file.write(text)
            print(text)
        shutil.copy(stage.daemon.log, directory)
        print(f"the daemon's log is in {directory}", flush=True)
        if not isinstance(error, Violation):
            raise
        return 1
    finally:
        stage.close()
        scratch.remove()
    teller.tell(steps)
    for what, number in sorted(stage.counts.items()):
        print(f"  {number:8} {what}")
    return 0


if __name__ == "__main__":
    main()
