"""Runs a library's own tests, a copy of them that was made in a directory, where they may have as many workers as they like."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest

from agent import limits, session

WORKERS = 16


def run(directory: str, tests: str, options: Sequence[str]) -> int:
    """Return the exit code of pytest on ``tests``, without this project's settings."""
    # What is tested is what comes of a number of workers; that there may be fewer is our own tests' business.
    limits.usable_cpus = lambda: WORKERS
    session.push_limit(WORKERS)
    return int(
        pytest.main(["-c", os.devnull, "--rootdir", directory, "-p", "no:cacheprovider", *options, tests])
    )
