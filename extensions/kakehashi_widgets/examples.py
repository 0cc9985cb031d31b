"""The worked examples, laid into a person's folder when their first session opens it."""

from __future__ import annotations

import logging
from pathlib import Path

import kakehashi
from kakehashi.errors import LinkError, SessionError
from kakehashi.link import Session, WorkFolder

# Beside the package, where it runs from a tree as on every node.
NOTEBOOKS = Path(kakehashi.__file__).resolve().parents[2] / "notebooks"

_log = logging.getLogger(__name__)


def lay(work: WorkFolder, folder: str, source: Path = NOTEBOOKS) -> list[str]:
    """Copy each notebook that the person's folder does not have, and say which.

    Parameters
    ----------
    work : WorkFolder
        The project's work folder.
    folder : str
        The person's folder in it; a notebook that lies there, changed or not, is left alone.
    source : Path
        Folder of the examples.

    Raises
    ------
    LinkError
        The folder cannot be read or written.
    """
    there = {entry.name for entry in work.listdir(folder)}
    laid = [path for path in sorted(source.glob("*.ipynb")) if path.name not in there]
    for notebook in laid:
        work.write(f"{folder}/{notebook.name}", notebook.read_bytes())
    return [notebook.name for notebook in laid]


def lay_for_session() -> None:
    """Lay the examples into this session's person's folder; outside of a session do nothing."""
    try:
        session = Session.current()
    except SessionError:
        return
    try:
        with WorkFolder.current(session) as work:
            lay(work, session.person)
    except (LinkError, OSError) as error:
        # A lab without examples is a lab all the same.
        _log.warning("the examples could not be laid into the work folder: %s", error)
