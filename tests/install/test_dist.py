"""What is published: the source distribution and the wheel that `make dist` builds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import staged
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from staged import ROOT

import reaperd

PAGES = {
    *("man/man1/reaperctl.1", "man/man5/reaper.toml.5", "man/man8/reaperd.8"),
    *("bash-completion/completions/reaperctl", "bash-completion/completions/reaperd"),
    *("zsh/site-functions/_reaperctl", "zsh/site-functions/_reaperd"),
    *("fish/vendor_completions.d/reaperctl.fish", "fish/vendor_completions.d/reaperd.fish"),
}


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("dist")
    # The environment that the tests run in is there: it is not to be prepared again.
    staged.make("dist", Path(), f"BIN={os.path.dirname(sys.executable)}", "STAMP=", f"DIST={target}")
    return target


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    return dist / f"reaperd-{reaperd.__version__}-py3-none-any.whl"


@pytest.fixture(scope="module")
def sdist(dist: Path) -> Path:
    return dist / f"reaperd-{reaperd.__version__}.tar.gz"


def test_a_wheel_and_a_source_distribution_are_made_and_nothing_else(
    dist: Path, wheel: Path, sdist: Path
) -> None:
    assert sorted(dist.iterdir()) == sorted((wheel, sdist))


def test_the_tree_and_the_source_distribution_give_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    # `make dist` builds the wheel out of the source distribution.
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, ROOT]
    subprocess.run(build, stdout=subprocess.DEVNULL, check=True)
    assert (tmp_path / wheel.name).read_bytes() == wheel.read_bytes()


def test_what_the_image_is_built_of_gives_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    let_in = re.findall(
        r"^!(.*)$", (ROOT / "packaging/docker/Dockerfile.dockerignore").read_text(), re.MULTILINE
    )
    context = tmp_path / "context"
    for name in let_in:
        copy, source = context / name, ROOT / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():  # wheels are there where no index is asked
            shutil.copy(source, copy)
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, context]
    subprocess.run(build, stdout=subprocess.DEVNULL, check=True)
    assert (tmp_path / wheel.name).read_bytes() == wheel.read_bytes()


def test_the_wheel_holds_both_packages_the_pages_and_nothing_foreign(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    stem = f"reaperd-{reaperd.__version__}"
    modules = {
        str(path.relative_to(base))
        for base, package in ((ROOT, "agent"), (ROOT / "daemon", "reaperd"))
        for path in (base / package).rglob("*")
        if path.suffix in (".py", ".typed", ".tcss")
    }
    about = {
        f"{stem}.dist-info/{name}"
        for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    }
    assert names == modules | about | {f"{stem}.data/data/share/{page}" for page in PAGES}


def test_what_the_wheel_says_of_itself_is_valid_and_whole(wheel: Path) -> None:
    (about,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("/METADATA"))
    found = Metadata.from_email(zipfile.ZipFile(wheel).read(about), validate=True)
    assert (found.name, str(found.version)) == ("reaperd", reaperd.__version__)
    assert found.summary
    assert "\n" not in found.summary
    assert found.description_content_type == "text/markdown"
    assert found.description == (ROOT / "README.md").read_text("utf-8")
    assert found.license_expression == "MIT"
    assert found.requires_dist
    plain = {one.name for one in found.requires_dist if not one.marker or "extra" not in str(one.marker)}
    assert plain == {"jeepney", "psutil", "python-daemon", "pyzmq", "tomli"}
    assert Requirement("tomli>=2; python_version < '3.11'") in found.requires_dist


def test_the_source_distribution_is_the_tree_as_it_is_kept(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        top = f"reaperd-{reaperd.__version__}/"
        found = {one.name.removeprefix(top): one for one in archive if one.isfile()}
    kept = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=False,
    )
    if kept.returncode:
        pytest.skip(f"what is kept is not known: {kept.stderr.strip()}")
    tree = {path for path in kept.stdout.splitlines() if (ROOT / path).exists()}
    assert set(found) - {"PKG-INFO"} == tree - {".ci/run"}
    # What is run by its name must be so from the archive, too.
    assert found["packaging/debian/rules"].mode & 0o111
    assert not [name for name in found if re.search(r"__pycache__|\.pyc$|\.egg-info|(^|/)\.venv", name)]
