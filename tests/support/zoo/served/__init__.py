"""What gunicorn serves: each of its workers has a pool of joblib's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    start_response("204 No Content", [])
    return []


if "gunicorn" in os.environ.get("SERVER_SOFTWARE", ""):  # gunicorn/arbiter.py
    import trainer

    trainer.train_within("loky", os.getppid())
