"""Somebody who has what they should not have: a grant, a key, or the hub's own credential."""

from __future__ import annotations

import json
import secrets
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from kakehashi import __version__
from tests.lab import portal as services
from tests.lab.hosts import Host
from tests.lab.lab import PLATFORM, Lab

STORE = PLATFORM["store"]
AUTHORITY_PORT = 8470
# As portal and store see every node of the site.
GATEWAY = PLATFORM["gateway"]
# Runs on the login server, where the hub's credential lies.
ASK = """
import json, ssl, sys, urllib.error, urllib.request
method, url, body, token = json.load(sys.stdin)
token = token or open("/etc/kakehashi/authority.token").read().strip()
request = urllib.request.Request(
    url, None if body is None else json.dumps(body).encode(),
    {"Authorization": "Bearer " + token, "Content-Type": "application/json"}, method=method)
context = ssl.create_default_context(cafile="/etc/kakehashi/ca.crt")
try:
    with urllib.request.urlopen(request, context=context, timeout=30) as answer:
        print(json.dumps([answer.status, json.load(answer)]))
except urllib.error.HTTPError as error:
    print(json.dumps([error.code, json.loads(error.read() or b"{}")]))
"""


@dataclass(frozen=True)
class Answer:
    """What the store's authority answered."""

    status: int
    body: dict[str, Any]


def ask_store(
    lab: Lab, method: str, path: str, body: Mapping[str, Any] | None = None, token: str = ""
) -> Answer:
    """Call the store's authority as the hub does, or with another credential."""
    url = f"https://{STORE}:{AUTHORITY_PORT}{path}"
    done = lab["login"].run(
        [services.PYTHON, "-I", "-c", ASK],
        stdin=json.dumps([method, url, body, token]),
    )
    status, answer = json.loads(done.stdout)
    return Answer(status, answer)


def create(lab: Lab, **changes: object) -> Answer:
    """Open a session at the store behind the portal's back."""
    body: dict[str, object] = {
        "person": "tanaka",
        "groups": ["lung-ct"],
        "project": "lung-ct",
        "site": "slurm",
        "kind": "interactive",
        "hours": 1,
        "software": __version__,
    }
    return ask_store(lab, "POST", "/v1/sessions", {**body, **changes})


def redeem(lab: Lab, created: Mapping[str, Any], public_key: str, **changes: object) -> Answer:
    """Redeem a ticket for a key of one's own."""
    body: dict[str, object] = {
        "session": created["session"],
        "ticket": created["ticket"],
        "public_key": public_key,
        "host": "node1",
        "address": GATEWAY,
        "job": secrets.token_hex(4),
        "walls": "namespaces",
        "software": __version__,
    }
    return ask_store(lab, "POST", "/v1/grants", {**body, **changes})


@dataclass
class Keyring:
    """A key pair with a certificate, in files that can be laid onto any host."""

    private: Ed25519PrivateKey
    certificate: str = ""
    host_ca: str = ""

    @classmethod
    def new(cls) -> Keyring:
        """Make a key pair."""
        return cls(Ed25519PrivateKey.generate())

    @property
    def public(self) -> str:
        """The public key as one line."""
        return (
            self.private.public_key()
            .public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
            .decode()
        )

    def take(self, grant: Mapping[str, Any]) -> None:
        """Take what a grant holds."""
        self.certificate = grant["certificate"]
        self.host_ca = grant["store"]["host_ca"]

    def lay(self, host: Host, user: str) -> str:
        """Lay everything into a folder of an account on a host; return the folder."""
        folder = f"/tmp/{secrets.token_hex(8)}"
        ids = host.run(["id", "-u", user]).stdout.strip()
        owner = (int(ids), int(ids))
        host.run(["install", "-d", "-o", user, "-m", "700", folder])
        private = self.private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        ).decode()
        host.write(f"{folder}/key", private, mode=0o600, owner=owner)
        host.write(f"{folder}/key-cert.pub", self.certificate + "\n", owner=owner)
        host.write(f"{folder}/known", f"@cert-authority * {self.host_ca}\n", owner=owner)
        return folder


@dataclass(frozen=True)
class Intruder:
    """An account on a host with a keyring that it got hold of."""

    lab: Lab
    host: str
    user: str
    keyring: Keyring

    def sftp(self, account: str, *commands: str) -> subprocess.CompletedProcess[str]:
        """Run sftp's commands as an account of the store."""
        return self._run("sftp", ["-b", "-"], account, [], "\n".join(commands) + "\n")

    def ssh(
        self, account: str, options: list[str], command: list[str], data: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run ssh as an account of the store."""
        return self._run("ssh", options, account, command, data)

    def admitted(self, account: str) -> bool:
        """Return whether the store lets the keyring in."""
        return self.sftp(account, "pwd").returncode == 0

    def _run(
        self, program: str, options: list[str], account: str, command: list[str], data: str
    ) -> subprocess.CompletedProcess[str]:
        host = self.lab[self.host]
        folder = self.keyring.lay(host, self.user)
        common = ["-F", "none", "-i", f"{folder}/key", "-o", "IdentitiesOnly=yes",
                  "-o", f"CertificateFile={folder}/key-cert.pub", "-o", "BatchMode=yes",
                  "-o", f"UserKnownHostsFile={folder}/known",
                  "-o", "ConnectTimeout=10"]  # fmt: skip
        target = f"{account}@{STORE}"
        try:
            return host.run(
                [program, *common, *options, target, *command],
                user=self.user, stdin=data, check=False, timeout=60,
            )  # fmt: skip
        finally:
            host.run(["rm", "-rf", folder])
