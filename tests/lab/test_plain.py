"""A site without user namespaces and FUSE: refused in words, or kept by the weaker walls."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from kakehashi.verify.canary import Canary
from tests.lab import look, verify
from tests.lab.browser import visitor
from tests.lab.client import Client, ClientError
from tests.lab.lab import Lab

pytestmark = pytest.mark.lab

TANAKA = "ka0001"
REQUEST = {"queue": "plain", "gpus": 0, "hours": 1.0, "project": "lung-ct"}
ACCOUNT = {**REQUEST, "site": "slurm-account"}
READ = """
from kakehashi import Store
series = Store().cohort[0]
print(series.array.shape, float(series.array.mean()))
"""


def test_a_node_without_namespaces_refuses_and_says_what_is_missing(
    lab: Lab, person: Callable[[str], Client]
) -> None:
    tanaka = person("tanaka")
    with pytest.raises(ClientError, match=r"/dev/fuse is missing.*walls = .*account"):
        tanaka.start({**REQUEST, "site": "slurm-plain"})
    assert not look.processes(lab["node3"], TANAKA)


def test_weaker_walls_read_the_same_verified_voxels(
    lab: Lab, person: Callable[[str], Client]
) -> None:
    tanaka = person("tanaka")
    read = {}
    for site in ({**ACCOUNT}, {**ACCOUNT, "site": "slurm", "queue": "gpu"}):
        tanaka.start(site)
        with tanaka.kernel() as kernel:
            ran = kernel.run(READ)
            assert ran.error is None, ran.error
            read[site["site"]] = ran.text
        tanaka.stop()
    assert read["slurm-account"] == read["slurm"]
    assert not look.processes(lab["node3"], TANAKA)


@pytest.mark.parametrize("way", ["stop", "cancel", "kill-wrapper"])
def test_the_canary_finds_nothing_after_weaker_walls(lab: Lab, way: str) -> None:
    report = Canary(verify.deployment(lab, "slurm-account"), way).run()
    assert report["ok"], json.dumps(report, indent=1)[:6000]
    assert report["walls"] == "account"
    assert report["refused_in_session"]["System V segment"]


def test_the_lab_in_a_browser_behind_weaker_walls(
    lab: Lab, browser: Browser, tmp_path: Path
) -> None:
    with visitor(browser, lab.url, "suzuki", shots=tmp_path) as suzuki:
        suzuki.log_in()
        suzuki.spawn(project="lung-ct", site="slurm-account", queue="plain", gpus=0, hours=1)
        suzuki.open_notebook(f"{suzuki.name}/01_first_look.ipynb")
        suzuki.run_all()
        for selector in (".kkh-cohort", ".kkh-viewer"):
            suzuki.page.locator(selector).first.scroll_into_view_if_needed()
            suzuki.page.wait_for_selector(f"{selector}[data-state=ready]")
            suzuki.shot(selector[1:])
        suzuki.stop()
        suzuki.page.locator("a.mono").first.click()
        suzuki.page.wait_for_load_state()
        said = suzuki.page.locator("#receipt-items", has_text="account: the site has no namespaces")
        said.wait_for()
        suzuki.shot("receipt")
