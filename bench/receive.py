"""Receiving: images a second from an untouched dcmtk client, beside other receivers.

Each receiver gets the same CT images (512 x 512, 16 bit) by ``storescu`` of dcmtk, over loopback,
by one association and by ten at once, in turn with all others; each run begins with an empty
folder. Ours alone makes each image and its row in the journal durable before it answers.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pydicom
from pydicom.uid import UID
from rich.console import Console

# Run as a script, this folder is on the path but not its parent.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.figures import Goal, Series, Table, all_of, arguments, at_least, interleaved, report

ROUNDS, QUICK_ROUNDS = 9, 2
IMAGES, QUICK_IMAGES = 200, 100
"""Images of one association."""
SLOW_IMAGES, QUICK_SLOW_IMAGES = 60, 20
"""The same, for a receiver that takes 40 ms for each."""
ASSOCIATIONS = (1, 10)
CALLED, CALLING = "KAKEHASHI", "BENCH"
SOURCE = Path(__file__).resolve().parents[1] / "tests/data/ct_chest"
TITLE = "Receiving CT images of 512 x 512 over loopback"
OURS, NODELAY, SHIPPED = "kakehashi", "storescp, TCP_NODELAY", "storescp as shipped"
FOLDER = Path(tempfile.gettempdir())

Start = Callable[[Path, int], "subprocess.Popen[bytes]"]

SERVE_OURS = """
import sys
from pathlib import Path
from kakehashi.store.receive import listener
from kakehashi.store.receive.settings import Receive, Sender
sender = Sender(facility="bench", ae_titles={sys.argv[3]}, addresses=("127.0.0.0/8",))
settings = Receive(
    bind="127.0.0.1", port=int(sys.argv[2]), ae_title=sys.argv[4], senders=(sender,)
)
with listener.listen(settings) as server:
    listener.serve(Path(sys.argv[1]), settings, server, lambda: None)
"""

SERVE_PYNETDICOM = """
import sys
from pathlib import Path
from pynetdicom import AE, AllStoragePresentationContexts, build_context, evt
def take(event):
    path = Path(sys.argv[1]) / f"{event.request.AffectedSOPInstanceUID}.dcm"
    path.write_bytes(event.encoded_dataset())
    return 0x0000
