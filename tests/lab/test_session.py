"""Sessions on the lab's Slurm site: what a person gets, and what is left afterwards."""

from __future__ import annotations

import contextlib
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import nbformat
import numpy as np
import pytest
from playwright.sync_api import Browser

from tests.lab import look
from tests.lab import portal as services
from tests.lab.browser import visitor
from tests.lab.client import Client
from tests.lab.dicom_truth import planes, windowed
from tests.lab.hosts import wait_for
from tests.lab.lab import NODES, Lab

pytestmark = pytest.mark.lab

People = Callable[[str], Client]
SLURM = {"site": "slurm", "queue": "gpu", "gpus": 1, "hours": 1.0, "project": "lung-ct"}
TANAKA, SUZUKI = "ka0001", "ka0002"
ALL_GPUS = 4


def free_gpus(client: Client) -> int:
    """Return the free GPUs that the spawn page shows."""
    sites = client.call("GET", "/hub/api/kakehashi/sites").json()["sites"]
    return int(sites["slurm"]["queues"][0]["free_gpus"])


def test_a_session_reads_verified_voxels_and_leaves_a_signed_receipt(
    lab: Lab, person: People
) -> None:
    tanaka = person("tanaka")
    tanaka.start(SLURM)
    with tanaka.kernel() as kernel:
        uid, shape, voxel, affine = kernel.value(
            "(lambda s: (s.uid, s.array.shape, float(s.array[1, 200, 250]), s.affine.tolist()))"
            "(max(__import__('kakehashi').Store().cohort, key=lambda s: s.array.size))"
        )
        same = kernel.value(
            "(lambda s: __import__('hashlib').sha256(open(s.path, 'rb').read()).hexdigest())"
            "(__import__('kakehashi').Store().series('" + uid + "'))"
        )
    truth = planes(uid)
    assert tuple(shape) == truth.shape
    assert voxel == truth[1, 200, 250]
    assert np.asarray(affine).shape == (4, 4)
    checked = services.kakehashi(lab["store"], ["store", "show", uid, "--check"])
    assert checked.returncode == 0
    pack = lab["store"].run(["find", "/srv/kakehashi/packs", "-name", f"{uid}.ozx"]).stdout.strip()
    assert lab["store"].run(["sha256sum", pack]).stdout.split()[0] == same
    session = look.open_sessions(lab)[0]
    tanaka.stop()
    receipt = look.receipt(lab, session)
    assert receipt["session"] == session
    assert receipt["state"] == "complete"
    witnesses = {item["witness"] for item in receipt["items"]}
    assert {"store", "wrapper", "scheduler", "site"} <= witnesses
    seen = {item["item"]: item["result"] for item in receipt["items"] if item["witness"] == "site"}
    assert seen["processes"] == seen["mounts"] == seen["files in /dev/shm"] == "gone"


COHORT = "__import__('kakehashi.cohort', fromlist=['Cohort']).Cohort"


def test_the_catalogue_tells_a_session_what_its_project_may_see(lab: Lab, person: People) -> None:
    tanaka = person("tanaka")
    tanaka.start(SLURM)
    with tanaka.kernel() as kernel:
        mine = kernel.value("sorted(s.uid for s in __import__('kakehashi').Store().cohort)")
        found = kernel.value(f"sorted({COHORT}('True').series())")
        rows = kernel.value(f"len(list({COHORT}('slices > 10').table(['series_uid', 'slices'])))")
        frozen = kernel.value(f"(lambda f: (f.version, f.sha256))({COHORT}('True').freeze('all'))")
    listed = json.loads(services.kakehashi(lab["store"], ["store", "list", "--json"]).stdout)
    permitted = sorted(row["series_uid"] for row in listed if row["modality"] == "CT")
    assert found == permitted
    assert len(listed) > len(permitted)
    # The view is as it was when it was built; since then series may have come.
    assert set(mine) & set(permitted)
    assert rows > 0
    assert frozen[0] >= 1
    assert re.fullmatch("[0-9a-f]{64}", frozen[1])
    frozen_by = [one["person"] for one in look.audit(lab) if one["kind"] == "catalogue.freeze"]
    assert frozen_by[-1] == "tanaka"
    tanaka.stop()


