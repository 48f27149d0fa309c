"""What Celery works on, with a pool of joblib's in each of its own pool's processes."""

from __future__ import annotations

import os
from typing import Any

import trainer
from celery import Celery, signals  # type: ignore[import-not-found]

app = Celery("tasks", broker="memory://")


def begin(**_: Any) -> None:
    trainer.train_within("loky", os.getppid())


signals.worker_process_init.connect(begin)
