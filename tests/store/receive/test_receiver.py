"""A receiver, and the clients that hospitals have: dcmtk, pynetdicom, and one that misbehaves."""

from __future__ import annotations

import datetime as dt
import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pydicom
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydicom import uid
from pynetdicom import AE

from kakehashi.errors import StoreError
from kakehashi.store.receive.inbox import OTHER_CONTENT
from kakehashi.store.receive.settings import Sender

from ..conftest import DATA
from . import scu
from .conftest import content, settings
from .scu import ClosedError, data_set

NEWEST = uid.HTJ2KLossless


def dcmtk(program: str, running, *arguments: object, status: int = 0, aec="KAKEHASHI", aet="HOSP"):
    done = subprocess.run(
        [program, "-v", "-aet", aet, "-aec", aec, "127.0.0.1", str(running.port)]
        + [str(one) for one in arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def data_set_of(path: Path) -> bytes:
    """The bytes of a file behind its meta information."""
    with path.open("rb") as file:
        meta = pydicom.filereader.read_partial(file, stop_when=lambda *_: True).file_meta
        file.seek(132 + 12 + meta.FileMetaInformationGroupLength)
        return file.read()


def send_as_it_is(running, path: Path) -> int:
    """Send a file's bytes on a context of its own syntax; return the status."""
    meta = pydicom.dcmread(path, stop_before_pixels=True).file_meta
    syntax, sop_class = str(meta.TransferSyntaxUID), str(meta.MediaStorageSOPClassUID)
    client = running.call()
    client.connection.sendall(scu.request({1: (sop_class, (syntax,))}))
    assert client.accepted() == {1: (0, syntax)}
    status = client.store(
        str(meta.MediaStorageSOPInstanceUID), data_set_of(path), sop_class=sop_class
    )
    client.release()
    return status


def rewritten(source: Path, target: Path, syntax: str) -> Path:
    """A copy of an uncompressed file in another syntax."""
    dataset = pydicom.dcmread(source)
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = uid.generate_uid()
    if syntax == uid.ExplicitVRBigEndian:
        dataset.PixelData = bytes(len(dataset.PixelData))
    if syntax == uid.RLELossless:
        dataset.compress(syntax)
    dataset.file_meta.TransferSyntaxUID = syntax
    if syntax == uid.JPEGLSLossless:
        dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
        pydicom.dcmwrite(target, dataset)
        subprocess.run(["dcmcjpls", target, target], check=True)
        return target
    little = syntax != uid.ExplicitVRBigEndian
    pydicom.dcmwrite(
        target, dataset, implicit_vr=syntax == uid.ImplicitVRLittleEndian, little_endian=little
    )
    return target


# --- what comes is kept as it came ---


def test_dcmtk_and_the_inbox(receiver):
    dcmtk("echoscu", receiver)
    files = sorted((DATA / "ct_chest").glob("*.dcm"))
    dcmtk("storescu", receiver, *files)
    entries = receiver.entries()
    # dcmtk writes the data set anew (pads, lengths of sequences), so values are compared.
    sent = {str(pydicom.dcmread(path).SOPInstanceUID): path for path in files}
    for entry in entries:
        original = pydicom.dcmread(sent[entry.sop])
        assert pydicom.dcmread(entry.path) == original
        assert entry.study == original.StudyInstanceUID
        assert entry.series == original.SeriesInstanceUID
        assert entry.sop_class == original.SOPClassUID
        assert (entry.facility, entry.calling, entry.address) == ("east", "HOSP", "127.0.0.1")
        assert entry.transfer_syntax == original.file_meta.TransferSyntaxUID
        assert entry.size == len(content(entry))
        age = dt.datetime.now(dt.UTC) - entry.received_at
        assert dt.timedelta(0) <= age < dt.timedelta(minutes=5)
        assert entry.sop not in entry.path.name
    assert receiver.files("incoming") == []


def test_nobody_else_may_look_at_what_came(receiver):
    dcmtk("storescu", receiver, DATA / "ct_chest/1-20.dcm")
    base = receiver.root / "receive"
    for path in [base, *base.rglob("[!.]*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_dcmsend_of_a_whole_folder(receiver):
    # It proposes many contexts, and sends CT, MR, PET, SEG and structure sets in one go.
    sources = [DATA / "ct_tilted", DATA / "seg_tiny", DATA / "sts/PET/mask", DATA / "mr_adc"]
    dcmtk("dcmsend", receiver, "+sd", "+r", "--no-halt", *sources)
    found = Counter(uid.UID(entry.sop_class).name for entry in receiver.entries())
    assert found == {
        "CT Image Storage": 5,
        "Secondary Capture Image Storage": 1,
        "Segmentation Storage": 4,
        "RT Structure Set Storage": 1,
        "MR Image Storage": 4,
    }


@pytest.mark.parametrize(
    "path", ["ct_chest/1-20.dcm", "mr_small/MR_small_RLE.dcm", "mr_small/MR_small_jp2klossless.dcm"]
)
def test_each_syntax_is_kept_as_it_came(receiver, path):
    assert send_as_it_is(receiver, DATA / path) == 0
    (entry,) = receiver.entries()
    assert content(entry) == data_set_of(DATA / path)
    assert pydicom.dcmread(entry.path) == pydicom.dcmread(DATA / path)


@pytest.mark.parametrize(
    "syntax",
    [
        uid.ImplicitVRLittleEndian,
        uid.ExplicitVRBigEndian,
        uid.DeflatedExplicitVRLittleEndian,
        uid.JPEGLSLossless,
        uid.RLELossless,
    ],
)
def test_syntaxes_that_the_test_data_lack(receiver, tmp_path, syntax):
    path = rewritten(DATA / "ct_tiny/17106", tmp_path / "one.dcm", syntax)
    assert send_as_it_is(receiver, path) == 0
    (entry,) = receiver.entries()
    assert content(entry) == data_set_of(path)
    assert entry.transfer_syntax == syntax
    assert pydicom.dcmread(entry.path).PatientName == pydicom.dcmread(path).PatientName


def test_pynetdicom_with_several_contexts(receiver):
    ae = AE("HOSP")
    ae.add_requested_context(uid.CTImageStorage, [NEWEST, uid.ExplicitVRLittleEndian])
    ae.add_requested_context(uid.CTImageStorage, uid.ExplicitVRLittleEndian)
    ae.add_requested_context(uid.MRImageStorage, ["1.2.840.113619.5.2", uid.RLELossless])
    ae.add_requested_context(uid.MRImageStorage, "1.2.840.113619.5.2")
    ae.add_requested_context(uid.HangingProtocolStorage, uid.ImplicitVRLittleEndian)
    called = ae.associate("127.0.0.1", receiver.port, ae_title="KAKEHASHI")
    assert called.is_established
    results = {c.context_id: (c.result, *c.transfer_syntax) for c in called.accepted_contexts}
    # The first that the sender names and that is known, and no conversion.
    assert results == {
        1: (0, NEWEST),
        3: (0, uid.ExplicitVRLittleEndian),
        5: (0, uid.RLELossless),
    }
    assert {c.context_id: c.result for c in called.rejected_contexts} == {7: 4, 9: 3}
    for name in ("ct_chest/1-20.dcm", "mr_small/MR_small_RLE.dcm"):
        assert called.send_c_store(pydicom.dcmread(DATA / name)).Status == 0
    called.release()
    assert len(receiver.entries()) == 2


@pytest.mark.parametrize("room", [1, 7, 500, 250_000])
def test_fragments_of_any_size(receiver, room):
    client = receiver.call()
    client.associate()
    data = data_set("1.2.3.4", pixels=os.urandom(room * 40))
    units = scu.message(1, scu.command(1, 1, sop_class=scu.CT, sop="1.2.3.4"), data, room)
    # Command in fragments too, and several fragments in one unit.
    command = scu.command(1, 2, sop_class=scu.CT, sop="1.2.3.5")
    client.connection.sendall(b"".join(units))
    assert client.status() == 0
    other = data_set("1.2.3.5")
    body = scu.fragment(1, 1, command[:9]) + scu.fragment(1, 3, command[9:])
    body += (
        scu.fragment(1, 0, other[:50]) + scu.fragment(1, 0, b"") + scu.fragment(1, 2, other[50:])
    )
    client.connection.sendall(scu.unit(4, body))
    assert client.status() == 0
    client.release()
    assert [content(entry) for entry in receiver.entries()] == [data, other]


def test_odd_padding_is_understood(receiver):
    client = receiver.call()
    client.connection.sendall(scu.request({1: (scu.CT, (scu.EXPLICIT,))}, pad=b"\0"))
    assert client.accepted() == {1: (0, scu.EXPLICIT)}
    sop_class, sop = scu.CT + "\0", "1.2.3.4 "
    assert client.store(sop, data_set("1.2.3.4"), sop_class=sop_class) == 0
    assert receiver.entries()[0].sop == "1.2.3.4"


def test_answers_keep_to_the_length_that_the_sender_takes(receiver):
    client = receiver.call()
    client.associate(max_length=32)
    assert client.store("1.2.3.4", data_set("1.2.3.4")) == 0
    client.release()


def test_ten_at_once(receiver):
    images = {
        f"1.2.{a}.{n}": data_set(f"1.2.{a}.{n}", pixels=os.urandom(30_000))
        for a in range(10)
        for n in range(12)
    }
    statuses = []

    def send(association: int) -> None:
        client = receiver.call()
        client.associate()
        for sop, data in images.items():
            if sop.startswith(f"1.2.{association}."):
                statuses.append(client.store(sop, data))
        client.release()

    threads = [threading.Thread(target=send, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [0] * 120
    assert {entry.sop: content(entry) for entry in receiver.entries()} == images


# --- what is refused, and how ---


def rejected(client) -> tuple[int, ...]:
    kind, body = client.read()
    assert kind == 3
    return tuple(body[1:])


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        ({"called": "OTHER"}, (1, 1, 7)),
        ({"calling": "STRANGER"}, (1, 1, 3)),
        ({"application": "1.2.3"}, (1, 1, 2)),
        ({"version": 2}, (1, 2, 2)),
    ],
)
def test_associations_are_rejected_with_the_reason(receiver, options, answer):
    client = receiver.call()
    client.connection.sendall(scu.request({1: (scu.CT, (scu.EXPLICIT,))}, **options))
    assert rejected(client) == answer


def test_dcmtk_understands_that_it_is_rejected(receiver):
    assert "Called AE Title Not Recognized" in dcmtk("echoscu", receiver, aec="X", status=1)
    assert "Calling AE Title Not Recognized" in dcmtk("echoscu", receiver, aet="X", status=1)


def test_a_title_is_good_from_its_own_address_only(run):
    far = Sender(facility="west", ae_titles=["WEST"], addresses=["192.0.2.0/24"])
    here = Sender(facility="east", ae_titles=["HOSP"], addresses=["127.0.0.1"])
    receiver = run(senders=(far, here))
    dcmtk("echoscu", receiver)
    assert "Calling AE Title Not Recognized" in dcmtk("echoscu", receiver, aet="WEST", status=1)


def test_an_unknown_address_is_not_answered(run):
    receiver = run(senders=(Sender(facility="w", ae_titles=["HOSP"], addresses=["192.0.2.1"]),))
    client = receiver.call()
    with pytest.raises((ClosedError, ConnectionError)):
        client.read()


def test_too_many_associations_are_told_so(run):
    receiver = run(max_associations=2, facility_share=1)
    clients = [receiver.call() for _ in range(2)]
    for client in clients:
        client.associate()
    third = receiver.call()
    third.connection.sendall(scu.request({1: (scu.CT, (scu.EXPLICIT,))}))
    assert rejected(third) == (2, 3, 2)
    clients[0].release()
    while True:
        again = receiver.call()
        again.connection.sendall(scu.request({1: (scu.CT, (scu.EXPLICIT,))}))
        if again.read()[0] == 2:
            break


def test_commands_are_refused_with_the_status(receiver):
    client = receiver.call()
    client.associate()
    good = data_set("1.2.3.4")
    assert client.store("1.2.3.4", good, sop_class=uid.HangingProtocolStorage) == 0x0122
    assert client.store("../../etc/passwd", good) == 0xC000
    assert client.store("", good) == 0xC000
    lonely = scu.command(1, 9, sop_class=scu.CT, sop="1.2.3.4", data_set=False)
    client.connection.sendall(scu.message(1, lonely)[0])
    assert client.status() == 0xC000
    find = scu.command(0x20, 10, sop_class=scu.CT)
    client.connection.sendall(b"".join(scu.message(1, find, good)))
    response = client.response()
    assert int.from_bytes(response[0x900], "little") == 0x0211
    assert int.from_bytes(response[0x120], "little") == 10
    # The association goes on.
    assert client.store("1.2.3.4", good) == 0
    client.release()
    assert len(receiver.entries()) == 1
    assert receiver.files("incoming") == []


@pytest.mark.parametrize(
    "units",
    [
        scu.unit(9, b""),
        scu.unit(2, bytes(80)),
        scu.unit(1, bytes(80)),
        scu.unit(4, scu.fragment(99, 3, scu.command(0x30, 1, data_set=False))),
        scu.unit(4, scu.fragment(1, 2, b"data without a command")),
        scu.unit(4, b"\xff\xff\xff\xff\1\3"),
        scu.unit(4, scu.fragment(1, 3, b"rubbish")),
        scu.unit(4, scu.fragment(1, 3, scu.command(0x8001, 1, data_set=False))),
        b"\4\0\xff\xff\xff\xff",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_whoever_breaks_the_protocol_is_aborted(receiver, units):
    client = receiver.call()
    client.associate()
    client.connection.sendall(units)
    kind, body = client.read()
    assert kind == 7
    assert body[2] == 2
    with pytest.raises(ClosedError):
        client.read()


def test_silence_ends_an_association(run):
    receiver = run(idle_s=0.2)
    early, late = receiver.call(), receiver.call()
    late.associate()
    late.connection.sendall(scu.store_units("1.2.3.4", data_set("1.2.3.4"))[0])
    assert early.read()[0] == 7
    assert late.read()[0] == 7
    late.connection.settimeout(10)
    with pytest.raises(ClosedError):
        late.read()


def test_an_object_whose_sender_goes_away_leaves_nothing(receiver):
    client = receiver.call()
    client.associate()
    units = scu.store_units("1.2.3.4", data_set("1.2.3.4", pixels=bytes(100_000)))
    client.connection.sendall(b"".join(units[:4]))
    while not receiver.files("incoming"):
        pass
    client.connection.close()
    while receiver.files("incoming"):
        pass
    assert receiver.entries() == []


# --- the same again, and what is odd ---


def test_the_same_again_is_acknowledged_and_kept_once(receiver):
    client = receiver.call()
    client.associate()
    data = data_set("1.2.3.4")
    assert client.store("1.2.3.4", data) == 0
    assert client.store("1.2.3.4", data) == 0
    client.release()
    # In another association and from another device, whose header of the file differs.
    other = receiver.call()
    other.associate(calling="STORESCU")
    assert other.store("1.2.3.4", data) == 0
    (entry,) = receiver.entries()
    assert content(entry) == data
    assert receiver.inbox.held.list() == []


def test_the_same_at_the_same_time_is_kept_once(receiver):
    data = data_set("1.2.3.4", pixels=bytes(50_000))
    units = b"".join(scu.store_units("1.2.3.4", data))
    clients = [receiver.call() for _ in range(6)]
    for client in clients:
        client.associate()
    for client in clients:
        client.connection.sendall(units)
    assert [client.status() for client in clients] == [0] * 6
    assert len(receiver.entries()) == 1
    assert receiver.files("incoming") == []


def test_other_content_under_the_same_uid_is_held(receiver):
    client = receiver.call()
    client.associate()
    first, second = data_set("1.2.3.4", pixels=b"1"), data_set("1.2.3.4", pixels=b"2")
    assert client.store("1.2.3.4", first) == 0
    assert client.store("1.2.3.4", second) == 0
    assert client.store("1.2.3.4", second) == 0
    (entry,) = receiver.entries()
    assert content(entry) == first
    (held,) = receiver.inbox.held.list()
    assert held.reason == OTHER_CONTENT
    assert held.path.read_bytes().endswith(second)
    assert held.receipt.facility == "east"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"no DICOM at all, but text", "no value representation"),
        (b"", "ends before a SeriesInstanceUID"),
        (data_set("1.2.3.4")[:60], "ends before a SeriesInstanceUID"),
        (data_set("1.2.3.4", series=""), "no valid SeriesInstanceUID"),
        (data_set("1.2.3.4", study="x" * 70), "no valid StudyInstanceUID"),
        (data_set("1.2.3.99"), "SOPInstanceUID is 1.2.3.99, that of the sender's command 1.2.3.4"),
        (data_set("1.2.3.4", sop_class=uid.MRImageStorage), "SOPClassUID is 1.2.840"),
    ],
)
def test_corrupt_and_foreign_objects_are_held_with_the_reason(receiver, data, reason):
    client = receiver.call()
    client.associate()
    command = scu.command(1, 1, sop_class=scu.CT, sop="1.2.3.4")
    client.connection.sendall(scu.unit(4, scu.fragment(1, 3, command) + scu.fragment(1, 2, data)))
    assert client.status() == 0
    assert receiver.entries() == []
    (held,) = receiver.inbox.held.list()
    assert reason in held.reason
    assert held.path.read_bytes()[2048:] == data
    assert held.receipt.sop == "1.2.3.4"


def test_what_is_not_deflated_is_held(receiver):
    client = receiver.call()
    client.associate(uid.DeflatedExplicitVRLittleEndian)
    assert client.store("1.2.3.4", data_set("1.2.3.4")) == 0
    (held,) = receiver.inbox.held.list()
    assert "not deflated" in held.reason


# --- TLS ---


class Authority:
    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.path = self.issue(name)[1]

    def issue(self, name: str) -> tuple[Path, Path]:
        """Key and certificate of a host; of the authority itself, if it is of its name."""
        own = name == self.name
        key = self.key if own else ec.generate_private_key(ec.SECP256R1())
        now = dt.datetime.now(dt.UTC)
        subject, issuer = (
            x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, one)])
            for one in (name, self.name)
        )
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=own, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        paths = self.folder / f"{name}.key", self.folder / f"{name}.pem"
        paths[0].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        paths[1].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return paths