def test_the_gpu_that_was_asked_for_is_counted_and_shown_to_the_payload(
    lab: Lab, person: People
) -> None:
    tanaka = person("tanaka")
    wait_for("the GPUs of earlier sessions", lambda: free_gpus(tanaka) == ALL_GPUS, 60)
    tanaka.start(SLURM)
    job = lab["login"].run(["squeue", "--noheader", "--user", TANAKA, "--format=%i"]).stdout.strip()
    shown = lab["login"].run(["scontrol", "show", "job", job]).stdout
    assert re.search(r"gres[:/]gpu:h100[:=]1", shown)
    assert "StdOut=/dev/null" in shown
    assert free_gpus(tanaka) == ALL_GPUS - 1
    with tanaka.kernel() as kernel:
        assert kernel.value("__import__('os').environ['CUDA_VISIBLE_DEVICES']") in {"0", "1"}


def test_more_gpus_than_the_queue_has_are_refused_before_anything_is_submitted(
    lab: Lab, person: People
) -> None:
    tanaka = person("tanaka")
    answer = tanaka.call("POST", "/hub/api/users/tanaka/server", {**SLURM, "gpus": 3})
    assert answer.status_code == 400
    assert "gpus" in answer.text
    assert not lab["login"].run(["squeue", "--noheader", "--user", TANAKA]).stdout


def test_two_people_on_one_node_see_their_own_project_only(lab: Lab, person: People) -> None:
    tanaka, suzuki = person("tanaka"), person("suzuki")
    tanaka.start({**SLURM, "gpus": 0})
    suzuki.start({**SLURM, "gpus": 0, "project": "brain-mr"})
    node = look.node_of(lab, TANAKA)
    assert node is not None
    assert node == look.node_of(lab, SUZUKI)
    ask = (
        "(lambda s: (s.project, sorted({x.modality for x in s.cohort}), [x.uid for x in s.cohort],"
        " sorted(__import__('os').listdir('/store/series'))))(__import__('kakehashi').Store())"
    )
    with tanaka.kernel() as first, suzuki.kernel() as second:
        project, modalities, mine, listed = first.value(ask)
        other_project, other_modalities, theirs, other_listed = second.value(ask)
        assert (project, modalities) == ("lung-ct", ["CT"])
        assert (other_project, other_modalities) == ("brain-mr", ["MR"])
        assert not set(mine) & set(theirs)
        assert listed == sorted(f"{uid}.ozx" for uid in mine)
        assert other_listed == sorted(f"{uid}.ozx" for uid in theirs)
        # What any program reads of it below the mount is in the session's traffic.
        traffic = (
            "sum(second.bytes for second in __import__('kakehashi.link.traffic', fromlist=['*'])"
            ".TrafficLog().seconds())"
        )
        before = first.value(traffic)
        size = first.value(f"len(open('/store/series/{listed[0]}', 'rb').read())")
        assert first.value(traffic) - before >= size > 0
        # Whatever the name, the other's series is not there.
        refused = first.run(f"open('/store/series/{theirs[0]}.ozx', 'rb')")
        assert refused.error is not None
        assert "FileNotFoundError" in refused.error
        assert first.value("[p for p in __import__('os').listdir('/proc') if p.isdigit()]")
        names = first.value(
            "[open(f'/proc/{p}/cmdline').read() for p in __import__('os').listdir('/proc')"
            " if p.isdigit()]"
        )
        assert not any("suzuki" in name for name in names)


def test_a_saved_notebook_lands_whole_in_the_work_folder_at_the_store(
    lab: Lab, person: People
) -> None:
    tanaka = person("tanaka")
    tanaka.start({**SLURM, "gpus": 0})
    tanaka.enter_lab()
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell(f"行 {number} " + "x" * 1000) for number in range(500)]
    )
    answer = tanaka.call(
        "PUT",
        "/user/tanaka/api/contents/tanaka/保存.ipynb",
        {"type": "notebook", "format": "json", "content": notebook},
    )
    assert answer.status_code in {200, 201}, answer.text
    saved = lab["store"].path("/srv/kakehashi/work/lung-ct/work/tanaka/保存.ipynb")
    assert nbformat.reads(saved.read_text(), as_version=4).cells == notebook.cells
    tanaka.call("DELETE", "/user/tanaka/api/contents/tanaka/保存.ipynb")


