"""``make endings``: a canary session through every way to end, and a table of what was found."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from kakehashi.verify.canary import Canary, self_test_of
from tests.lab import faults, verify
from tests.lab import lab as real_lab
from tests.lab.lab import NODES, Lab


def main() -> int:
    """Run the whole matrix; returns 1 where anything was found that may not be."""
    was_running = real_lab.status() is not None
    lab = real_lab.up()
    try:
        return _matrix(lab)
    finally:
        if not was_running:
            real_lab.down()


def _matrix(lab: Lab) -> int:
    table = Table("site", "end", "ok", "findings", "live", "receipt", "control")
    control = self_test_of(verify.deployment(lab))
    planted = f"{control['controls']} planted"
    table.add_row("", "(self-test)", str(control["ok"]), "", "", "", planted)
    well = bool(control["ok"])
    matrix = [(site, way) for site in verify.OPTIONS for way in verify.ways(lab, site)]
    for site, way in matrix:
        report = Canary(verify.deployment(lab, site), way).run()
        well = well and bool(report["ok"])
        table.add_row(
            site,
            way,
            str(report["ok"]),
            str(len(report["findings"])),
            str(sum(len(one) for one in report["live"].values())),
            f"{report['receipt']} {' '.join(report['pending'])}".strip(),
            str(report["control"]["findings"]),
        )
        for name in NODES:
            if not lab[name].alive:
                faults.return_node(lab, name)
    Console().print(table)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
