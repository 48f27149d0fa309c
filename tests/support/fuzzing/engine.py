"""Runs one target over many inputs: guided by coverage where atheris is there, else by chance alone."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import sys
import time
import traceback
from typing import NamedTuple

from fuzzing.mutate import changed, random_changes
from fuzzing.target import Target, bounded

FOUND = 77  # the exit code of libFuzzer, too
_TELL_EVERY_S = 1.0


class Work(NamedTuple):
    """What one process is to do."""

    target: str
    runs: int
    seed: int
    findings: str  # where an input that breaks a promise goes
    corpus: str  # a folder of its own


def write_seeds(target: Target, corpus: str) -> None:
    """Put the seeds of a target into a folder, as libFuzzer reads them."""
    os.makedirs(corpus, exist_ok=True)
    for at, seed in enumerate(target.seeds()):
        with open(os.path.join(corpus, f"seed-{at:02}"), "wb") as file:
            file.write(seed[: target.longest])


def guided(work: Work) -> None:
    """Fuzz with atheris; libFuzzer ends the process itself, with its last line on stderr."""
    import atheris

    with atheris.instrument_imports(include=["agent", "reaperd"], enable_loader_override=False):
        from fuzzing.alltargets import TARGETS
    target = TARGETS[work.target]
    write_seeds(target, work.corpus)
    words = os.path.join(os.path.dirname(work.corpus), f"{target.name}.dict")
    with open(words, "w", encoding="ascii") as file:
        for word in target.words:
            file.write('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n')
    arguments = [
        sys.argv[0],
        work.corpus,
        f"-runs={work.runs}",
        f"-seed={work.seed % 2**31 or 1}",
        f"-max_len={target.longest}",
        *([f"-dict={words}"] if target.words else []),
        f"-artifact_prefix={os.path.join(work.findings, target.name)}-",
        "-timeout=20",
        "-rss_limit_mb=2048",
        "-print_final_stats=1",
    ]
    stack = contextlib.ExitStack()
    check = stack.enter_context(bounded(target))
    atheris.Setup(arguments, check)
    atheris.Fuzz()


def by_chance(work: Work) -> None:
    """Fuzz with inputs made from the seeds by chance, which know nothing of what they reach."""
    from fuzzing.alltargets import TARGETS

    target = TARGETS[work.target]
    seeds, chance = target.seeds(), random.Random(work.seed)
    began_s = told_s = time.monotonic()
    with bounded(target) as check:
        for number in range(work.runs):
            if number < len(seeds):
                data = seeds[number]
            else:
                data = changed(chance.choice(seeds), random_changes(chance), target.words, target.longest)
            try:
                check(data)
            except Exception:  # noqa: BLE001 - whatever it is, it is what was looked for
                traceback.print_exc()
                keep(data, work)
                raise SystemExit(FOUND) from None
            now_s = time.monotonic()
            if now_s - told_s > _TELL_EVERY_S:
                told_s = now_s
                print(f"#{number} exec/s: {number / (now_s - began_s):.0f}", file=sys.stderr, flush=True)
    took_s = max(time.monotonic() - began_s, 1e-9)
    print(f"#{work.runs} DONE exec/s: {work.runs / took_s:.0f}", file=sys.stderr, flush=True)


def keep(data: bytes, work: Work) -> str:
    """Write an input that breaks a promise where it can be found, and return its path."""
    path = os.path.join(work.findings, f"{work.target}-crash-{hashlib.sha1(data).hexdigest()}")
    with open(path, "wb") as file:
        file.write(data)
    print(f"Test unit written to {path}", file=sys.stderr)
    return path


def repeat(path: str) -> None:
    """Run the target that an input's name says on that input, once; whatever it raises is raised."""
    from fuzzing.alltargets import TARGETS

    name = os.path.basename(path)
    target = max((one for one in TARGETS if name.startswith(f"{one}-")), key=len, default=None)
    if target is None:
        raise SystemExit(f"{path}: the name does not begin with a target's: {', '.join(TARGETS)}")
    with open(path, "rb") as file:
        data = file.read()
    with bounded(TARGETS[target]) as check:
        check(data)
    print(f"{target} keeps its promises with these {len(data)} bytes")