def test_tls_with_client_certificates(run, tmp_path):
    authority, stranger = Authority(tmp_path, "ca"), Authority(tmp_path, "other")
    key, certificate = authority.issue("receiver")
    receiver = run(tls_key=key, tls_cert=certificate, tls_client_ca=authority.path)
    device_key, device = authority.issue("device")
    path = DATA / "ct_chest/1-20.dcm"
    tls = ["+tls", device_key, device, "+cf", authority.path]
    dcmtk("storescu", receiver, path, *tls)
    (entry,) = receiver.entries()
    assert pydicom.dcmread(entry.path) == pydicom.dcmread(path)

    false_key, false = stranger.issue("intruder")
    for arguments in (["+tls", false_key, false, "+cf", authority.path], ["+tla", "-ic"], []):
        dcmtk("echoscu", receiver, *arguments, status=1)
    # One that says nothing at all holds up nobody.
    silent = receiver.call()
    dcmtk("echoscu", receiver, *tls)
    silent.connection.close()


def test_tls_through_an_own_client(run, tmp_path):
    authority = Authority(tmp_path, "ca")
    key, certificate = authority.issue("receiver")
    receiver = run(tls_key=key, tls_cert=certificate)
    context = ssl.create_default_context(cafile=authority.path)
    plain = socket.create_connection(("127.0.0.1", receiver.port))
    client = scu.Scu(context.wrap_socket(plain, server_hostname="receiver"))
    client.associate()
    data = data_set("1.2.3.4", pixels=os.urandom(600_000))
    assert client.store("1.2.3.4", data) == 0
    client.release()
    assert content(receiver.entries()[0]) == data


