"""Shared memory and semaphores where a session's programs must not reach /dev/shm itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kakehashi.session import build_libraries, libraries
from tests.session import sharing

if TYPE_CHECKING:
    from tests.session.real import Person

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to close /dev/shm")

FOLDER = "/dev/shm/kakehashi-test"
PACKAGES = "/mnt/packages"
METHODS = ("fork", "spawn", "forkserver")
RESULTS = {
    "queue": 499500,
    "pool": 328350,
    "lock": 2 * sharing.TURNS,
    "memory": "seen",
    "array": 2000.0,
    "manager": [2, True],
}
# /dev/shm can be walked through, as with a session's walls, but nothing be made there. The
# pipe is open for as long as the resource tracker has it, which outlives the program.
CLOSED = """
folder=$1 found=$2 uid=$3 gid=$4 mode=$5 packages=$6
mount -t tmpfs -o mode="$mode" none /dev/shm
mount -t tmpfs -o mode=0755 none /mnt
mkdir "$folder" /mnt/packages
mkdir "$folder/shm" "$folder/tmp"
chmod -R 0700 "$folder"
chown -R "$uid:$gid" "$folder"
mount --bind "$packages" /mnt/packages
set -o pipefail
status=0
as_person=(setpriv --reuid "$uid" --regid "$gid" --clear-groups -- env -i)
{ "${as_person[@]}" "${@:7}" 2>&1 | cat || status=$?; } 2>/dev/null
find /dev/shm -type f >"$found"
exit $status
"""


@dataclass(frozen=True)
class Run:
    """What a program printed, and what was in /dev/shm when all its processes had ended."""

    status: int
    output: str
    files: list[str]

    @property
    def answer(self) -> Any:
        assert self.status == 0, self.output
        return json.loads(self.output.splitlines()[-1])


@dataclass(frozen=True)
class Account:
    """A person's programs on a node whose /dev/shm is closed."""

    person: Person
    library: Path
    found: Path

    def run(
        self,
        program: str,
        word: str = "",
        *,
        preload: bool = True,
        shm: str | None = f"{FOLDER}/shm",
        mode: str = "0711",
    ) -> Run:
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": f"{FOLDER}/tmp",
            "TMPDIR": f"{FOLDER}/tmp",
            "PYTHONPATH": PACKAGES,
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        if shm is not None:
            environment["KAKEHASHI_SHM"] = shm
        if preload:
            environment["LD_PRELOAD"] = str(self.library)
        words = [f"{name}={value}" for name, value in environment.items()]
        python = str(Path(sys.executable).resolve())
        packages = str(Path(pytest.__file__).parents[1])
        ids = [str(self.person.uid), str(self.person.gid), mode]
        script = ["unshare", "--mount", "--propagation", "private", "bash", "-ec", CLOSED, "closed"]
        command = [*words, python, str(self.person.home / "sharing.py"), program, word]
        done = subprocess.run(
            [*script, FOLDER, str(self.found), *ids, packages, *command],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            cwd="/",
        )
        assert not done.stderr, done.stderr
        return Run(done.returncode, done.stdout, sorted(self.found.read_text().split()))


@pytest.fixture(scope="module")
def account(person: Person, tmp_path_factory: pytest.TempPathFactory) -> Account:
    shutil.copy(sharing.__file__, person.home)
    built = build_libraries.build(person.home / "libexec")
    library = next(path for path in built if path.name == libraries.SHM)
    return Account(person, library, tmp_path_factory.mktemp("shm") / "found")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("program", RESULTS)
def test_multiprocessing_works_without_dev_shm(account: Account, program: str, method: str) -> None:
    done = account.run(program, method)
    assert done.answer == RESULTS[program]
    assert not [name for name in done.files if not name.startswith(FOLDER)]


@pytest.mark.parametrize("program", RESULTS)
def test_without_the_library_it_fails_there(account: Account, program: str) -> None:
    failed = account.run(program, "fork", preload=False)
    assert failed.status != 0
    assert "PermissionError" in failed.output


@pytest.mark.parametrize("strategy", ["file_descriptor", "file_system"])
def test_torch_loads_with_workers(account: Account, strategy: str) -> None:
    done = account.run("torch_loader", strategy)
    assert done.answer is True
    assert not [name for name in done.files if not name.startswith(FOLDER)]
    failed = account.run("torch_loader", strategy, preload=False)
    assert failed.status != 0
    assert "Permission denied" in failed.output


def test_all_files_lie_in_the_folder(account: Account) -> None:
    done = account.run("leave")
    assert done.answer
    assert done.files == [f"{FOLDER}/shm/left", f"{FOLDER}/shm/sem.left"]


def test_pythons_resource_tracker_removes_what_a_killed_program_made(account: Account) -> None:
    done = account.run("tracked")
    assert done.status == 137
    assert done.output.splitlines()[0] == "2"
    assert "leaked shared_memory" in done.output
    assert done.files == []


def test_each_call_answers_as_glibc_does(account: Account) -> None:
    ours = account.run("answers")
    glibcs = account.run("answers", preload=False, mode="1777")
    assert ours.answer == glibcs.answer
    names = {Path(name).name for name in glibcs.files}
    assert names == {"sem.most", "closed", "sem.closed", "masked", "sem.masked"}
    assert ours.files == sorted(f"{FOLDER}/shm/{name}" for name in names)


def test_semaphores_are_counted_as_by_glibc(account: Account) -> None:
    ours = account.run("uses").answer
    assert ours == account.run("uses", preload=False, mode="1777").answer
    assert ours["same address"] is True
    assert ours["closed too often"] == "EINVAL"


def test_nothing_leads_out_of_the_folder(account: Account) -> None:
    assert account.run("tricks", FOLDER).answer == {
        "link": "ELOOP",
        "link made": "ELOOP",
        "semaphore": "ELOOP",
        "semaphore made": "ELOOP",
        "short": "EINVAL",
        "pipe": "EINVAL",
        "folder": "EINVAL",
        "itself": "EINVAL",
        "too long": "ENAMETOOLONG",
        "much too long": "ENAMETOOLONG",
        "room": 0,
    }


def test_without_the_variable_it_is_glibc(account: Account) -> None:
    done = account.run("leave", mode="1777", shm=None)
    assert done.answer
    assert done.files == ["/dev/shm/left", "/dev/shm/sem.left"]


@pytest.mark.parametrize("folder", ["", "shm", "/dev/shm" + 600 * "/folder"])
def test_a_folder_that_cannot_be_is_no_way_back_to_dev_shm(account: Account, folder: str) -> None:
    done = account.run("leave", mode="1777", shm=folder)
    assert done.status != 0
    assert "Function not implemented" in done.output
    assert done.files == []


def test_a_program_that_empties_its_environment_stays_in_the_folder(account: Account) -> None:
    assert account.run("emptied").answer == ["emptied"]


def test_nobody_opens_a_semaphore_that_is_not_whole(account: Account) -> None:
    done = account.run("race")
    assert done.answer == [0, 0, 0, 0]
    assert {Path(name).name for name in done.files} <= {"sem.raced"}


def test_a_child_forked_amid_opening_does_not_hang(account: Account) -> None:
    assert account.run("forks").answer == 0
