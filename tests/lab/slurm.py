"""A real Slurm cluster on hosts of the lab: a controller, nodes with made-up GPUs, a plain one.

The GPUs are device files that Slurm counts, queues for and refuses as it does real ones;
there is no driver behind them. The plain node has none, and neither user namespaces nor FUSE.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from tests.lab.hosts import Host, LabError, wait_for

CONFIGURATION = """\
ClusterName=kakehashi-lab
SlurmctldHost={controller}({controller_address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
ReturnToService=2
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=/var/log/slurmctld.log
SlurmdLogFile=/var/log/slurmd.log
KillWait=10
UnkillableStepTimeout=20
SlurmdTimeout=30
MinJobAge=60
GresTypes=gpu
Epilog=/etc/slurm/epilog
{nodes}
PartitionName=gpu Nodes={gpu} Default=YES MaxTime=08:00:00 State=UP
PartitionName=plain Nodes={plain} MaxTime=08:00:00 State=UP
"""

NODE = (
    "NodeName={name} NodeHostname={name} NodeAddr={address} CPUs=8 RealMemory=8000 {gres}"
    "State=UNKNOWN"
)
# As root on each node, after each job.
EPILOG = """\
#!/bin/sh
exec /opt/kakehashi/.venv/bin/python -I -m kakehashi.site.epilog
"""
GPUS = "Name=gpu Type=h100 File=/dev/nvidia[0-1]\n"
CGROUP = "CgroupPlugin=cgroup/v1\nConstrainCores=no\nConstrainRAMSpace=no\nConstrainDevices=no\n"
GPU_DEVICES = ("nvidia0", "nvidia1")
NO_NAMESPACES = "/opt/kakehashi/tests/lab/no_namespaces.py"


@dataclass(frozen=True)
class Machine:
    """A host of the cluster with its name and address on the site's network."""

    host: Host
    name: str
    address: str
    plain: bool = False


def configure(
    controller: Machine, nodes: Sequence[Machine], clients: Sequence[Host], key: str
) -> None:
    """Lay configuration and the common munge key onto every host of the cluster."""
    text = CONFIGURATION.format(
        controller=controller.name,
        controller_address=controller.address,
        nodes="\n".join(
            NODE.format(
                name=node.name,
                address=node.address,
                gres="" if node.plain else "Gres=gpu:h100:2 ",
            )
            for node in nodes
        ),
        gpu=",".join(node.name for node in nodes if not node.plain),
        plain=",".join(node.name for node in nodes if node.plain),
    )
    for host in [controller.host, *(node.host for node in nodes), *clients]:
        host.write("/etc/slurm/slurm.conf", text)
        host.write("/etc/slurm/cgroup.conf", CGROUP)
        host.write("/etc/slurm/epilog", EPILOG, mode=0o755)
        if host in [node.host for node in nodes if not node.plain]:
            host.write("/etc/slurm/gres.conf", GPUS)
        host.write("/etc/munge/munge.key", key, mode=0o400)
        host.run(["chown", "-R", "munge:munge", "/etc/munge"])
        host.run(["install", "-d", "-o", "munge", "-g", "munge", "-m", "755", "/run/munge"])


def start_munge(host: Host) -> None:
    """Start the cluster's credential service on a host."""
    host.run(["/usr/sbin/munged", "--num-threads=2"], user="munge")


def start_node(host: Host, name: str, *, plain: bool) -> None:
    """Start what a node of the cluster runs."""
    prefix = ["/usr/bin/python3", "-I", NO_NAMESPACES] if plain else []
    host.run([*prefix, "/usr/sbin/slurmd", "-N", name])


def start(controller: Machine, nodes: Sequence[Machine], clients: Sequence[Host]) -> None:
    """Start the cluster and wait until every node is idle."""
    key = os.urandom(64).hex()
    configure(controller, nodes, clients, key)
    for host in [controller.host, *(node.host for node in nodes), *clients]:
        start_munge(host)
    controller.host.run(["/usr/sbin/slurmctld", "-c"])
    for node in nodes:
        start_node(node.host, node.name, plain=node.plain)

    def idle() -> bool:
        answer = controller.host.run(["sinfo", "-h", "-N", "-o", "%T"], check=False)
        return answer.stdout.split() == ["idle"] * len(nodes)

    try:
        wait_for("idle Slurm nodes", idle)
    except LabError as error:
        log = controller.host.path("/var/log/slurmctld.log").read_text()[-2000:]
        raise LabError(f"{error}\n{log}") from None