def test_tls_files_that_cannot_be_used_are_named(tmp_path):
    from kakehashi.store.receive import listener

    chosen = settings(tls_key=tmp_path / "no.key", tls_cert=tmp_path / "no.pem")
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(StoreError, match="tls_key"),
    ):
        listener.serve(tmp_path, chosen, server, lambda: None)


# --- the disk, and the end ---


@pytest.fixture
def small_disk(tmp_path):
    if os.geteuid() != 0:
        # Only a real full disk says ENOSPC; CI is root and runs this.
        pytest.skip("needs root to mount a small disk")
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_said_and_leaves_nothing_half(run, small_disk):
    receiver = run(small_disk, reserve_mb=0)
    client = receiver.call()
    client.associate()
    images = {f"1.2.{n}": data_set(f"1.2.{n}", pixels=os.urandom(300_000)) for n in range(9)}
    statuses = {sop: client.store(sop, data) for sop, data in images.items()}
    assert set(statuses.values()) == {0, 0xA700}
    stored = {sop: images[sop] for sop, status in statuses.items() if status == 0}
    assert {entry.sop: content(entry) for entry in receiver.entries()} == stored
    assert receiver.files("incoming") == []
    assert len(receiver.files("inbox")) == len(stored)
    # To the last byte: also the row in the journal and the reason in quarantine find no room.
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 1):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))
    assert client.store("1.3.1", data_set("1.3.1")) == 0xA700
    assert client.store("1.3.2", b"no data set") == 0xA700
    # Room again: the same association goes on.
    filler.unlink()
    receiver.inbox.discard(*receiver.entries()[:2])
    failed = [sop for sop, status in statuses.items() if status]
    assert client.store(failed[0], images[failed[0]]) == 0
    assert client.store("1.3.1", data_set("1.3.1")) == 0
    client.release()
    assert {entry.sop for entry in receiver.entries()} >= {failed[0], "1.3.1"}
    assert receiver.inbox.held.list() == []


