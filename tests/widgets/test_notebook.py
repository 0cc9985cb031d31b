"""The worked example runs from top to bottom inside a session, by itself and in the lab."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tests.link.stores import Broker, work_server
from tests.widgets.conftest import Shore
from tests.widgets.session import environment, inside

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
FIRST = NOTEBOOKS / "01_first_look.ipynb"

RUN = """
import sys, nbclient, nbformat
book = nbformat.read(sys.argv[1], 4)
nbclient.NotebookClient(book, timeout=120, resources={"metadata": {"path": sys.argv[2]}}).execute()
nbformat.write(book, sys.argv[3])
"""


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_no_outputs_are_kept_in_the_repository(path: Path) -> None:
    book = nbformat.read(path, 4)
    nbformat.validate(book)
    for cell in book.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    assert "widgets" not in book.metadata


def run(shore: Shore, home: Path, book: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        inside(
            shore.session,
            [
                sys.executable,
                "-c",
                RUN,
                str(book),
                str(shore.session.work),
                str(home / "done.ipynb"),
            ],
        ),
        env=environment(home / "home"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_first_look_runs_from_top_to_bottom(shore: Shore, tmp_path: Path) -> None:
    done = run(shore, tmp_path, FIRST)
    assert done.returncode == 0, done.stderr[-3000:]
    result = (shore.session.work / "alice" / "first_look.txt").read_text().splitlines()
    share = (shore.pack(shore.ct).values() > 300).mean()
    assert result == [shore.ct, f"share of voxels above 300 HU: {share:.4f}"]
    text = (tmp_path / "done.ipynb").read_text()
    assert "image/png" in text
    # What a widget leaves in a notebook is its settings; rows and pixels went another way.
    assert len(text) < 400_000


def test_first_look_runs_where_nothing_is_mounted(shore: Shore, tmp_path: Path) -> None:
    work, path = tmp_path / "work", tmp_path / "work.sock"
    (work / "alice").mkdir(parents=True)
    session = json.loads((shore.session.root / "session.json").read_text())
    session |= {"view": None, "work": None, "work_socket": str(path)}
    session["socket"] = str(shore.session.root / "store.sock")
    (tmp_path / "session.json").write_text(json.dumps(session))
    shutil.copy(shore.session.root / "lease.json", tmp_path)
    broker = Broker(path, work_server(work))
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(FIRST), str(tmp_path), str(tmp_path / "done.ipynb")],
        env=environment(tmp_path / "home") | {"KAKEHASHI_SESSION": str(tmp_path / "session.json")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    broker.close()
    assert done.returncode == 0, done.stderr[-3000:]
    assert (work / "alice" / "first_look.txt").read_text().startswith(shore.ct)
    assert "mounts no view" in (tmp_path / "done.ipynb").read_text()


def test_first_look_outside_of_a_session_says_so(shore: Shore, tmp_path: Path) -> None:
    """The control: without the session's files the same run fails, and names the reason."""
    away = shore.session.root.with_name("nothing")
    away.mkdir(exist_ok=True)
    command = inside(shore.session, [sys.executable, "-c", "from kakehashi import Store; Store()"])
    command[command.index(str(shore.session.root))] = str(away)
    done = subprocess.run(
        command, env=environment(tmp_path / "home"), capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "only available inside a Kakehashi session" in done.stderr
