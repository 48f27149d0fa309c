"""Runs joblib's own tests of parallel loops with the backend "reaper" among those that they are about.

    joblib_suite.py DIRECTORY [OPTIONS OF PYTEST ...]

A copy of joblib/test/test_parallel.py is made in DIRECTORY, in which one line is changed: there, the backends that have
processes are listed.
"""

from __future__ import annotations

import os
import sys

import foreign_suite
import joblib.test

import agent.joblib

LISTED = 'PROCESS_BACKENDS = ["multiprocessing", "loky"]'


def main() -> int:
    directory, *options = sys.argv[1:]
    with open(
        os.path.join(os.path.dirname(joblib.test.__file__), "test_parallel.py"), encoding="utf-8"
    ) as file:
        source = file.read()
    if source.count(LISTED) != 1:
        print(f"joblib {joblib.__version__} lists its backends otherwise", file=sys.stderr)
        return 2
    # Some of the tests start scripts that name the backend without having registered it.
    with open(os.path.join(directory, "sitecustomize.py"), "w", encoding="utf-8") as file:
        file.write("import agent.joblib\nagent.joblib.register()\n")
    os.environ["PYTHONPATH"] = directory
    copy = os.path.join(directory, "test_parallel.py")
    with open(copy, "w", encoding="utf-8") as file:
        file.write(source.replace(LISTED, LISTED[:-1] + ', "reaper"]'))
    agent.joblib.register()
    return foreign_suite.run(directory, copy, options)


if __name__ == "__main__":
    sys.exit(main())
