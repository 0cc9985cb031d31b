"""The person's server as the wrapper starts it in the payload's world."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kakehashi.session.plan import RUN, WORK, private_folder

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kakehashi.config import Node
    from kakehashi.secret import Secret

CONFIG = "jupyter_server_config.json"
KEY, CERTIFICATE, AUTHORITIES = "server.key", "server.crt", "authorities.crt"


@dataclass(frozen=True)
class Places:
    """Where the server finds what the session's wrapper lays out for it.

    Attributes
    ----------
    folder : str
        Of its TLS files and its configuration.
    root : str
        That it starts in.
    mounted : bool
        Whether ``root`` is the work folder, as a mount; otherwise that is reached by channels.
    """

    folder: str
    root: str
    mounted: bool

    @property
    def cert_paths(self) -> dict[str, str]:
        """The TLS files by the names that JupyterHub's spawners have for them."""
        names = {"keyfile": KEY, "certfile": CERTIFICATE, "cafile": AUTHORITIES}
        return {kind: f"{self.folder}/{name}" for kind, name in names.items()}


def places(node: Node, session: str) -> Places:
    """Return the places of a session on a site's nodes."""
    if node.walls == "account":
        own = private_folder(session)
        return Places(f"{own}/run/server", f"{own}/home", mounted=False)
    return Places(f"{RUN}/server", WORK, mounted=True)


def settings(person: str, where: Places) -> dict[str, Any]:
    """Return the configuration of the person's Jupyter server."""
    contents = "contents.WholeFileContentsManager"
    if not where.mounted:
        contents = "channel.ChannelContentsManager"
    return {
        "ServerApp": {
            "root_dir": where.root,
            "contents_manager_class": f"kakehashi_widgets.{contents}",
            # The language servers' extension looks for programs that a session does not have.
            "jpserver_extensions": {"kakehashi_widgets": True, "jupyter_lsp": False},
            "open_browser": False,
        },
        # As the server's own interface names folders: relative to its root.
        "ContentsManager": {"preferred_dir": person},
        # A kernel's sockets are files in the payload's private folders, and no TCP ports.
        "KernelManager": {"transport": "ipc"},
        # The platform has no internet: nothing to look for, and nothing to install from.
        "LabApp": {
            "extension_manager": "readonly",
            "check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
        },
    }


def hub_port(configured: int, server_port: int) -> int:
    """Choose the hub's port inside the payload, where the server already has one."""
    return configured if configured != server_port else configured ^ 1


def describe(
    *,
    node: Node,
    places: Places,
    person: str,
    environment: Mapping[str, str],
    key: Secret,
    certificate: str,
    authorities: str,
) -> dict[str, Any]:
    """Describe the server for the answer to an enrolment.

    Parameters
    ----------
    node : Node
        The site's nodes.
    places : Places
    person : str
        Their name; ``/work/PERSON`` is where the lab opens.
    environment : mapping
        JupyterHub's variables, with addresses as they are inside the payload.
    key, certificate, authorities : Secret, str, str
        The server's TLS key, its certificate, and the authorities it trusts; PEM.

    Returns
    -------
    dict
        ``{"argv": [..], "environment": {..}, "files": {NAME: TEXT}}``. It holds secrets: it
        is for the wire and for nothing else.
    """
    return {
        "argv": [
            f"{node.software}/.venv/bin/python",
            # Isolated: a file of the work folder must not be taken for a module of the server.
            "-I",
            "-m",
            "jupyterhub.singleuser",
            f"--config={places.folder}/{CONFIG}",
        ],
        "environment": dict(environment),
        "files": {
            CONFIG: json.dumps(settings(person, places)),
            KEY: key.reveal(),
            CERTIFICATE: certificate,
            AUTHORITIES: authorities,
        },
    }
