"""What ``make fuzz`` asks of every parser of hostile text, in short, and that a broken promise is noticed."""

from __future__ import annotations

import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fuzzing.target
import pytest
from fuzzing import engine
from fuzzing.alltargets import TARGETS, shares
from fuzzing.dice import Dice
from fuzzing.mutate import KINDS, Change, changed, random_changes
from fuzzing.target import MAX_GROWTH_BYTES, Target, TooMuch, bounded, stateless
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

RUN = Path(__file__).resolve().parents[1] / "fuzz" / "run.py"
EXAMPLES = 100  # of each target; fewer where one takes long

CHANGES = st.lists(
    st.builds(Change, st.sampled_from(KINDS), st.integers(0, 12) | st.integers(0, 4200), st.integers(0, 255), st.binary(min_size=1, max_size=9)),
    max_size=6,
)  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_text_breaks_no_promise_of_its_parser(name: str) -> None:
    target = TARGETS[name]
    seeds = target.seeds()

    with bounded(target) as check:

        @settings(
            max_examples=max(15, EXAMPLES // target.cost),
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=[HealthCheck.too_slow],
        )
        @given(st.sampled_from(seeds), CHANGES)
        def holds(seed: bytes, changes: list[Change]) -> None:
            check(changed(seed, changes, target.words, target.longest))

        for seed in seeds:
            check(seed[: target.longest])
        holds()


def test_every_seed_of_a_target_is_short_enough_to_be_one() -> None:
    assert {name: [seed for seed in target.seeds() if not seed] for name, target in TARGETS.items()} == {
        name: [] for name in TARGETS
    }
    for target in TARGETS.values():
        assert all(len(seed) <= 2 * target.longest for seed in target.seeds()), target.name


def test_the_inputs_of_a_run_are_shared_out_among_the_targets() -> None:
    targets = list(TARGETS.values())
    for runs in (1000, 100_000, 1_000_000):
        found = shares(runs, targets)
        assert sum(found.values()) == runs
        assert min(found.values()) >= 1
    assert shares(100_000, targets)["message"] > shares(100_000, targets)["store-file"]


# -- what a check must notice ---------------------------------------------------------------------


def of(check: Callable[[bytes], None]) -> Target:
    return Target("planted", stateless(check), lambda: [b"x"])


def test_an_input_that_takes_long_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzing.target, "MAX_CPU_S", 0.02)

    def spin(data: bytes) -> None:
        end_s = time.process_time() + 0.03
        while time.process_time() < end_s:
            pass

    with bounded(of(spin)) as check, pytest.raises(TooMuch, match=r"s of CPU for 1 bytes"):
        check(b"x")


def test_an_input_that_takes_much_memory_is_noticed() -> None:
    def grow(data: bytes) -> None:
        # The most that was ever taken is what counts, and this process may have had much already.
        assert b"\1" * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + 2 * MAX_GROWTH_BYTES)

    with bounded(of(grow)) as check, pytest.raises(TooMuch, match="bytes of memory for 1 bytes"):
        check(b"x")


def test_the_engine_keeps_what_breaks_a_promise_and_repeats_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(data: bytes) -> None:
        assert data[:1] != b"{", "planted"

    monkeypatch.setitem(TARGETS, "message", TARGETS["message"]._replace(opened=stateless(fail)))
    work = engine.Work("message", 100, 1, str(tmp_path), "")
    with pytest.raises(SystemExit) as left:
        engine.by_chance(work)
    assert left.value.code == engine.FOUND
    assert "AssertionError: planted" in capsys.readouterr().err
    (kept,) = tmp_path.iterdir()
    with pytest.raises(AssertionError, match="planted"):
        engine.repeat(str(kept))
    monkeypatch.undo()
    engine.repeat(str(kept))
    assert capsys.readouterr().out.startswith("message keeps its promises with these")


def test_the_same_seed_makes_the_same_inputs() -> None:
    def some(seed: int) -> list[bytes]:
        chance = random.Random(seed)
        return [changed(b"abc" * 9, random_changes(chance), (b"word",), 64) for _ in range(200)]

    assert some(7) == some(7)
    assert some(7) != some(8)
    assert len(set(some(7))) > 150
    assert all(len(one) <= 64 for one in some(7))


def test_dice_never_run_out() -> None:
    dice = Dice(b"\xff\x07")
    assert [dice.below(256), dice.below(4), dice.below(9), dice.choose("ab"), dice.rest()] == [
        255,
        3,
        0,
        "a",
        b"",
    ]
    assert not dice


@pytest.mark.parametrize("engine_name", ["chance", "atheris"])
def test_the_command_says_how_much_it_tried_and_with_which_seed(engine_name: str, tmp_path: Path) -> None:
    if engine_name == "atheris":
        pytest.importorskip("atheris", reason="atheris belongs to make fuzz alone")
    command = [sys.executable, str(RUN), "--runs", "60", "--seed", "5", "--engine", engine_name]
    done = subprocess.run(
        [*command, "--target", "id", "--target", "peer", "--findings", str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("seed 5, 60 inputs for 2 targets")
    assert "seed 5: 60 inputs in " in done.stdout
    assert [line.split()[:2] for line in done.stdout.splitlines()[2:4]] == [["id", "30"], ["peer", "30"]]
    assert list(tmp_path.iterdir()) == []
