"""What has failed beside others has one more turn, and no more than that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.run import MOST_AGAIN, REPOSITORY, failed, remembering, settle

TESTS = """
from pathlib import Path

import pytest


def test_always():
    with Path(__file__).with_name("turns").open("a") as turns:
        turns.write("whole\\n")


@pytest.mark.parametrize("number", range({number}))
def test_at_times(number):
    seen = Path(__file__).with_name(f"seen-{{number}}")
    was_there = seen.exists()
    seen.touch()
    assert was_there and not {always}
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="groups in namespaces of their own need root")
@pytest.mark.parametrize(
    ("number", "always", "status", "turns"),
    [
        (0, False, 0, 1),
        (1, False, 0, 1),
        (MOST_AGAIN, False, 0, 1),
        (MOST_AGAIN + 1, False, 1, 1),
        (1, True, 1, 1),
    ],
)
def test_what_failed_has_one_more_turn(
    tmp_path: Path, number: int, always: bool, status: int, turns: int
) -> None:
    (tmp_path / "test_it.py").write_text(TESTS.format(number=number, always=always))
    cache = tmp_path / "cache"
    arguments = [f"--rootdir={tmp_path}", str(tmp_path)]
    first = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, *remembering(cache)],
        cwd=REPOSITORY,
        check=False,
    ).returncode
    assert (first, len(failed(cache))) == (int(number > 0), number)
    assert settle("this", first, arguments, cache) == status
    assert (tmp_path / "turns").read_text().count("whole") == turns
    assert len(failed(cache)) == (number if status else 0)


def test_a_run_that_did_not_end_has_no_other_turn(tmp_path: Path) -> None:
    assert settle("this", 3, [], tmp_path) == 3
