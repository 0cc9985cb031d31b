"""The login server: ``jupyterhub -f jupyterhub_config.py`` with a ``kakehashi.toml``.

Everything stands in that file; its path is in KAKEHASHI_CONFIG, or it lies beside this one.
"""

import os
from pathlib import Path

from kakehashi.config import load
from kakehashi_spawners.configure import configure

c = get_config()  # noqa: F821 - JupyterHub puts it here

configure(
    c, load(Path(os.environ.get("KAKEHASHI_CONFIG", Path(__file__).parent / "kakehashi.toml")))
)
