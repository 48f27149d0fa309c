"""``reaperctl doctor``: whether this machine lets Reaper do its work, and what to do where it does not."""

from __future__ import annotations

import sys
from argparse import Namespace
from textwrap import wrap

from reaperd.ctl import DONE, FAILED, check_kernel, check_setup
from reaperd.ctl.findings import LIMIT, OK, PROBLEM, Finding, run
from reaperd.ctl.terminal import look_of_stdout, put, put_json
from reaperd.ctl.text import Look, plain
from reaperd.ctl.units import plural


def doctor(options: Namespace) -> int:
    """Run every check and print what it found; fail on a problem, not on a limit."""
    found = examine(options)
    healthy = all(finding.level != PROBLEM for finding in found)
    if options.json:
        put_json({"ok": healthy, "checks": [_document(finding) for finding in found]})
    else:
        put(report(found, look_of_stdout()))
    return DONE if healthy else FAILED


def examine(options: Namespace) -> list[Finding]:
    """Return one finding a check. The kernel's come first: they fork, which is best done before libzmq has threads."""
    kernel = run("kernel", check_kernel.kernel)
    if kernel.level == PROBLEM:
        return [kernel]
    proc = run("pids", check_kernel.own_proc)
    if proc.level == PROBLEM:
        return [kernel, proc]
    module = run("agent module", check_setup.agent_module)
    if module.level == PROBLEM:
        # A stranger's module must not run because a check imports it: from here on `import agent` fails.
        sys.modules["agent"] = None  # type: ignore[assignment]
    checks = [*check_kernel.CHECKS, *check_setup.checks(options)]
    return [kernel, proc, module, *(run(subject, check) for subject, check in checks)]


def _document(finding: Finding) -> dict[str, str | None]:
    return {
        "check": finding.subject,
        "level": finding.level.lower(),
        "fact": finding.fact,
        "advice": finding.advice or None,
    }


# -- on paper -------------------------------------------------------------------------------------

_COLOURS = {OK: "green", LIMIT: "yellow", PROBLEM: "red"}
_MARGIN = 9 + 19  # the level and the subject, each with its gap


def report(found: list[Finding], look: Look) -> list[str]:
    """Return one line a finding, longer ones wrapped, what to do below it, and the sum of it."""
    lines = []
    for finding in found:
        level = look.paint(f"{finding.level:<9}", _COLOURS[finding.level])
        first, *rest = _wrapped(finding.fact, look)
        lines.append(f"{level}{finding.subject:<19}{first}")
        lines += [" " * _MARGIN + line for line in rest]
        if finding.advice:
            lines += [" " * _MARGIN + line for line in _wrapped(f"-> {finding.advice}", look)]
    return [*lines, "", summary(found)]


def _wrapped(text: str, look: Look) -> list[str]:
    if look.width is None:
        return [plain(text)]
    return wrap(plain(text), max(look.width - _MARGIN, 20), break_on_hyphens=False) or [""]


def summary(found: list[Finding]) -> str:
    """Return how many checks found what."""
    problems = sum(finding.level == PROBLEM for finding in found)
    limits = sum(finding.level == LIMIT for finding in found)
    if not problems and not limits:
        return "all is well"
    return f"{plural(problems, 'problem')} and {plural(limits, 'limit')}: what to do stands below each"
