"""The site's root speaks to the store, through the portal and signed with a key of its own.

``python -I -m kakehashi.site.witness FILE`` makes that key and prints its public half, which the
store's configuration names as ``store.sites.NAME.witness_key``. Standard library only.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kakehashi.errors import RefusedError, SessionError, SiteError
from kakehashi.session import keys
from kakehashi.session.hubclient import HubClient

SEED_BYTES = 32
KEPT = Path("/var/lib/kakehashi/reports")
"""Reports that could not be sent yet; for root only."""


@dataclass(frozen=True)
class Witness:
    """Who speaks, where to, and with which key.

    Attributes
    ----------
    site : str
        The site's name at the store.
    key : str
        File of the private key.
    portal_url : str
        The portal as the nodes reach it.
    portal_ca : str or None
        File with the certificates that may have signed the portal's; the node's own by default.
    """

    site: str
    key: str
    portal_url: str
    portal_ca: str | None

    def report(self, host: str, job: str, items: list[dict[str, str]]) -> None:
        """Say what was seen after a job.

        Raises
        ------
        RefusedError
            The store knows no session of that job, or does not accept the word.
        SessionError
            The portal does not answer.
        """
        message = {"witness": "site", "site": self.site, "host": host, "job": job, "items": items}
        self._say(message)

    def pending(self, host: str) -> list[str]:
        """Ask which jobs of a host the store waits to hear about."""
        answer = self._say({"witness": "pending", "site": self.site, "host": host})
        jobs = answer.get("jobs")
        if not isinstance(jobs, list):
            raise SessionError("the portal's answer to witness is not understood")
        return [str(one["job"]) for one in jobs if isinstance(one, dict) and one.get("job")]

    def _say(self, message: dict[str, Any]) -> dict[str, Any]:
        authority = None if self.portal_ca is None else Path(self.portal_ca).read_text("ascii")
        hub = HubClient(self.portal_url, authority, session="")
        key = read_key(Path(self.key))
        try:
            return hub.testify(self.site, key, message)
        finally:
            key.wipe()


def make_key(path: Path) -> str:
    """Make the site's key, and return its public half as the configuration wants it.

    Raises
    ------
    SiteError
        There is one already, or the file cannot be written.
    """
    seed = os.getrandom(SEED_BYTES)
    public = keys.SigningKey(seed).public
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise SiteError(f"{path}: is there already; remove it to have a new key") from None
    except OSError as error:
        raise SiteError(f"{path}: cannot be written ({error.strerror})") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(base64.b64encode(seed) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return keys.public_line(public)


def read_key(path: Path) -> keys.SigningKey:
    """Read the site's key.

    Raises
    ------
    SiteError
        It is missing, open to others than its owner, or no key.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        data = path.read_bytes()
    except OSError as error:
        raise SiteError(f"{path}: the witness key cannot be read ({error.strerror})") from error
    if mode & 0o077:
        raise SiteError(f"{path}: others can read this key (mode {mode:o}); chmod 600")
    try:
        return keys.SigningKey(base64.b64decode(data.strip(), validate=True))
    except (binascii.Error, ValueError):
        # The cause could quote the file.
        raise SiteError(f"{path}: is not a witness key") from None


def keep(folder: Path, host: str, job: str, items: list[dict[str, str]]) -> None:
    """Keep a report that could not be sent, for root only."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    part = folder / f"{job}.part"
    part.write_text(json.dumps({"host": host, "job": job, "items": items}), encoding="utf-8")
    part.rename(folder / f"{job}.json")


def send_kept(folder: Path, witness: Witness) -> int:
    """Send the reports that were kept; those that the store refuses for good go as well.

    Returns
    -------
    int
        How many were sent or refused.

    Raises
    ------
    SessionError
        The portal does not answer; what is left stays.
    """
    done = 0
    for path in sorted(folder.glob("*.json")):
        kept = json.loads(path.read_text(encoding="utf-8"))
        try:
            witness.report(kept["host"], kept["job"], kept["items"])
        except RefusedError as error:
            sys.stderr.write(f"kakehashi: job {kept['job']}: {error}\n")
        path.unlink()
        done += 1
    return done


def main(arguments: list[str] | None = None) -> int:
    """Make a key; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if len(given) != 1:
        sys.stderr.write("usage: python -I -m kakehashi.site.witness FILE\n")
        return 2
    try:
        sys.stdout.write(make_key(Path(given[0])) + "\n")
    except (SiteError, SessionError) as error:
        sys.stderr.write(f"kakehashi: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
