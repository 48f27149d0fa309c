"""Train with a pool of workers: joblib, multiprocessing or concurrent.futures, with every start method."""

from __future__ import annotations

import argparse
import concurrent.futures
import ctypes
import glob
import multiprocessing
import os
import sys
import threading
from multiprocessing import shared_memory
from typing import Any

import stage

import agent

PR_SET_NAME = 15  # linux/prctl.h


def work_on(array: Any, pipe: str, release: str, busy: bool) -> None:
    """A joblib task with an argument that is big enough to be memory-mapped."""
    assert type(array).__name__ == "memmap", type(array)
    float(array[:1000].sum())
    stage.work(pipe, release, busy)


def attend(pipe: str, busy: bool) -> None:
    """The life of a process that is no member of a pool."""
    stage.report(pipe)
    if busy:
        stage.spin()
    stage.hold()


def attend_with_pools(pipe: str, busy: bool, depth: int) -> None:
    """The life of a process with a worker of its own, who has one, and so on."""
    if depth:
        process = multiprocessing.get_context("spawn").Process(
            target=attend_with_pools, args=(pipe, busy, depth - 1)
        )
        process.start()
    attend(pipe, busy)


def load_data(pipe: str, busy: bool) -> None:
    """The life of a worker of a DataLoader's whose data takes its time (torch/utils/data/_utils/worker.py)."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, b"pt_data_worker", 0, 0, 0)
    attend(pipe, busy)


def hold_segment(name: str, pipe: str) -> None:
    """Keep a shared memory segment mapped."""
    segment = shared_memory.SharedMemory(name=name)
    memory: Any = segment.buf
    memory[0] = 1
    stage.report(pipe)
    stage.hold()


def unregister(words: list[str]) -> None:
    agent.unregister()
    stage.answer(lineage=os.environ.get("REAPER_LINEAGE"))


class Troupe:
    """The workers of one script. Each method named as a kind starts them; what it returns is kept until the end."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.busy: bool = options.busy
        self.count: int = options.workers
        self.context: Any = multiprocessing.get_context(options.method)
        self.muster = stage.Muster()
        self.facts: dict[str, Any] = {}
        self.kept: list[Any] = []

    def task(self) -> tuple[str, str, bool]:
        return self.muster.pipe, self.muster.release_pipe, self.busy

    def ready(self) -> None:
        """Wait for all workers; idle ones then go back to their pool."""
        self.muster.wait(self.count)
        if not self.busy:
            self.muster.release(self.count)

    # -- kinds that return at once, with their workers up

    def pool(self) -> None:
        pool = self.context.Pool(self.count)
        results = [pool.apply_async(stage.work, self.task()) for _ in range(self.count)]
        self.kept += [pool, results]
        self.ready()

    def executor(self) -> None:
        executor = concurrent.futures.ProcessPoolExecutor(self.count, mp_context=self.context)
        results = [executor.submit(stage.work, *self.task()) for _ in range(self.count)]
        self.kept += [executor, results]
        self.ready()

    def process(self) -> None:
        for _ in range(self.count):
            process = self.context.Process(target=attend, args=(self.muster.pipe, self.busy), daemon=True)
            process.start()
            self.kept.append(process)
        self.muster.wait(self.count)

    def nested(self) -> None:
        """A worker, which has one of its own, and so on."""
        arguments = (self.muster.pipe, self.busy, self.count - 1)
        process = self.context.Process(target=attend_with_pools, args=arguments)
        process.start()
        self.kept.append(process)
        self.muster.wait(self.count)

    def shared_memory(self) -> None:
        segment = shared_memory.SharedMemory(create=True, size=8 << 20)
        memory: Any = segment.buf
        memory[:4096] = b"\1" * 4096
        for _ in range(self.count):
            arguments = (segment.name, self.muster.pipe)
            process = self.context.Process(target=hold_segment, args=arguments, daemon=True)
            process.start()
            self.kept.append(process)
        self.kept.append(segment)
        self.facts["shm"] = [f"/dev/shm/{segment.name}"]
        self.muster.wait(self.count)

    def forkserver(self) -> None:
        """Only the server; ``fork`` on stdin has it start workers."""
        self.context = multiprocessing.get_context("forkserver")
        once = self.context.Process(target=os.getpid)
        once.start()
        once.join()

    def loky(self) -> None:
        from joblib.externals.loky import get_reusable_executor

        self.reuse(get_reusable_executor)

    def loky_alone(self) -> None:
        """The package itself, not what joblib has of it."""
        from loky import get_reusable_executor

        self.reuse(get_reusable_executor)

    def reuse(self, get_executor: Any) -> None:
        executor = get_executor(self.count, timeout=300)
        self.kept += [executor.submit(stage.work, *self.task()) for _ in range(self.count)]
        self.ready()

    def like_a_dataloader(self) -> None:
        """What torch's DataLoader makes of a process, without torch: forked, named in its main thread, and held up by its data."""
        self.context = multiprocessing.get_context("fork")
        for _ in range(self.count):
            process = self.context.Process(target=load_data, args=(self.muster.pipe, self.busy), daemon=True)
            process.start()
            self.kept.append(process)
        self.muster.wait(self.count)

    def dataloader(self) -> None:
        from torch.utils.data import DataLoader, Dataset

        pipe, busy = self.muster.pipe, self.busy

        class Slow(Dataset):  # type: ignore[misc,type-arg]
            def __len__(self) -> int:
                return 100

            def __getitem__(self, index: int) -> int:
                attend(pipe, busy)
                return index

        loader = DataLoader(Slow(), batch_size=1, num_workers=self.count)
        self.kept.append(iter(loader))
        self.muster.wait(self.count)

    def torch_process(self) -> None:
        import torch.multiprocessing

        self.context = torch.multiprocessing.get_context("spawn")
        self.process()

    # -- kinds whose main thread stays in joblib

    def joblib(self, backend: str) -> None:
        from joblib import Parallel, delayed

        if self.busy:
            stage.serve_beside(self.ready_and_announce)
            Parallel(self.count, backend=backend)(
                delayed(stage.work)(*self.task()) for _ in range(self.count)
            )
            return
        parallel = Parallel(self.count, backend=backend)
        parallel.__enter__()  # the pool of the multiprocessing backend lives as long as this context
        self.kept.append(parallel)
        threading.Thread(target=self.ready).start()
        parallel(delayed(stage.work)(*self.task()) for _ in range(self.count))

    def memmap(self) -> None:
        import numpy
        from joblib import Parallel, delayed

        array = numpy.random.default_rng(1).random((3 << 20) - 1000)  # 24 MB
        stage.serve_beside(self.ready_and_announce)
        Parallel(self.count)(delayed(work_on)(array, *self.task()) for _ in range(self.count))

    def ready_and_announce(self) -> None:
        self.ready()
        self.facts["shm"] = glob.glob(f"/dev/shm/joblib_memmapping_folder_{os.getpid()}_*")
        stage.announce(**self.facts)

    def fork_more(self, words: list[str]) -> None:
        """Start workers now, from whatever this script already has."""
        del words
        before = set(stage.descendants(os.getpid()))
        self.process()
        stage.answer(pids=[pid for pid in stage.descendants(os.getpid()) if pid not in before])


KINDS = (
    "pool",
    "executor",
    "process",
    "nested",
    "shared-memory",
    "forkserver",
    "loky",
    "loky-alone",
    "like-a-dataloader",
    "dataloader",
    "torch-process",
    "memmap",
    "joblib-loky",
    "joblib-mp",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--method", choices=("fork", "spawn", "forkserver"), default="fork")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--late", action="store_true", help="register only once the workers are there")
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--busy", action="store_true")
    load.add_argument("--idle", dest="busy", action="store_false")
    options = parser.parse_args()
    if not options.late:
        agent.register(options.kind)
    troupe = Troupe(options)
    if options.kind in ("joblib-loky", "joblib-mp"):
        troupe.joblib({"joblib-loky": "loky", "joblib-mp": "multiprocessing"}[options.kind])
    else:
        getattr(troupe, options.kind.replace("-", "_"))()
    if options.late:
        agent.register(options.kind)
    stage.announce(**troupe.facts)
    stage.live({"fork": troupe.fork_more, "unregister": unregister})
    sys.stdout.flush()


if __name__ == "__main__":
    main()
