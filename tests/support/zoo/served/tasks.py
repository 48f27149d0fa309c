"""What Celery works on, with a pool of joblib's in each of its own pool's processes."""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

import trainer
from celery import Celery, signals  # type: ignore[import-not-found]

app = Celery("tasks", broker="memory://")


def begin(**_: Any) -> None:
    # Without it a process of Celery's pool may have no children: what is found in many a project.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    trainer.train_within("loky", os.getppid())


signals.worker_process_init.connect(begin)
