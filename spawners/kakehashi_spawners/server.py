"""The person's server as the wrapper starts it in the payload's world."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kakehashi.config import Node
    from kakehashi.secret import Secret

FOLDER = "/run/kakehashi/server"
CONFIG = "jupyter_server_config.json"
KEY, CERTIFICATE, AUTHORITIES = "server.key", "server.crt", "authorities.crt"
WORK = "/work"
# In the payload's own network, where the server and this relay are all that listens.
CERT_PATHS = {
    "keyfile": f"{FOLDER}/{KEY}",
    "certfile": f"{FOLDER}/{CERTIFICATE}",
    "cafile": f"{FOLDER}/{AUTHORITIES}",
}


def settings(person: str) -> dict[str, Any]:
    """Return the configuration of the person's Jupyter server."""
    return {
        "ServerApp": {
            "root_dir": WORK,
            "contents_manager_class": "kakehashi_widgets.contents.WholeFileContentsManager",
            # The language servers' extension looks for programs that a session does not have.
            "jpserver_extensions": {"kakehashi_widgets": True, "jupyter_lsp": False},
            "open_browser": False,
        },
        # As the server's own interface names folders: relative to its root.
        "FileContentsManager": {"preferred_dir": person},
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
            f"--config={FOLDER}/{CONFIG}",
        ],
        "environment": dict(environment),
        "files": {
            CONFIG: json.dumps(settings(person)),
            KEY: key.reveal(),
            CERTIFICATE: certificate,
            AUTHORITIES: authorities,
        },
    }