@pytest.mark.parametrize("way", ["stop", "cancel", "kill the wrapper"])
def test_after_the_end_nothing_is_left(lab: Lab, person: People, way: str) -> None:
    suzuki = person("suzuki")
    suzuki.start({**SLURM, "gpus": 0})
    suzuki.stop()
    before = {name: look.files(lab[name]) for name in NODES}
    tanaka = person("tanaka")
    tanaka.start(SLURM)
    node = look.node_of(lab, TANAKA)
    assert node is not None
    with tanaka.kernel() as kernel:
        # Whatever a payload writes where it can must go with it.
        assert kernel.run(
            "from kakehashi import Store\n"
            "data = Store().cohort[0].array.tobytes()\n"
            "for place in ('/tmp/a', '/var/tmp/a', '/dev/shm/a', '/home/session/a'):\n"
            "    open(place, 'wb').write(data)\n"
            "from multiprocessing.shared_memory import SharedMemory\n"
            "kept = SharedMemory(create=True, size=1 << 20)\n"
        ).error is None  # fmt: skip
        during = look.traces(lab, before, TANAKA)
        # The positive control: while it runs, every kind of trace that is possible is found.
        assert during.processes
        assert during.mounts
        assert during.connections
        assert during.sessions
        session = during.sessions[0]
        job = lab["login"].run(["squeue", "-h", "-u", TANAKA, "-o", "%i"]).stdout.strip()
        if way == "stop":
            tanaka.stop()
        elif way == "cancel":
            lab["login"].run(["scancel", job])
        else:
            with contextlib.suppress(Exception):
                node.run(["kill", "-9", str(look.keeper(node, TANAKA))])
    wait_for("the job's end", lambda: not look.processes(node, TANAKA), 30)
    wait_for("closed connections at the store", lambda: not look.store_connections(lab), 30)
    wait_for("the hub's notice", lambda: tanaka.server() is None, 60)
    wait_for("the end at the store", lambda: not look.open_sessions(lab), 60)
    assert look.traces(lab, before, TANAKA) == look.nothing()
    receipt = look.receipt(lab, session)
    reported = [item for item in receipt["items"] if item["witness"] == "wrapper"]
    if way == "kill the wrapper":
        assert all(item["result"] == "unknown" for item in reported)
    else:
        assert any(item["result"] == "gone" for item in reported)


def test_a_session_outlives_the_hubs_death(lab: Lab, person: People) -> None:
    tanaka = person("tanaka")
    tanaka.start({**SLURM, "gpus": 0})
    login = lab["login"]
    pid = int(login.run(["pgrep", "--oldest", "-f", "jupyterhub -f"]).stdout)
    with tanaka.kernel() as kernel:
        assert kernel.value("1 + 1") == 2
        login.run(["kill", f"-{signal.SIGKILL.value}", str(pid)])
        # The proxy lives: the lab goes on while the hub is away.
        assert kernel.value("2 + 2") == 4
    services.start_hub(login)
    again = person("tanaka")
    with again.kernel() as kernel:
        assert kernel.value("len(__import__('kakehashi').Store().cohort)") > 0
    assert again.server() is not None
    again.stop()
    assert not look.open_sessions(lab)


def test_the_whole_way_in_a_browser(lab: Lab, browser: Browser, tmp_path: Path) -> None:
    with visitor(browser, lab.url, "tanaka", allowed=["10.77.1.30"]) as tanaka:
        tanaka.log_in()
        tanaka.spawn(project="lung-ct", site="slurm", queue="gpu", gpus=1)
        tanaka.open_notebook("tanaka/01_first_look.ipynb")
        tanaka.run_all()
        assert not tanaka.cell_errors()
        viewer = tanaka.page.locator(".kkh-viewer").first
        viewer.scroll_into_view_if_needed()
        tanaka.page.wait_for_selector(".kkh-viewer[data-state=ready]")
        facts = {
            name: viewer.get_attribute(f"data-{name}")
            for name in ("uid", "index", "window", "level")
        }
        width, height, red = tanaka.canvas(".kkh-viewer canvas")
        expected = windowed(
            planes(str(facts["uid"]))[int(str(facts["index"]))],
            float(str(facts["window"])),
            float(str(facts["level"])),
        )
        assert np.array_equal(np.asarray(red).reshape(height, width), expected)
        assert len(np.unique(expected)) > 16
        tanaka.stop()
        tanaka.log_out()
        assert not tanaka.outside
        assert not tanaka.errors


def test_the_audit_trail_verifies_and_tells_the_sessions_steps(lab: Lab, person: People) -> None:
    tanaka = person("tanaka")
    tanaka.start({**SLURM, "gpus": 0})
    session = look.open_sessions(lab)[0]
    tanaka.stop()
    answer = services.kakehashi(lab["store"], ["audit", "verify", "--json"])
    assert json.loads(answer.stdout)["ok"] is True
    kinds = [record["kind"] for record in look.audit(lab) if record.get("session") == session]
    assert kinds[0] == "session.created"
    assert "session.granted" in kinds
    assert "session.ended" in kinds
    assert kinds.count("session.granted") == 1
