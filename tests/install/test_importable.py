"""After `pip install`, plain or editable, `agent` and `reaperd` can be imported and nothing else of this tree can."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# PyPI's python-daemon, which reaperd needs, owns the name `daemon`: what counts is whose a found package is.
LOOK = """
import importlib.metadata, importlib.util, json, sys
files = importlib.metadata.distribution("reaperd").files or []  # packages_distributions() sees none before Python 3.11
owned = {file.parts[0] for file in files}
ours = []
for name in ("agent", "reaperd", "daemon", "config", "packaging", "tests", "docs", "examples"):
    spec = importlib.util.find_spec(name)
    if spec is not None:
        places = [spec.origin or "", *(spec.submodule_search_locations or [])]
        here = [place for place in places if place.startswith(sys.argv[1] + "/") and "/site-packages/" not in place]
        if here or name in owned:
            ours.append(name)
print(json.dumps(ours))
"""


@pytest.fixture(scope="module", params=["plain", "editable"])
def python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment into which this tree, and nothing else, was installed."""
    place = tmp_path_factory.mktemp(request.param)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    interpreter = place / "bin" / "python"
    what = [str(ROOT)] if request.param == "plain" else ["-e", str(ROOT)]
    pip = [sys.executable, "-m", "pip", "--python", interpreter, "install", "-qq", *what]
    done = subprocess.run(pip, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return interpreter


def found_by(python: Path, cwd: Path) -> set[str]:
    done = subprocess.run([python, "-c", LOOK, ROOT], cwd=cwd, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_agent_and_reaperd_are_all_that_can_be_imported(python: Path, tmp_path: Path) -> None:
    assert found_by(python, tmp_path) == {"agent", "reaperd"}


def test_the_same_holds_from_the_root_directory(python: Path) -> None:
    assert found_by(python, Path("/")) == {"agent", "reaperd"}


def test_importing_agent_loads_no_module_of_others(python: Path, tmp_path: Path) -> None:
    code = """import sys; before = set(sys.modules); import agent
print(*{name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"""
    done = subprocess.run(
        [python, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["agent"]


def test_no_folder_that_must_not_be_a_package_has_become_one() -> None:
    for folder in ("daemon", "config", "packaging", "tests"):
        assert not list((ROOT / folder).glob("__init__.py*"))
