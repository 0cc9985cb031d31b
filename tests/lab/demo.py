"""The demo: the whole portal on this machine, with a local site and sample data.

It runs in one host of the lab's kind that shares the machine's network: accounts, store and
sessions live in its root in memory, and go with it.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.lab import hospitals
from tests.lab import hosts as ns
from tests.lab import portal as services
from tests.lab.hospitals import Sent
from tests.lab.lab import REPOSITORY, inline_table
from tests.lab.portal import Place, Portal

RUN_DIR = Path("/run/kakehashi-demo")
ADDRESS = "127.0.0.1"
SAMPLES = "samples"
LOCAL_SITE = """\
title = "This machine"
title_ja = "このマシン"
scheduler = "none"
agent = {agent}
addresses = ["127.0.0.0/8"]
accounts = {accounts}
hub_address = "127.0.0.1:8081"
[[sites.local.queues]]
name = "local"
title = "This machine, no GPU"
max_gpus = 0
max_hours = 8
cpus = 1
memory_mb = 2000
"""


@dataclass(frozen=True)
class Demo:
    """The running demo, and what hospitals sent to it."""

    host: ns.Host
    url: str
    sent: Sent


def up() -> Demo:
    """Bring the demo up, or return it where it runs already."""
    ns.need_root()
    running = status()
    if running is not None:
        return running
    down()
    ns.mount_run_dir(RUN_DIR)
    (RUN_DIR / "anchor").mkdir()
    try:
        return _start()
    except BaseException:
        down()
        raise


def _start() -> Demo:
    host = ns.start_host(
        ns.HostSpec(
            name="demo",
            hostname="kakehashi-demo",
            own_network=False,
            binds=(
                (str(REPOSITORY), services.SOFTWARE, False),
                (str(RUN_DIR / "anchor"), services.ANCHOR, True),
            ),
        ),
        RUN_DIR,
    )
    ns.save(RUN_DIR, [host], {})
    studies = hospitals.make(host)
    place = Place(host, ADDRESS)
    services.add_people(host)
    accounts = services.site_accounts()
    portal = Portal(
        store=place,
        login=place,
        provider=place,
        sites={
            "local": LOCAL_SITE.format(
                agent=json.dumps(services.agent_argv()), accounts=inline_table(accounts)
            )
        },
        tls=False,
        sshd_port=8022,
        senders=hospitals.SENDERS,
        granted=(SAMPLES, *hospitals.GRANTED),
        data_facility=SAMPLES,
    )
    services.start_provider(portal)
    services.install_agent(
        host,
        {services.SITE_FILE: {
            "scheduler": "none", "accounts": sorted(accounts.values()),
            "software": services.SOFTWARE, "queues": ["local"]}},
    )  # fmt: skip
    services.start_store(portal)
    hospitals.start_receiver(host)
    studies.wait()
    sent = hospitals.send(host)
    # All of it at once, and in the project's view; what comes later is for the running intake.
    taken = hospitals.take_in(host)
    services.start_login(portal)
    taken.wait()
    services.kakehashi(host, ["store", "view", "lung-ct"])
    hospitals.start_intake(host)
    ns.save(RUN_DIR, [host], {"url": portal.url, "complete": True, "sent": sent.as_json()})
    return Demo(host, portal.url, sent)


def shell() -> int:
    """Give a shell of root on the demo's host, where `kakehashi` is the store's command."""
    running = status()
    if running is None:
        raise ns.LabError("the demo is not running; `make demo` starts it")
    running.host.write(
        "/usr/local/bin/kakehashi",
        f'#!/bin/sh\nexec {services.PYTHON} -m kakehashi.cli "$@"\n',
        mode=0o755,
    )
    environment = {
        **ns.ENVIRONMENT,
        "KAKEHASHI_CONFIG": services.CONFIG,
        "HOME": "/root",
        "TERM": os.environ.get("TERM", "dumb"),
    }
    argv = [*running.host.prefix(), "/bin/bash", "--norc"]
    return subprocess.run(argv, env=environment, check=False, cwd="/").returncode


def status() -> Demo | None:
    """Return the running demo, or None."""
    found = ns.running(RUN_DIR)
    if found is None:
        return None
    hosts, facts = found
    return Demo(hosts["demo"], str(facts["url"]), Sent.from_json(facts["sent"]))


def down() -> None:
    """Stop the demo; nothing of it stays running or mounted."""
    ns.stop(RUN_DIR)
