"""The lab: a store, a login server, an identity provider, a gateway and a Slurm site.

Each host has its own network, processes, accounts and root. Nodes reach the platform only
through the gateway, which translates their addresses: at the store and at the hub a source
address tells the site, not the person.

    platform 10.77.1.0/24                        site 10.77.2.0/24
    store .20   login .10   provider .30 -- gateway -- head .10   node1 .11   node2 .12   node3 .13
    (the machine itself, with the browser: .2)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from kakehashi.site import witness
from tests.lab import hosts as ns
from tests.lab import portal as services
from tests.lab import slurm
from tests.lab.portal import Place, Portal

RUN_DIR = Path("/run/kakehashi-lab")
REPOSITORY = Path(__file__).resolve().parents[2]
DESK = "kakehashi-desk"
PLATFORM = {"gateway": "10.77.1.1", "login": "10.77.1.10", "store": "10.77.1.20",
            "provider": "10.77.1.30"}  # fmt: skip
SITE = {"gateway": "10.77.2.1", "head": "10.77.2.10", "node1": "10.77.2.11", "node2": "10.77.2.12",
        "node3": "10.77.2.13"}  # fmt: skip
# node3 has neither user namespaces nor FUSE nor GPUs.
NODES = ("node1", "node2", "node3")
PLAIN_NODES = ("node3",)
DESK_ADDRESS = "10.77.1.2/24"
FIREWALL = """
table ip kakehashi {{
  chain translate {{
    type nat hook postrouting priority srcnat;
    ip saddr 10.77.2.0/24 ip daddr 10.77.1.0/24 masquerade
  }}
  chain pass {{
    type filter hook forward priority filter; policy drop;
    ct state established,related accept
    ip saddr 10.77.1.0/24 ip daddr 10.77.1.0/24 accept
    ip saddr 10.77.2.0/24 ip daddr 10.77.2.0/24 accept
    ip saddr {login} ip daddr 10.77.2.0/24 accept
    ip saddr 10.77.2.0/24 ip daddr {store} tcp dport 22 accept
    ip saddr 10.77.2.0/24 ip daddr {login} tcp dport {{ 8000, 8081 }} accept
  }}
}}
"""
SLURM_SITE = """\
title = "Slurm cluster"
title_ja = "Slurmクラスタ"
scheduler = "slurm"
agent = {agent}
addresses = ["{gateway}/32"]
accounts = {accounts}
hub_address = "{login}:8081"
node_name_is_address = true
[[sites.slurm.queues]]
name = "gpu"
title = "GPU nodes"
gpu_type = "h100"
max_gpus = 2
max_hours = 8
cpus = 2
memory_mb = 2000
"""


PLAIN_SITE = """\
title = "Slurm cluster, {title}"
title_ja = "Slurmクラスタ、{title_ja}"
scheduler = "slurm"
agent = {agent}
addresses = ["{gateway}/32"]
accounts = {accounts}
hub_address = "{login}:8081"
node_name_is_address = true
[[sites.{site}.queues]]
name = "plain"
title = "Plain nodes"
max_hours = 8
cpus = 2
memory_mb = 2000
"""
# The same nodes, by an operator who accepts weaker walls.
ACCOUNT_NODE = """\
[sites.slurm-account.node]
walls = "account"
"""
PLAIN_SITES = (
    ("slurm-plain", "nodes without user namespaces", "名前空間のないノード", ""),
    ("slurm-account", "plain nodes, weaker walls", "弱い隔離のノード", ACCOUNT_NODE),
)
PLAIN_SITE_FILE = "/etc/kakehashi-site-plain.json"


@dataclass(frozen=True)
class Lab:
    """The running lab."""

    hosts: dict[str, ns.Host]
    url: str
    ca_file: Path

    def __getitem__(self, name: str) -> ns.Host:
        return self.hosts[name]


def inline_table(values: dict[str, str]) -> str:
    """Write a TOML inline table."""
    return "{ " + ", ".join(f"{key} = {json.dumps(value)}" for key, value in values.items()) + " }"


def hosts_file() -> str:
    """Return /etc/hosts of every host of the lab."""
    lines = ["127.0.0.1 localhost"]
    lines += [f"{address} {name}" for name, address in {**PLATFORM, **SITE}.items()]
    return "\n".join(lines) + "\n"


def spec(name: str) -> ns.HostSpec:
    """Return what a host of the lab is made of."""
    binds = [(str(REPOSITORY), services.SOFTWARE, False)]
    if name in SITE and name != "gateway":
        binds.append((str(RUN_DIR / "site-home"), "/home", True))
    if name == "store":
        binds.append((str(RUN_DIR / "anchor"), services.ANCHOR, True))
    return ns.HostSpec(
        name=name,
        hostname=name,
        binds=tuple(binds),
        devices=slurm.GPU_DEVICES if name in NODES and name not in PLAIN_NODES else (),
        fuse=name not in PLAIN_NODES,
        files={"/etc/hosts": hosts_file(), "/etc/resolv.conf": ""},
    )


def connect(hosts: dict[str, ns.Host]) -> None:
    """Join the hosts by two networks with the gateway between them."""
    gateway = hosts["gateway"]
    for bridge, address in (("platform", PLATFORM["gateway"]), ("site", SITE["gateway"])):
        # An address of its own: by default a bridge has the lowest of its ports', which changes
        # when a host dies, and the others would send to the old one for half a minute.
        octets = ":".join(f"{int(part):02x}" for part in address.split("."))
        gateway.run(["ip", "link", "add", bridge, "address", f"02:00:{octets}",
                     "type", "bridge", "forward_delay", "0"])  # fmt: skip
        gateway.run(["ip", "addr", "add", f"{address}/24", "dev", bridge])
        gateway.run(["ip", "link", "set", bridge, "up"])
    for host in hosts.values():
        host.run(["ip", "link", "set", "lo", "up"])
    for addresses, bridge in ((PLATFORM, "platform"), (SITE, "site")):
        for name, address in addresses.items():
            if name != "gateway":
                ns.add_link(hosts[name], "eth0", f"{address}/24", gateway, bridge)
                hosts[name].run(["ip", "route", "add", "default", "via", addresses["gateway"]])
    ns.run(["ip", "link", "add", DESK, "type", "veth", "peer", "name", "p-desk",
            "netns", str(gateway.pid)])  # fmt: skip
    gateway.run(["ip", "link", "set", "p-desk", "master", "platform", "up"])
    ns.run(["ip", "addr", "add", DESK_ADDRESS, "dev", DESK])
    ns.run(["ip", "link", "set", DESK, "up"])
    gateway.run(["sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"])
    gateway.run(["nft", "-f", "-"], stdin=FIREWALL.format(**PLATFORM))


def join(hosts: dict[str, ns.Host], name: str) -> None:
    """Join a host of the site to its network."""
    hosts[name].run(["ip", "link", "set", "lo", "up"])
    ns.add_link(hosts[name], "eth0", f"{SITE[name]}/24", hosts["gateway"], "site")
    hosts[name].run(["ip", "route", "add", "default", "via", SITE["gateway"]])


def up(*, lease_minutes: float = 15) -> Lab:
    """Bring the lab up, or return it where it runs already."""
    ns.need_root()
    running = status()
    if running is not None:
        return running
    down()
    ns.mount_run_dir(RUN_DIR)
    for folder in ("site-home", "anchor"):
        (RUN_DIR / folder).mkdir()
    try:
        return _start(lease_minutes)
    except BaseException:
        # A failed start must not leave half a lab; its logs are what the error quotes.
        down()
        raise


def _start(lease_minutes: float) -> Lab:
    names = list(dict.fromkeys([*PLATFORM, *SITE]))
    hosts: dict[str, ns.Host] = {}
    for name in names:
        hosts[name] = ns.start_host(spec(name), RUN_DIR)
        ns.save(RUN_DIR, hosts.values(), {})
    connect(hosts)
    for name in ("login", "head", *NODES):
        services.add_people(hosts[name])
    keys = {site: RUN_DIR / f"{site}-witness.key" for site in ("slurm", "slurm-account")}
    slurm.start(
        slurm.Machine(hosts["head"], "head", SITE["head"]),
        [slurm.Machine(hosts[name], name, SITE[name], name in PLAIN_NODES) for name in NODES],
        [hosts["login"]],
    )
    accounts = services.site_accounts()
    portal = Portal(
        store=Place(hosts["store"], PLATFORM["store"]),
        login=Place(hosts["login"], PLATFORM["login"]),
        provider=Place(hosts["provider"], PLATFORM["provider"]),
        sites={
            "slurm": SLURM_SITE.format(
                agent=json.dumps(services.agent_argv()),
                accounts=inline_table(accounts),
                **PLATFORM,
            ),
            **{
                site: PLAIN_SITE.format(
                    site=site,
                    title=title,
                    title_ja=title_ja,
                    agent=json.dumps(services.agent_argv(PLAIN_SITE_FILE)),
                    accounts=inline_table(accounts),
                    **PLATFORM,
                )
                + extra
                for site, title, title_ja, extra in PLAIN_SITES
            },
        },
        tls=True,
        lease_minutes=lease_minutes,
        witness_keys={site: witness.make_key(path) for site, path in keys.items()},
    )
    services.start_provider(portal)
    common = {"scheduler": "slurm", "accounts": sorted(accounts.values()),
              "software": services.SOFTWARE}  # fmt: skip
    files = {"slurm": {**common, "queues": ["gpu"]},
             "slurm-account": {**common, "queues": ["plain"]}}  # fmt: skip
    services.install_agent(
        hosts["login"],
        {services.SITE_FILE: files["slurm"], PLAIN_SITE_FILE: files["slurm-account"]},
    )
    for name in NODES:
        site = "slurm-account" if name in PLAIN_NODES else "slurm"
        services.install_epilog(hosts[name], site, files[site], keys[site].read_text(), portal)
    services.start_store(portal)
    ca_file = services.write_ca(portal, RUN_DIR)
    services.start_login(portal)
    ns.save(RUN_DIR, hosts.values(), {"url": portal.url, "complete": True})
    return Lab(hosts, portal.url, ca_file)


def status() -> Lab | None:
    """Return the running lab, or None."""
    found = ns.running(RUN_DIR)
    return None if found is None else Lab(found[0], str(found[1]["url"]), RUN_DIR / "ca.crt")


def down() -> None:
    """Stop everything; nothing of the lab stays running or mounted."""
    if (Path("/sys/class/net") / DESK).exists():
        ns.run(["ip", "link", "del", DESK])
    ns.stop(RUN_DIR)