ae = AE(ae_title=sys.argv[4])
ae.supported_contexts = [*AllStoragePresentationContexts, build_context("1.2.840.10008.1.1")]
ae.maximum_associations = 32
ae.maximum_pdu_size = 0
ae.start_server(("127.0.0.1", int(sys.argv[2])), evt_handlers=[(evt.EVT_C_STORE, take)])
"""


def python(program: str) -> Start:
    """Start a receiver that is a Python program."""

    def start(folder: Path, port: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", program, str(folder), str(port), CALLING, CALLED]
        )

    return start


def storescp(**environment: str) -> Start:
    """Start dcmtk's receiver, one process for each association."""

    def start(folder: Path, port: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["storescp", "--fork", "-od", str(folder), "-aet", CALLED, str(port)],
            env=os.environ | environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    return start


def orthanc(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """Start Orthanc with its defaults."""
    settings = folder / "orthanc.json"
    settings.write_text(
        json.dumps(
            {
                "Name": "bench",
                "StorageDirectory": str(folder / "storage"),
                "IndexDirectory": str(folder / "index"),
                "DicomAet": CALLED,
                "DicomPort": port,
                "HttpServerEnabled": False,
                "DicomAlwaysAllowStore": True,
                "Plugins": [],
            }
        )
    )
    return subprocess.Popen(
        ["Orthanc", str(settings)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


RECEIVERS: dict[str, Start] = {
    OURS: python(SERVE_OURS),
    NODELAY: storescp(TCP_NODELAY="1"),
    SHIPPED: storescp(),
    "Orthanc": orthanc,
    "pynetdicom": python(SERVE_PYNETDICOM),
}


def make_images(folder: Path, count: int) -> None:
    """Write a folder of images for each association, each image with a UID of its own."""
    dataset = pydicom.dcmread(min(SOURCE.glob("*.dcm")))
    for association in range(max(ASSOCIATIONS)):
        own = folder / str(association)
        own.mkdir(parents=True)
        dataset.SeriesInstanceUID = f"1.2.826.0.1.3680043.10.543.{association + 1}"
        for number in range(count):
            uid = UID(f"{dataset.SeriesInstanceUID}.{number + 1}")
            dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = uid
            dataset.save_as(own / f"{number:04}.dcm")


@contextlib.contextmanager
def running(start: Start, folder: Path) -> Iterator[int]:
    """Run a receiver; give its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    process = start(folder, port)
    try:
        while True:
            echo = ["echoscu", "-aet", CALLING, "-aec", CALLED, "127.0.0.1", str(port)]
            if subprocess.run(echo, stderr=subprocess.DEVNULL, check=False).returncode == 0:
                break
            if process.poll() is not None:
                raise SystemExit(f"a receiver ended with {process.returncode}")
        yield port
    finally:
        # Not all of them end when they are asked to.
        process.kill()
        process.wait()


def rate(start: Start, images: Path, associations: int, count: int) -> float:
    """Return images a second, by that many associations at once."""
    folder = Path(tempfile.mkdtemp(dir=images))
    try:
        with running(start, folder) as port:
            send = ["storescu", "-aet", CALLING, "-aec", CALLED, "127.0.0.1", str(port)]
            files = [
                [str(path) for path in sorted((images / str(one)).iterdir())[:count]]
                for one in range(associations)
            ]
            started = time.monotonic()
            clients = [subprocess.Popen([*send, *own]) for own in files]
            failed = [client.args for client in clients if client.wait() != 0]
            took = time.monotonic() - started
        if failed:
            raise SystemExit("a client could not send all of its images")
        return associations * count / took
    finally:
        shutil.rmtree(folder)


def main() -> None:
    """Measure and report."""
    options = arguments("receiving")
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    count = QUICK_IMAGES if options.quick else IMAGES
    slow = QUICK_SLOW_IMAGES if options.quick else SLOW_IMAGES
    with tempfile.TemporaryDirectory(prefix="bench-receive-", dir=FOLDER) as folder:
        images = Path(folder)
        make_images(images, count)
        ways = {
            f"{number} x {name}": functools.partial(
                rate, start, images, number, slow if name == SHIPPED else count
            )
            for number in ASSOCIATIONS
            for name, start in RECEIVERS.items()
        }
        values = interleaved(ways, rounds, Console(stderr=True))

    def ratio(number: int, other: str) -> tuple[float, ...]:
        pairs = zip(values[f"{number} x {OURS}"], values[f"{number} x {other}"], strict=True)
        return tuple(one / two for one, two in pairs)

    goals: list[Goal] = [
        at_least(f"ten associations, of {NODELAY}", ratio(10, NODELAY), 0.67),
        at_least(f"one association, of {SHIPPED}", ratio(1, SHIPPED), 20),
    ]
    series = [Series(name, "images/s", found) for name, found in values.items()]
    medians = {item.name: item.median for item in series}
    report(
        TITLE,
        series,
        goals,
        tables=[
            all_of(TITLE, series),
            Table(
                "As a multiple of each, median by median",
                ("receiver", *(f"{number} association(s)" for number in ASSOCIATIONS)),
                tuple(
                    (
                        name,
                        *(
                            f"{medians[f'{number} x {OURS}'] / medians[f'{number} x {name}']:.2f}"
                            for number in ASSOCIATIONS
                        ),
                    )
                    for name in RECEIVERS
                    if name != OURS
                ),
            ),
        ],
        quick=options.quick,
        path=options.json,
    )


if __name__ == "__main__":
    main()
