"""What goes wrong in a data centre, done to hosts of the lab."""

from __future__ import annotations

from tests.lab import hosts as ns
from tests.lab import lab as real_lab
from tests.lab import portal as services
from tests.lab import slurm
from tests.lab.hosts import Host, wait_for
from tests.lab.lab import NODES, PLAIN_NODES, RUN_DIR, SITE, Lab

ADDRESSES = {**real_lab.PLATFORM, **SITE}


def kill_node(lab: Lab, name: str) -> None:
    """Cut a node's power: everything on it is gone at once."""
    lab[name].kill()


def return_node(lab: Lab, name: str) -> Host:
    """Boot a node again: its disk as it was, its memory empty.

    Before Slurm may use it, root scans for what the store still waits to hear, as the unit of a
    real node does at boot.
    """
    gateway = lab["gateway"]
    gateway.run(["ip", "link", "del", f"p-{name}-eth0"[:15]], check=False)
    lab.hosts[name] = host = ns.start_host(real_lab.spec(name), RUN_DIR)
    ns.save(RUN_DIR, lab.hosts.values(), {"url": lab.url, "complete": True})
    real_lab.join(lab.hosts, name)
    host.run(["install", "-d", "-o", "munge", "-g", "munge", "-m", "755", "/run/munge"])
    slurm.start_munge(host)
    scan_pending(lab, name)
    slurm.start_node(host, name, plain=name in PLAIN_NODES)
    wait_for(f"{name} in Slurm", lambda: _is_up(lab, name), 60)
    return host


def scan_pending(lab: Lab, name: str) -> None:
    """Have a node's root scan for what the store waits to hear about."""
    lab[name].run(
        [services.PYTHON, "-I", "-m", "kakehashi.site.epilog", "--pending"],
        env={"SLURMD_NODENAME": name},
        timeout=400,
    )


def _is_up(lab: Lab, name: str) -> bool:
    state = lab["head"].run(["sinfo", "-h", "-N", "-n", name, "-o", "%T"], check=False).stdout
    if state.strip() in {"idle", "mixed", "allocated"}:
        return True
    # A node that died unexpectedly waits for its operator's word.
    lab["head"].run(["scontrol", "update", f"nodename={name}", "state=resume"], check=False)
    return False


def cut(lab: Lab, one: str, other: str | None = None) -> None:
    """Drop all that a host sends or gets through the gateway, or between two hosts only.

    Established connections hang with it: nothing tells either side.
    """
    here = f"ip saddr {ADDRESSES[one]}", f"ip daddr {ADDRESSES[one]}"
    there = ("", "")
    if other is not None:
        there = f"ip daddr {ADDRESSES[other]} ", f"ip saddr {ADDRESSES[other]} "
    rules = [f"{mine} {others}drop" for mine, others in zip(here, there, strict=True)]
    # Before address translation, and for what a bridge passes within one network as well.
    chain = "\n".join(["type filter hook forward priority -300;", *rules])
    lab["gateway"].run(
        ["nft", "-f", "-"],
        stdin=f"table ip {_table(one, other)} {{\n chain pass {{\n{chain}\n}}\n}}\n",
    )


def heal(lab: Lab, one: str, other: str | None = None) -> None:
    """Let through again what the same words had cut."""
    lab["gateway"].run(["nft", "delete", "table", "ip", _table(one, other)])


def _table(one: str, other: str | None) -> str:
    return "_".join(["cut", *sorted(name for name in (one, other) if name)])


def stop_store(lab: Lab) -> None:
    """Kill all of the store's services at once."""
    store = lab["store"]
    pid = store.run(["pgrep", "--oldest", "-f", "store serve"]).stdout.strip()
    store.run(["kill", "-9", pid])
    wait_for("the store's death", lambda: not _serves(lab))


def _serves(lab: Lab) -> bool:
    return bool(lab["store"].run(["pgrep", "-f", "store serve"], check=False).stdout.strip())


def start_store(lab: Lab) -> None:
    """Start the store's services again."""
    services.serve_store(lab["store"])


def restart_store(lab: Lab) -> None:
    """Kill the store's services and start them again."""
    stop_store(lab)
    start_store(lab)


def kill_hub(lab: Lab) -> None:
    """Kill the hub; its proxy lives on."""
    login = lab["login"]
    pid = login.run(["pgrep", "--oldest", "-f", "jupyterhub -f"]).stdout.strip()
    login.run(["kill", "-9", pid])


def start_hub(lab: Lab) -> None:
    """Start the hub again."""
    services.start_hub(lab["login"])


def slurm_job(lab: Lab, account: str) -> str:
    """Return an account's job."""
    shown = lab["login"].run(["squeue", "--noheader", "--user", account, "--format=%i"])
    return shown.stdout.strip()


def node_of_job(lab: Lab, job: str) -> str:
    """Return the node on which a job runs."""
    name = lab["login"].run(["squeue", "--noheader", "--jobs", job, "--format=%B"]).stdout.strip()
    assert name in NODES, name
    return name