def test_when_asked_to_stop_it_finishes_what_runs(run):
    receiver = run(stop_s=20)
    idle, busy = receiver.call(), receiver.call()
    for client in (idle, busy):
        client.associate()
    units = scu.store_units("1.2.3.4", data_set("1.2.3.4", pixels=bytes(60_000)))
    busy.connection.sendall(units[0])
    while not receiver.files("incoming"):
        pass
    os.kill(receiver.pid, signal.SIGTERM)
    assert idle.read()[0] == 7
    busy.connection.sendall(b"".join(units[1:]))
    assert busy.status() == 0
    assert busy.read()[0] == 7
    assert receiver.wait() == 0
    assert len(receiver.entries()) == 1


def test_who_does_not_finish_is_left_behind(run):
    receiver = run(stop_s=0.2)
    client = receiver.call()
    client.associate()
    client.connection.sendall(scu.store_units("1.2.3.4", data_set("1.2.3.4"))[0])
    while not receiver.files("incoming"):
        pass
    assert receiver.end() == 0
    receiver.start()
    assert receiver.files("incoming") == []


def test_with_the_listener_its_associations_end(receiver):
    client = receiver.call()
    client.associate()
    receiver.end(signal.SIGKILL)
    with pytest.raises((ClosedError, ConnectionError)):
        client.read()


