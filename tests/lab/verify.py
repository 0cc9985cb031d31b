"""The lab as a deployment for the canary, with every way that a session can end there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kakehashi.verify.canary import Deployment, VerifyError
from kakehashi.verify.profile import Browser
from tests.lab import faults, look
from tests.lab import portal as services
from tests.lab.client import Client
from tests.lab.hosts import Host, LabError, wait_for
from tests.lab.lab import NODES, Lab

PERSON, ACCOUNT = "canary", "ka0005"
ROLES = {"login": "hub", "store": "store", "head": "head", **dict.fromkeys(NODES, "node")}
OPTIONS: dict[str, dict[str, object]] = {
    "slurm": {"queue": "gpu", "gpus": 1, "hours": 1.0},
    "slurm-account": {"queue": "plain", "gpus": 0, "hours": 1.0},
}
# Every file of a host, on a machine that does much besides.
SEARCH_S = 400
# Inside: the store's packs, views and work folders. Its records and logs are searched.
SKIP = {"store": ("/srv/kakehashi/packs", "/srv/kakehashi/views", "/srv/kakehashi/work")}


@dataclass(frozen=True)
class LabHost:
    """Root on one host of the lab; a node that died has nothing that could be searched."""

    lab: Lab
    name: str
    role: str

    @property
    def skip(self) -> tuple[str, ...]:
        # The software is the machine's own, shown read-only.
        return (*SKIP.get(self.name, ()), services.SOFTWARE)

    def python(self, module: str, *arguments: str, stdin: str = "") -> str:
        host = self.lab[self.name]
        if not host.alive:
            raise VerifyError(f"{self.name} is down")
        try:
            return host.run(
                [services.PYTHON, "-m", module, *arguments],
                env={"KAKEHASHI_CONFIG": services.CONFIG, "PATH": services.PATH},
                stdin=stdin,
                timeout=SEARCH_S,
            ).stdout
        except LabError as error:
            raise VerifyError(str(error)) from None


def deployment(lab: Lab, site: str = "slurm", browser: Browser | None = None) -> Deployment:
    """Return the running lab as the canary sees it."""
    visitor = Client(lab.url, PERSON, str(lab.ca_file))
    visitor.log_in()
    return Deployment(
        visitor=visitor,
        site=site,
        project="canary",
        options=OPTIONS[site],
        hosts=[LabHost(lab, name, role) for name, role in ROLES.items()],
        ways=Ways(lab).all(),
        browser=browser,
    )


def ways(lab: Lab, site: str) -> list[str]:
    """Return how sessions of a site can end; what has no namespaces has none that are held."""
    known = ["stop", *Ways(lab).all()]
    return [way for way in known if site == "slurm" or way != "held-namespaces"]


@dataclass(frozen=True)
class Ways:
    """How sessions of the lab die."""

    lab: Lab

    def all(self) -> dict[str, Callable[[str], None]]:
        """Return every way by its name; each gets the session."""
        return {
            "cancel": self.cancel,
            "kill-wrapper": self.kill_wrapper,
            "kill-slurmstepd": self.kill_slurmstepd,
            "time-limit": self.time_limit,
            "kill-hub": self.kill_hub,
            "node-death": self.node_death,
            "store-unreachable": self.store_unreachable,
            "wrapper-and-store": self.wrapper_and_store,
            "held-namespaces": self.held_namespaces,
        }

    def cancel(self, session: str) -> None:
        node = self._node()
        self._scancel()
        self._gone(node)

    def kill_wrapper(self, session: str) -> None:
        # It has taken the batch shell's place: the same process.
        node = self._node()
        node.run(["kill", "-9", str(look.keeper(node, ACCOUNT))])
        self._gone(node)

    def kill_slurmstepd(self, session: str) -> None:
        node = self._node()
        keeper = look.keeper(node, ACCOUNT)
        parent = node.run(["ps", "-o", "ppid=", "-p", str(keeper)]).stdout.strip()
        assert "slurmstepd" in node.run(["ps", "-o", "args=", "-p", parent]).stdout
        node.run(["kill", "-9", parent])
        self._gone(node)

    def time_limit(self, session: str) -> None:
        # Slurm counts in minutes; a limit of one that has passed is enforced at once.
        node = self._node()
        job = faults.slurm_job(self.lab, ACCOUNT)
        self.lab["head"].run(["scontrol", "update", f"jobid={job}", "timelimit=0:01"])
        self._gone(node, 150)

    def kill_hub(self, session: str) -> None:
        node = self._node()
        faults.kill_hub(self.lab)
        self._scancel()
        self._gone(node)
        faults.start_hub(self.lab)

    def node_death(self, session: str) -> None:
        self._node().kill()

    def store_unreachable(self, session: str) -> None:
        node = self._node()
        faults.cut(self.lab, node.name, "store")
        try:
            self._scancel()
            self._gone(node)
        finally:
            faults.heal(self.lab, node.name, "store")

    def wrapper_and_store(self, session: str) -> None:
        node = self._node()
        faults.stop_store(self.lab)
        node.run(["kill", "-9", str(look.keeper(node, ACCOUNT))])
        self._gone(node)
        faults.start_store(self.lab)

    def held_namespaces(self, session: str) -> None:
        """Somebody of the same account enters the payload's namespaces, and stays."""
        node = self._node()
        inside = node.run(["pgrep", "-u", ACCOUNT, "-f", "singleuser|labhub"]).stdout.split()[0]
        holder = node.popen(
            ["nsenter", "--preserve-credentials", "--target", inside, "--user", "--mount",
             "--ipc", "sleep", "3600"],
            user=ACCOUNT,
        )  # fmt: skip
        wait_for("the holder inside", lambda: self._holds(node))
        self._scancel()
        wait_for("the holder's end", lambda: holder.poll() is not None, 60)

    def _holds(self, node: Host) -> bool:
        return bool(
            node.run(["pgrep", "-u", ACCOUNT, "-f", "^sleep 3600"], check=False).stdout.strip()
        )

    def _node(self) -> Host:
        return self.lab[faults.node_of_job(self.lab, faults.slurm_job(self.lab, ACCOUNT))]

    def _scancel(self) -> None:
        self.lab["login"].run(["scancel", faults.slurm_job(self.lab, ACCOUNT)])

    def _gone(self, node: Host, seconds: float = 60) -> None:
        wait_for("the wrapper's end", lambda: not look.processes(node, ACCOUNT), seconds)
