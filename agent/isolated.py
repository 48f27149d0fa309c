"""How a module is run in a process of its own by this very Python, out of reach of the working directory and of ``PYTHON*``.

``python -I`` alone leaves the user's own site directory out as well, and what was installed with ``pip install --user`` would
be found by this process and not by that one.
"""

from __future__ import annotations

import os
import site
import sys

# It is told where that directory is: under -I it is not to be looked up in the environment.
_WITH_USER_SITE = (
    "import runpy, site, sys; site.addsitedir(sys.argv.pop(1)); "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


def run_module(module: str, *arguments: str, python: str | None = None) -> list[str]:
    """Return the command that runs ``module`` with ``python``, this process's own by default, and finds what this process finds."""
    python = python or sys.executable
    users = _user_site()
    if users is None:
        return [python, "-I", "-m", module, *arguments]
    return [python, "-I", "-c", _WITH_USER_SITE, users, module, *arguments]


def _user_site() -> str | None:
    """Return the user's own site directory where this process imports from it, else None."""
    try:
        found = os.path.abspath(site.getusersitepackages())
    except (OSError, KeyError, TypeError):  # a uid without a home
        return None
    return found if found in sys.path else None