def test_an_association_that_dies_harms_no_other(receiver):
    first, second = receiver.call(), receiver.call()
    for client in (first, second):
        client.associate()
    first.connection.sendall(scu.store_units("1.2.3.4", data_set("1.2.3.4"))[0])
    while not (parts := receiver.files("incoming")):
        pass
    os.kill(int(parts[0].name.partition("-")[0]), signal.SIGKILL)
    while receiver.files("incoming"):
        pass
    assert second.store("1.2.3.5", data_set("1.2.3.5")) == 0
    with pytest.raises((ClosedError, ConnectionError)):
        first.read()
    second.release()


def test_one_receiver_to_a_folder(receiver):
    from kakehashi.store.receive import listener

    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(StoreError, match="another process"),
    ):
        listener.serve(receiver.root, receiver.settings, server, lambda: None)


def test_the_command_as_a_person_types_it(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    config = tmp_path / "kakehashi.toml"
    head = f'[store]\nroot = "{root}"\naddress = "store.example"\n'
    head += f'[store.receive]\nbind = "127.0.0.1"\nport = {port}\n'
    # As root it becomes the receiver's account, which this machine may not have.
    program = (
        "import typer; from kakehashi.cli.receive import receive; "
        "from kakehashi.store.authority import accounts; accounts.become = lambda _: None; "
        "typer.run(receive)"
    )
    command = [sys.executable, "-c", program, "--config", str(config)]

    config.write_text(head)
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "senders is empty" in refused.stderr

    config.write_text(
        head + '[[store.receive.senders]]\nfacility = "east"\nae_titles = ["HOSP"]\n'
        'addresses = ["127.0.0.1"]\n'
    )
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as receiver:
        assert receiver.stdout.readline().startswith("ready")
        arguments = ["-aet", "HOSP", "-aec", "KAKEHASHI", "127.0.0.1", str(port)]
        path = DATA / "ct_chest/1-20.dcm"
        subprocess.run(["storescu", *arguments, path], check=True, timeout=60)
        receiver.send_signal(signal.SIGTERM)
        _, log = receiver.communicate(timeout=30)
    assert receiver.returncode == 0
    assert "1 stored" in log
    # Nothing of the patient's stands in the log.
    assert str(pydicom.dcmread(path).SOPInstanceUID) not in log
    assert len(list((root / "receive/inbox").iterdir())) == 1
