"""``python -m agent [--name NAME] SCRIPT ARGS...``: registers a script that is not to be edited, and runs it as Python would."""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import runpy
import sys
import types

import agent


def main(argv: list[str]) -> None:
    """Run what ``argv`` says; what it raises, SystemExit among it, goes on to whoever called."""
    parser = argparse.ArgumentParser(
        prog="python -m agent",
        usage="python -m agent [--name NAME] (SCRIPT | -m MODULE) [ARGS ...]",
        description="Run a Python script or module as the leader of a session: when it dies, Reaper ends all that it started.",
        allow_abbrev=False,
    )
    parser.add_argument("--name", metavar="NAME", help="what people see, the script's name by default")
    parser.add_argument("-m", dest="module", metavar="MODULE", nargs=argparse.REMAINDER, help="run a module")
    parser.add_argument("script", metavar="SCRIPT", nargs="?", help="the script")
    parser.add_argument("args", metavar="ARGS", nargs=argparse.REMAINDER, help="its own arguments")
    options = parser.parse_args(argv)
    if options.module is not None:
        if not options.module:
            parser.error("-m: which module?")
        module, *rest = options.module
        sys.argv = [module, *rest]
        if not _is_there(module):
            parser.exit(1, f"{sys.executable}: No module named {module}\n")  # as Python says it
        _register(parser, options.name or module)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif options.script is None:
        parser.error("which script?")
    else:
        _run_script(parser, options)


def _run_script(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    try:
        with io.open_code(os.path.abspath(options.script)) as file:
            source = file.read()
    except OSError as error:
        parser.error(f"{options.script}: {error.strerror}")
    sys.argv = [options.script, *options.args]
    sys.path[0] = os.path.dirname(os.path.realpath(options.script))
    _register(parser, options.name)
    # Spawned workers import the script by the file of this module, and unpickle what it defines from this name.
    script = types.ModuleType("__main__")
    path = os.path.abspath(options.script)
    script.__dict__.update(__file__=path, __builtins__=__builtins__, __spec__=None)
    sys.modules["__main__"] = script
    exec(compile(source, path, "exec"), script.__dict__)  # noqa: S102 - it is what was asked for


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # of a package above it
        return False


def _register(parser: argparse.ArgumentParser, name: str | None) -> None:
    try:
        agent.register(name)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
