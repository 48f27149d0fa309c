"""Runs scikit-learn's own tests of callbacks with Reaper's callback in each of theirs, and Reaper's joblib backend as the default.

    sklearn_suite.py DIRECTORY [OPTIONS OF PYTEST ...]

A copy of sklearn/callback/tests is made in DIRECTORY. In it, the callback that records is ``ReportProgress`` as well, and
that one is among those that are pickled.
"""

from __future__ import annotations

import os
import shutil
import sys

import foreign_suite
import sklearn.callback

import agent.joblib

NAME = "callback_tests"
BOTH = """
import functools

from agent.sklearn import ReportProgress


def _with_ours(hook):
    @functools.wraps(hook)
    def both(self, estimator, context, **facts):
        getattr(self.__dict__.setdefault("_ours", ReportProgress("both")), hook.__name__)(estimator, context)
        return hook(self, estimator, context, **facts)

    return both


for _name in ("setup", "on_fit_task_begin", "on_fit_task_end", "teardown"):
    setattr(RecordingCallback, _name, _with_ours(getattr(RecordingCallback, _name)))


"""


def copy_tests(directory: str) -> str:
    """Return the folder of the copy."""
    source = os.path.join(os.path.dirname(sklearn.callback.__file__), "tests")
    folder = os.path.join(directory, NAME)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in os.listdir(folder):
        _change(os.path.join(folder, name), "sklearn.callback.tests", NAME)
    following = "class RecordingAutoPropagatedCallback"
    _change(os.path.join(folder, "_utils.py"), following, BOTH + following, times=1)
    factories = "CALLBACK_FACTORIES = ["
    ours = f"from agent.sklearn import ReportProgress\n\n{factories}\n    ReportProgress,"
    _change(os.path.join(folder, "test_pickle.py"), factories, ours, times=1)
    return folder


def _change(path: str, before: str, after: str, times: int | None = None) -> None:
    with open(path, encoding="utf-8") as file:
        text = file.read()
    if times is not None and text.count(before) != times:
        raise SystemExit(
            f"scikit-learn {sklearn.__version__} has other tests: {before!r} is not in {path} as before"
        )
    with open(path, "w", encoding="utf-8") as file:
        file.write(text.replace(before, after))


def main() -> int:
    directory, *options = os.path.abspath(sys.argv[1]), *sys.argv[2:]
    folder = copy_tests(directory)
    # Their workers load what is pickled by the copy's name.
    os.environ["PYTHONPATH"] = directory
    sys.path.insert(0, directory)
    agent.joblib.register(make_default=True)
    return foreign_suite.run(directory, folder, options)


if __name__ == "__main__":
    sys.exit(main())
