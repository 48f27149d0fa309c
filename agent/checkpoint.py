"""Fits that are kept on disk: a search, a cross-validation or a pipeline that was interrupted does only what was not finished.

    from agent.checkpoint import Checkpointed, checkpointed_search
    search = checkpointed_search(GridSearchCV(model, grid), "checkpoints/risk")

A fit is known again by the estimator's class and parameters, by the data, and by the code: the versions of Python and of the
libraries, and the instructions of a class or function of one's own (not of what it calls). A finished fit is a file that was
renamed into place: whatever was killed in mid-write is not there. Files are pickles: keep them where nobody else can write.
Needs the extra ``train``.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import os
import pickle
import platform
import stat
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import cloudpickle
import joblib
import numpy
import sklearn
from sklearn.base import BaseEstimator, MetaEstimatorMixin, clone
from sklearn.utils.metadata_routing import MetadataRouter, MethodMapping
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted

from agent.limits import is_estimator

try:
    from sklearn.callback import CallbackSupportMixin, with_callbacks
except ImportError:  # before scikit-learn 1.9

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """There is nothing to support."""

    def with_callbacks(method: Any) -> Any:
        """Return ``method`` as it is."""
        return method


_FORMAT = 2
_SUFFIX = ".fit"
_UNFINISHED = ".unfinished-"
_STALE_S = 3600.0  # what has been written for so long was left by somebody who was killed
_METHODS = ("predict", "predict_proba", "predict_log_proba", "decision_function", "transform", "inverse_transform", "score_samples")  # fmt: skip


class UncheckpointedWarning(UserWarning):
    """A fit is not kept, and the text says why: done again, it would not give the same."""


def _has(name: str) -> Any:
    def check(self: Checkpointed) -> bool:
        getattr(getattr(self, "estimator_", self.estimator), name)  # raises what says why it is not there
        return True

    return check


class Checkpointed(CallbackSupportMixin, MetaEstimatorMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """``estimator``, of which each finished fit is kept below ``location``, and taken from there instead of being done again.

    ``location`` is a folder, made if need be, which nobody but this user (or root) may write. ``max_bytes`` bounds what is
    kept: the fits that were not used for the longest go first; None: all stay. ``estimator_`` is the fitted estimator, and
    ``from_checkpoint_`` says whether it was kept.

    An estimator that draws at random without a seed (``random_state`` None, or a generator, anywhere in it) is fitted anew each
    time, with an UncheckpointedWarning.
    """

    def __init__(
        self, estimator: Any, location: str | os.PathLike[str], max_bytes: int | None = 4 * 1024**3
    ) -> None:
        self.estimator = estimator
        self.location = location
        self.max_bytes = max_bytes

    @with_callbacks  # type: ignore[untyped-decorator]
    def fit(self, X: Any, y: Any = None, **fit_params: Any) -> Checkpointed:
        """Fit the estimator, or take the finished fit of the same one to the same data. OSError where it cannot be kept."""
        if not hasattr(self, "_init_callback_context"):
            self._fit(None, X, y, fit_params)
            return self
        whole = self._init_callback_context(max_subtasks=1)
        whole.call_on_fit_task_begin(estimator=self, X=X, y=y)
        part = whole.subcontext(task_name="fit")
        part.call_on_fit_task_begin(estimator=self, X=X, y=y)
        self._fit(part, X, y, fit_params)
        part.call_on_fit_task_end(estimator=self, X=X, y=y)
        whole.call_on_fit_task_end(estimator=self, X=X, y=y)
        return self

    def _fit(self, context: Any, X: Any, y: Any, fit_params: dict[str, Any]) -> None:
        unseeded = _unseeded(self.estimator)
        if unseeded:
            reason = f"{unseeded} is not a number, so a second fit is another"
            self._fit_without(context, X, y, fit_params, reason)
            return
        folder = _Folder(os.fspath(self.location), self.max_bytes)
        try:
            key = key_of(self.estimator, X, y, fit_params)
        except (pickle.PicklingError, TypeError, AttributeError, ValueError) as error:
            self._fit_without(context, X, y, fit_params, f"it cannot be told from another: {error}")
            return
        kept = folder.load(key)
        self.from_checkpoint_ = kept is not None
        if kept is None:
            kept = self._fitted_anew(context, X, y, fit_params)
            folder.store(key, kept)
        self.estimator_ = kept

    def _fit_without(self, context: Any, X: Any, y: Any, fit_params: dict[str, Any], reason: str) -> None:
        name = type(self.estimator).__name__
        warnings.warn(f"{name} is not checkpointed: {reason}", UncheckpointedWarning, stacklevel=5)
        self.estimator_ = self._fitted_anew(context, X, y, fit_params)
        self.from_checkpoint_ = False

    def _fitted_anew(self, context: Any, X: Any, y: Any, fit_params: dict[str, Any]) -> Any:
        one = clone(self.estimator)
        if context is None:
            return one.fit(X, y, **fit_params)
        with context.propagate_callback_context(one):
            return one.fit(X, y, **fit_params)

    @available_if(_has("score"))  # type: ignore[untyped-decorator]
    def score(self, X: Any, y: Any = None, **params: Any) -> Any:
        """Return what the estimator's own ``score`` does."""
        check_is_fitted(self)
        return self.estimator_.score(X, y, **params)

    @available_if(_has("fit_transform"))  # type: ignore[untyped-decorator]
    def fit_transform(self, X: Any, y: Any = None, **fit_params: Any) -> Any:
        """Fit, and return what the fitted estimator makes of the same data."""
        return self.fit(X, y, **fit_params).transform(X)

    @available_if(_has("fit_predict"))  # type: ignore[untyped-decorator]
    def fit_predict(self, X: Any, y: Any = None, **fit_params: Any) -> Any:
        """Fit, and return the labels of the same data."""
        fitted = self.fit(X, y, **fit_params).estimator_
        return fitted.labels_ if hasattr(fitted, "labels_") else fitted.predict(X)

    def __getattr__(self, name: str) -> Any:
        """Return what the fitted estimator has learned (``classes_``, ``best_params_``, ...)."""
        if name.endswith("_") and not name.startswith("_") and "estimator_" in self.__dict__:
            return getattr(self.estimator_, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __sklearn_is_fitted__(self) -> bool:
        """Say whether ``fit`` has been called."""
        return "estimator_" in self.__dict__

    def __sklearn_tags__(self) -> Any:
        """Return what the estimator can do."""
        from sklearn.utils import get_tags

        return get_tags(self.estimator)

    def get_metadata_routing(self) -> Any:
        """Return where metadata go: all of it to the estimator (scikit-learn's user guide, metadata routing)."""
        mapping = MethodMapping()
        for method in ("fit", "score", *_METHODS):
            mapping.add(caller=method, callee=method)
        return MetadataRouter(owner=self).add(estimator=self.estimator, method_mapping=mapping)


def _delegated(name: str) -> Any:
    def method(self: Checkpointed, X: Any, **params: Any) -> Any:
        check_is_fitted(self)
        return getattr(self.estimator_, name)(X, **params)

    method.__name__ = name
    method.__doc__ = f"Return what the estimator's own ``{name}`` does."
    return available_if(_has(name))(method)


for _name in _METHODS:
    setattr(Checkpointed, _name, _delegated(_name))


def checkpointed_search(
    search: Any, location: str | os.PathLike[str], max_bytes: int | None = 4 * 1024**3
) -> Any:
    """Return a copy of a search (GridSearchCV, RandomizedSearchCV, a halving one) whose fits are kept below ``location``.

    Its grid stays as it is written: ``max_depth`` is rewritten to ``estimator__max_depth``, as it is called one level down.
    UncheckpointedWarning for a search that would draw other candidates, or other splits, when it is run again. TypeError for
    what is no search.
    """
    parameters = search.get_params(deep=False)
    grid = next((name for name in ("param_grid", "param_distributions") if name in parameters), None)
    if grid is None or "estimator" not in parameters:
        raise TypeError(f"a search with an estimator and a grid is wanted, got {type(search).__name__}")
    for what in (search, parameters.get("cv")):
        unseeded = _unseeded_itself(what)
        if unseeded:
            warnings.warn(
                f"{type(what).__name__} draws anew each time ({unseeded} is not a number): little of it is found again",
                UncheckpointedWarning,
                stacklevel=2,
            )
    _Folder(os.fspath(location), max_bytes)  # what is wrong with it is said here, not by each of the fits
    kept = clone(search)
    return kept.set_params(
        estimator=Checkpointed(kept.estimator, location, max_bytes),
        **{grid: _one_level_down(parameters[grid])},
    )


def _one_level_down(grid: Any) -> Any:
    if isinstance(grid, (list, tuple)):
        return [_one_level_down(one) for one in grid]
    return {f"estimator__{name}": values for name, values in grid.items()}


# -- what tells one fit from another --------------------------------------------------------------


def key_of(estimator: Any, X: Any, y: Any, fit_params: dict[str, Any]) -> str:
    """Return the name under which a fit is kept: equal for two that give the same."""
    parts: list[Any] = [_FORMAT, platform.python_version(), sklearn.__version__, numpy.__version__]
    for one in _nested(estimator):
        kind = type(one)
        parts.append((f"{kind.__module__}.{kind.__qualname__}", _code_of(kind)))
        for name, value in sorted(one.get_params(deep=False).items()):
            if not is_estimator(value):
                parts.append((name, _described(value)))
    parts.append(joblib.hash((X, y, fit_params), hash_name="sha1"))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _nested(value: Any) -> Iterator[Any]:
    """Yield an estimator and all in it, in the order of their names."""
    yield value
    for _, parameter in sorted(value.get_params(deep=False).items()):
        yield from _estimators_in(parameter)


def _estimators_in(value: Any) -> Iterator[Any]:
    if is_estimator(value):
        yield from _nested(value)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _estimators_in(one)


def _described(value: Any) -> Any:
    """Return what tells a parameter's value from another: of steps the names alone, for the steps are listed by themselves."""
    if is_estimator(value):
        return "an estimator"
    if isinstance(value, (list, tuple)):
        return [_described(one) for one in value]
    return _described_call(value, ()) if callable(value) else joblib.hash(value, hash_name="sha1")


def _described_call(value: Any, above: tuple[int, ...]) -> Any:
    """Return what tells a function from another: its code, and what it was made with. PicklingError, TypeError."""
    if id(value) in above:  # a function that calls itself
        return "itself"

    def of(one: Any) -> Any:
        return _described_call(one, (*above, id(value))) if callable(one) else _described(one)

    named = (getattr(value, "__module__", ""), getattr(value, "__qualname__", ""))
    if isinstance(value, type):
        return (*named, _code_of(value))
    if isinstance(value, functools.partial):
        return "partial", of(value.func), of(list(value.args)), [*map(of, sorted(value.keywords.items()))]
    if isinstance(value, types.MethodType):
        return "method", of(value.__func__), joblib.hash(value.__self__, hash_name="sha1")
    if isinstance(value, types.FunctionType):
        cells = [of(one) for one in inspect.getclosurevars(value).nonlocals.values()]
        defaults = [*(value.__defaults__ or ()), *sorted((value.__kwdefaults__ or {}).items())]
        return (*named, _code_of(value), cells, [*map(of, defaults)])
    # Of a library's own (a ufunc, a scorer), and callable objects: what they hold.
    return (*named, _code_of(type(value)), joblib.hash(value, hash_name="sha1"))


def _code_of(value: Any) -> str:
    """Return the version of the library that a class or function is of, or its instructions where it is of none."""
    module = sys.modules.get(getattr(value, "__module__", None) or "")
    package = (getattr(module, "__name__", "") or "").partition(".")[0]
    if package in sys.stdlib_module_names and package != "__main__":
        return package
    for distribution in _distributions().get(package, ()):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return f"{distribution} {metadata.version(distribution)}"
    # Not the source: a worker that was sent a class of __main__ has none of it.
    if isinstance(value, type):
        members = sorted(value.__dict__.items())
        return repr(
            [(name, told) for name, one in members if (told := _instructions_of(one))]
            + [_code_of(base) for base in value.__bases__]
        )
    return repr(_instructions_of(value))


def _instructions_of(value: Any) -> Any:
    """Return what a function does, or what a constant is; None for anything else."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, functools.partial):
        return _instructions_of(value.func), repr(value.args), repr(value.keywords)
    code = getattr(value, "__code__", value)
    if isinstance(code, types.CodeType):
        constants = [_instructions_of(one) for one in code.co_consts]
        return code.co_code, constants, code.co_names, repr(getattr(value, "__defaults__", None))
    return repr(value) if isinstance(value, (int, float, complex, str, bytes, tuple, frozenset)) else None


def _distributions() -> dict[str, list[str]]:
    global _of_packages
    if _of_packages is None:
        _of_packages = {name: sorted(set(found)) for name, found in metadata.packages_distributions().items()}
    return _of_packages


_of_packages: dict[str, list[str]] | None = None


def _unseeded(estimator: Any) -> str:
    """Return the name of a parameter that makes each fit another, "" where there is none."""
    return next((name for one in _nested(estimator) if (name := _unseeded_itself(one))), "")


def _unseeded_itself(one: Any) -> str:
    """Return "random_state" where ``one`` has that, and it is no number; a splitter that does not shuffle has no use for it."""
    if one is None or isinstance(one, (int, str)) or getattr(one, "shuffle", True) is False:
        return ""
    seed = getattr(one, "random_state", 0)
    return "" if isinstance(seed, (int, numpy.integer)) else "random_state"


# -- the files ------------------------------------------------------------------------------------


class _Folder:
    """Where fits are kept."""

    def __init__(self, path: str, max_bytes: int | None) -> None:
        os.makedirs(path, mode=0o700, exist_ok=True)
        found = os.stat(path)
        if found.st_uid not in (0, os.geteuid()) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(
                f"{path}: others may write there, and a pickle of theirs would be run: give it mode 0700, and to this user"
            )
        self._path, self._max_bytes = path, max_bytes

    def load(self, key: str) -> Any:
        """Return a fit, None where there is none that can be read."""
        path = os.path.join(self._path, key + _SUFFIX)
        try:
            with open(path, "rb") as file:
                kept = pickle.load(file)  # noqa: S301 - the folder is ours alone
        except FileNotFoundError:
            return None
        except Exception as error:  # noqa: BLE001 - whatever a damaged pickle raises
            warnings.warn(f"cannot read {path}: {error!r}; it is fitted anew", RuntimeWarning, stacklevel=3)
            return None
        with contextlib.suppress(OSError):  # another process may have dropped it
            os.utime(path)
        return kept

    def store(self, key: str, fitted: Any) -> None:
        """Keep a fit: whole, or not at all."""
        descriptor, beside = tempfile.mkstemp(prefix=_UNFINISHED, dir=self._path)
        try:
            with open(descriptor, "wb") as file:
                # A class of __main__ goes with it: a worker cannot import that.
                cloudpickle.dump(fitted, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, os.path.join(self._path, key + _SUFFIX))
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(beside)
            raise
        self._tidy()

    def _tidy(self) -> None:
        """Drop what was left unfinished, and what is too much."""
        kept, now_s = [], time.time()
        for entry in os.scandir(self._path):
            with contextlib.suppress(OSError):  # another process tidies, too
                found = entry.stat(follow_symlinks=False)
                if entry.name.startswith(_UNFINISHED):
                    if now_s - found.st_mtime > _STALE_S:
                        os.unlink(entry.path)
                elif entry.name.endswith(_SUFFIX):
                    kept.append((found.st_mtime, found.st_size, entry.path))
        if self._max_bytes is None:
            return
        over_bytes = sum(size for _, size, _ in kept) - self._max_bytes
        for _, size, path in sorted(kept):
            if over_bytes <= 0:
                break
            with contextlib.suppress(OSError):
                os.unlink(path)
            over_bytes -= size
