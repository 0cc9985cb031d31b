"""The worked examples, laid into a person's folder when their first session opens it."""

from __future__ import annotations

import logging
from pathlib import Path

import kakehashi
from kakehashi.errors import KakehashiError
from kakehashi.link import Session
from kakehashi_widgets.contents import write_whole

# Beside the package, where it runs from a tree as on every node.
NOTEBOOKS = Path(kakehashi.__file__).resolve().parents[2] / "notebooks"

_log = logging.getLogger(__name__)


def lay(target: Path, source: Path = NOTEBOOKS) -> list[str]:
    """Copy each notebook that the person's folder does not have, and say which.

    Parameters
    ----------
    target : Path
        The person's folder; a notebook that lies there, changed or not, is left alone.
    source : Path
        Folder of the examples.

    Raises
    ------
    OSError
        The folder cannot be read or written.
    """
    laid = []
    for notebook in sorted(source.glob("*.ipynb")):
        place = target / notebook.name
        if not place.exists():
            write_whole(place, notebook.read_bytes())
            laid.append(notebook.name)
    return laid


def lay_for_session() -> None:
    """Lay the examples into this session's person's folder; outside of a session do nothing."""
    try:
        session = Session.current()
    except KakehashiError:
        return
    if session.work is None:
        return
    try:
        lay(session.work / session.person)
    except OSError as error:
        # A lab without examples is a lab all the same.
        _log.warning("the examples could not be laid into the work folder: %s", error)
