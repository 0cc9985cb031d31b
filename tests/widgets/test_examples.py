"""The worked examples in a person's folder."""

from __future__ import annotations

from pathlib import Path

import nbformat

from kakehashi.link.workchannel import ChannelFolder
from kakehashi_widgets.examples import lay
from tests.link.stores import Server


def test_examples_are_laid_once_and_a_changed_one_is_left_alone(tmp_path: Path) -> None:
    server = Server(writes=True)
    work = ChannelFolder(server, root=str(tmp_path))
    work.mkdir("hanako")
    laid = lay(work, "hanako")
    assert "01_first_look.ipynb" in laid
    for name in laid:
        nbformat.validate(nbformat.read(tmp_path / "hanako" / name, as_version=4))
    changed = tmp_path / "hanako/01_first_look.ipynb"
    changed.write_text("mine")
    lay(work, "hanako")
    assert changed.read_text() == "mine"
    assert {path.name for path in tmp_path.glob("hanako/*.ipynb")} == set(laid)
    work.close()
    server.close()
