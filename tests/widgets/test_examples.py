"""The worked examples in a person's folder."""

from __future__ import annotations

from pathlib import Path

import nbformat

from kakehashi_widgets.examples import lay


def test_examples_are_laid_once_and_a_changed_one_is_left_alone(tmp_path: Path) -> None:
    laid = lay(tmp_path)
    assert "01_first_look.ipynb" in laid
    for name in laid:
        nbformat.validate(nbformat.read(tmp_path / name, as_version=4))
    changed = tmp_path / "01_first_look.ipynb"
    changed.write_text("mine")
    lay(tmp_path)
    assert changed.read_text() == "mine"
    assert {path.name for path in tmp_path.glob("*.ipynb")} == set(laid)
