"""From the request of a session to a usable kernel, beside plain batchspawner.

Both hubs run on the same login server of the lab and submit to the same Slurm in turn. What is
timed is what a person waits for: the spawn request, the queue, the server, a new kernel, and
the answer to its first cell. Ours adds on that way: grant, confinement, encryption from the
hub to the node, the mounted store and the work folder.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import requests
from rich.console import Console

# Run as a script, this folder is on the path but not its parent.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.figures import Series, arguments, at_most, interleaved, report
from tests.lab import lab as real_lab
from tests.lab.client import Client
from tests.lab.hosts import wait_for
from tests.lab.lab import PLATFORM, Lab
from tests.lab.portal import PATH, PYTHON

PORT, HUB_PORT, API_PORT = 8100, 8181, 8101
GOAL_SECONDS = 1.0
PLAIN = f"""
import batchspawner
c = get_config()
c.JupyterHub.bind_url = "http://{PLATFORM["login"]}:{PORT}"
c.JupyterHub.hub_ip = "{PLATFORM["login"]}"
c.JupyterHub.hub_port = {HUB_PORT}
c.ConfigurableHTTPProxy.api_url = "http://127.0.0.1:{API_PORT}"
c.ConfigurableHTTPProxy.command = ["/opt/kakehashi/node_modules/.bin/configurable-http-proxy"]
c.JupyterHub.db_url = "sqlite:////var/lib/plain/hub.sqlite"
c.JupyterHub.cookie_secret_file = "/var/lib/plain/cookie_secret"
c.JupyterHub.authenticator_class = "dummy"
c.DummyAuthenticator.password = "plain"
c.Authenticator.allow_all = True
c.JupyterHub.spawner_class = "batchspawner.SlurmSpawner"
c.Spawner.cmd = ["/opt/kakehashi/.venv/bin/jupyterhub-singleuser"]
c.BatchSpawnerBase.batchspawner_singleuser_cmd = "{PYTHON} -m batchspawner.singleuser"
c.SlurmSpawner.req_partition = "gpu"
c.SlurmSpawner.req_runtime = "1:00:00"
c.SlurmSpawner.req_memory = "2000"
c.SlurmSpawner.req_nprocs = "2"
c.SlurmSpawner.req_options = "--chdir=/ --output=/dev/null --error=/dev/null"
c.Spawner.notebook_dir = "~"
"""


class PlainClient(Client):
    """A person at the plain hub."""

    def log_in(self, password: str | None = None) -> requests.Response:
        """Log in with the dummy authenticator's form."""
        self.http.get(f"{self.url}/hub/login")
        return self.http.post(
            # Elsewhere the plain hub would start a session by itself.
            f"{self.url}/hub/login?next=/hub/home",
            data={
                "username": self.name,
                "password": password or "plain",
                "_xsrf": self._xsrf("/hub/login"),
            },
        )


@contextmanager
def plain_hub(lab: Lab) -> Iterator[str]:
    """Run a plain JupyterHub with batchspawner on the login server."""
    login = lab["login"]
    login.run(["install", "-d", "-m", "700", "/var/lib/plain"])
    login.write("/var/lib/plain/config.py", PLAIN)
    lab["gateway"].run(
        ["nft", "insert", "rule", "ip", "kakehashi", "pass", "ip", "saddr", "10.77.2.0/24",
         "tcp", "dport", str(HUB_PORT), "accept"]
    )  # fmt: skip
    process = login.daemon(
        "plain-hub",
        [PYTHON, "-m", "jupyterhub", "-f", "/var/lib/plain/config.py"],
        env={"PATH": PATH, "HOME": "/root"},
    )
    url = f"http://{PLATFORM['login']}:{PORT}"

    def answers() -> bool:
        try:
            return requests.get(f"{url}/hub/login", timeout=2).status_code == 200
        except requests.ConnectionError:
            return False

    try:
        wait_for("the plain hub", answers, 60)
        yield url
    finally:
        process.terminate()
        process.wait()


def once(client: Client, options: dict[str, object]) -> Callable[[], float]:
    """Return a way that starts a session, uses a kernel, and stops; gives the seconds."""

    def way() -> float:
        started = time.monotonic()
        client.start(options)
        with client.kernel() as kernel:
            if kernel.value("6 * 7") != 42:
                raise RuntimeError("the kernel does not calculate")
            seconds = time.monotonic() - started
        client.stop()
        return seconds

    return way


def main() -> None:
    """Measure and report."""
    options = arguments("request of a session to a usable kernel, beside plain batchspawner")
    was_running = real_lab.status() is not None
    lab = real_lab.up()
    try:
        with plain_hub(lab) as plain_url:
            ours = Client(lab.url, "tanaka", str(lab.ca_file))
            ours.log_in()
            plain = PlainClient(plain_url, "ka0002")
            plain.log_in()
            chosen: dict[str, object] = {
                "site": "slurm", "queue": "gpu", "gpus": 0, "hours": 1.0, "project": "lung-ct",
            }  # fmt: skip
            values = interleaved(
                {"Kakehashi": once(ours, chosen), "plain batchspawner": once(plain, {})},
                3 if options.quick else 9,
                Console(stderr=True),
            )
    finally:
        if not was_running:
            real_lab.down()
    pairs = zip(values["Kakehashi"], values["plain batchspawner"], strict=True)
    overhead = tuple(a - b for a, b in pairs)
    report(
        "Request of a session to a usable kernel",
        [
            *(Series(name, "s", found) for name, found in values.items()),
            Series("overhead, pair by pair", "s", overhead),
        ],
        [at_most("overhead over plain batchspawner", overhead, GOAL_SECONDS, "s")],
        quick=options.quick,
        path=options.json,
    )


if __name__ == "__main__":
    main()
