"""Downloads and exports are refused; working with notebooks goes on as ever."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

from tests.widgets.lab import Lab, jupyterlab

NOTEBOOK = "closed.ipynb"


@pytest.fixture
def notebook(lab: Lab) -> Iterator[Path]:
    path = lab.work / NOTEBOOK
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1")]), path)
    (lab.work / "table.csv").write_text("a,b\n1,2\n")
    yield path
    path.unlink()


@pytest.mark.parametrize(
    "path",
    [
        f"files/{NOTEBOOK}",
        f"files/{NOTEBOOK}?download=1",
        "files/table.csv",
        "view/table.csv",
        f"nbconvert/html/{NOTEBOOK}",
        f"nbconvert/script/{NOTEBOOK}?download=true",
        f"notebooks/../files/{NOTEBOOK}",
        f"/files/{NOTEBOOK}",
        f"files//{NOTEBOOK}",
        f"%66iles/{NOTEBOOK}",
    ],
)
def test_no_way_hands_a_file_out(lab: Lab, notebook: Path, path: str) -> None:
    answer = lab.get(path)
    assert answer.status_code in {403, 404}, answer.text[:300]
    assert "1 + 1" not in answer.text
    assert "1,2" not in answer.text


def test_the_refusal_says_why(lab: Lab, notebook: Path) -> None:
    answer = lab.get(f"files/{NOTEBOOK}?download=1")
    assert answer.status_code == 403
    assert "reviewed export" in answer.json()["message"]


def test_no_export_format_is_offered(lab: Lab) -> None:
    assert lab.get("api/nbconvert").json() == {}


def test_a_notebook_cannot_be_posted_for_conversion(lab: Lab, notebook: Path) -> None:
    body = {"name": NOTEBOOK, "content": json.loads(notebook.read_text())}
    assert lab.request("POST", "nbconvert/html", json=body).status_code == 403


def test_a_notebook_still_opens_and_saves(lab: Lab, notebook: Path) -> None:
    model = lab.get(f"api/contents/{NOTEBOOK}").json()
    model["content"]["cells"][0]["source"] = "2 + 2"
    saved = lab.request(
        "PUT",
        f"api/contents/{NOTEBOOK}",
        json={"type": "notebook", "format": "json", "content": model["content"]},
    )
    assert saved.status_code == 200, saved.text
    assert nbformat.read(notebook, 4).cells[0].source == "2 + 2"


def test_a_stock_server_does_hand_them_out(
    lab: Lab, tmp_path_factory: pytest.TempPathFactory, notebook: Path
) -> None:
    """The control: the same requests to JupyterLab without the extension are answered."""
    manager = "jupyter_server.services.contents.largefilemanager.AsyncLargeFileManager"
    stock = [f"--ServerApp.contents_manager_class={manager}"]
    with jupyterlab(lab.session, tmp_path_factory.mktemp("stock"), stock) as other:
        assert other.get(f"files/{NOTEBOOK}?download=1").status_code == 200
        assert other.get("files/table.csv").text == "a,b\n1,2\n"
        assert "html" in other.get("api/nbconvert").json()
        assert other.get(f"nbconvert/script/{NOTEBOOK}").status_code == 200


def test_deleting_leaves_no_copy_in_a_trash_folder(lab: Lab) -> None:
    (lab.work / "gone.txt").write_text("a name")
    assert lab.request("DELETE", "api/contents/gone.txt").status_code == 204
    deadline = time.monotonic() + 5
    while (lab.work / "gone.txt").exists() and time.monotonic() < deadline:
        continue
    assert not list(lab.work.glob("**/gone.txt"))
    assert not list(lab.log.parent.glob("**/gone.txt"))
