"""Units of the upper layer and commands, as bytes and back."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pynetdicom import dimse_primitives, pdu_primitives
from pynetdicom.dimse_messages import C_STORE_RSP
from pynetdicom.pdu import A_ABORT_RQ, A_ASSOCIATE_AC, A_ASSOCIATE_RJ, A_RELEASE_RP, P_DATA_TF

from kakehashi.store.receive import dimse, pdu
from kakehashi.store.receive.pdu import (
    AbortReason,
    Answer,
    AssociateRequest,
    Context,
    Kind,
    ProtocolError,
)
from kakehashi.store.receive.syntaxes import STORAGE, TRANSFER
from kakehashi.store.receive.wire import MAX_LENGTH, Wire

from . import scu

uids = st.lists(st.integers(0, 10**9), min_size=2, max_size=6).map(
    lambda parts: ".".join(map(str, parts))
)
titles = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=16)
contexts = st.dictionaries(
    st.integers(0, 127).map(lambda n: 2 * n + 1),
    st.tuples(uids, st.lists(uids, min_size=1, max_size=5).map(tuple)),
    max_size=20,
)
pads = st.sampled_from([b"", b"\0", b" ", b"\0\0\0"])


@given(contexts, titles, titles, st.integers(0, 2**32 - 1), st.integers(0, 0xFFFF), pads)
def test_a_request_is_read_as_it_was_built(proposed, called, calling, most, version, pad):
    raw = scu.request(
        proposed, called=called, calling=calling, max_length=most, version=version, pad=pad
    )
    assert pdu.parse_request(raw[6:]) == AssociateRequest(
        version=version,
        called=called,
        calling=calling,
        application=scu.APPLICATION,
        contexts=tuple(Context(n, abstract, ts) for n, (abstract, ts) in proposed.items()),
        max_length=most,
    )


@given(contexts, st.data())
def test_a_request_that_is_cut_is_refused(proposed, data):
    raw = scu.request(proposed)[6:]
    cut = data.draw(st.integers(0, len(raw) - 1))
    try:
        request = pdu.parse_request(raw[:cut])
    except ProtocolError:
        return
    # A cut between two items leaves fewer of them, and nothing that was not there.
    assert set(request.contexts) <= {Context(n, a, ts) for n, (a, ts) in proposed.items()}


@given(st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(raw):
    for read in (
        lambda: pdu.parse_request(raw),
        lambda: list(pdu.fragments(memoryview(raw))),
        lambda: dimse.parse(1, raw),
    ):
        with suppress(ProtocolError):
            read()


@given(
    st.lists(
        st.tuples(st.integers(0, 255), st.booleans(), st.booleans(), st.binary(max_size=50)),
        max_size=10,
    )
)
def test_fragments_are_read_as_they_were_built(pieces):
    body = b"".join(
        scu.fragment(context, command | last << 1, piece)
        for context, command, last, piece in pieces
    )
    assert [(*rest, bytes(piece)) for *rest, piece in pdu.fragments(memoryview(body))] == pieces


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from(list(Kind)), st.binary(max_size=3000)), max_size=12),
    st.lists(st.integers(1, 2000), min_size=1, max_size=30),
)
def test_units_come_whole_however_the_network_cuts_them(units, cuts):
    raw = b"".join(pdu.frame(kind, body) for kind, body in units)
    ours, theirs = socket.socketpair()

    def send() -> None:
        position, turn = 0, 0
        while position < len(raw):
            step = cuts[turn % len(cuts)]
            theirs.sendall(raw[position : position + step])
            position, turn = position + step, turn + 1
        theirs.close()

    sender = threading.Thread(target=send)
    sender.start()
    wire = Wire(ours, 10)
    assert [(kind, bytes(body)) for kind, body in (wire.read() for _ in units)] == units
    with pytest.raises(EOFError):
        wire.read()
    sender.join()
    ours.close()


def test_many_large_units_pass_through_the_one_buffer():
    ours, theirs = socket.socketpair()
    bodies = [bytes([n]) * (MAX_LENGTH - n) for n in range(12)]

    def send() -> None:
        theirs.sendall(b"".join(pdu.frame(Kind.P_DATA, body) for body in bodies))

    sender = threading.Thread(target=send)
    sender.start()
    wire = Wire(ours, 10)
    for body in bodies:
        assert bytes(wire.read()[1]) == body
    sender.join()
    ours.close()
    theirs.close()


def test_a_unit_that_is_too_long_is_refused_before_it_is_read():
    ours, theirs = socket.socketpair()
    theirs.sendall(struct.pack(">BxI", Kind.P_DATA, MAX_LENGTH + 1))
    with pytest.raises(ProtocolError, match="longer than"):
        Wire(ours, 10).read()
    ours.close()
    theirs.close()


@given(
    st.builds(
        dimse.Request,
        context=st.just(5),
        field=st.sampled_from([1, 0x30]),
        message=st.integers(0, 0xFFFF),
        sop_class=uids | st.just(""),
        sop=uids | st.just(""),
        data_set=st.booleans(),
    )
)
def test_a_command_is_read_as_it_was_built(wanted):
    raw = scu.command(
        wanted.field,
        wanted.message,
        sop_class=wanted.sop_class,
        sop=wanted.sop,
        data_set=wanted.data_set,
    )
    assert dimse.parse(5, raw) == wanted


# What is built here is read by pynetdicom.


def test_an_acceptance_is_understood_by_others():
    request = scu.request({1: (scu.CT, (scu.EXPLICIT,))}, calling="ABC")[6:]
    answers = (Answer(1, 0, scu.EXPLICIT), Answer(3, 4, scu.EXPLICIT), Answer(5, 3, scu.EXPLICIT))
    accept = A_ASSOCIATE_AC()
    accept.decode(pdu.build_accept(request, answers, 4321))
    primitive = accept.to_primitive()
    assert isinstance(primitive, pdu_primitives.A_ASSOCIATE)
    assert primitive.result == 0
    assert primitive.maximum_length_received == 4321
    results = {
        c.context_id: c.result for c in primitive.presentation_context_definition_results_list
    }
    assert results == {1: 0, 3: 4, 5: 3}


def test_endings_are_understood_by_others():
    reject = A_ASSOCIATE_RJ()
    reject.decode(pdu.build_reject(transient=True, source=3, reason=2))
    assert (reject.result, reject.source, reject.reason_diagnostic) == (2, 3, 2)
    abort = A_ABORT_RQ()
    abort.decode(pdu.build_abort(AbortReason.UNEXPECTED_PDU))
    assert (abort.source, abort.reason_diagnostic) == (2, 2)
    release = A_RELEASE_RP()
    release.decode(pdu.build_release_reply())


@pytest.mark.parametrize("most", [0, 16, 17, 100, 16384])
def test_a_response_is_understood_by_others_and_keeps_to_their_limit(most):
    request = dimse.Request(7, 1, 42, scu.CT, "1.2.3.4.5", data_set=True)
    status = dimse.Status.OUT_OF_RESOURCES
    raw = pdu.build_command(7, dimse.build_response(request, status, "x" * 70), most)
    message = C_STORE_RSP()
    position = 0
    while position < len(raw):
        length = int.from_bytes(raw[position + 2 : position + 6], "big")
        assert most == 0 or length <= most
        data = P_DATA_TF()
        data.decode(raw[position : position + 6 + length])
        done = message.decode_msg(data.to_primitive())
        position += 6 + length
        assert done == (position == len(raw))
    primitive = message.message_to_primitive()
    assert isinstance(primitive, dimse_primitives.C_STORE)
    assert (primitive.MessageIDBeingRespondedTo, primitive.Status) == (42, 0xA700)
    assert primitive.AffectedSOPInstanceUID == "1.2.3.4.5"


def test_what_hospitals_send_is_taken():
    from pydicom import uid

    wanted = {
        uid.CTImageStorage,
        uid.EnhancedCTImageStorage,
        uid.LegacyConvertedEnhancedCTImageStorage,
        uid.MRImageStorage,
        uid.EnhancedMRImageStorage,
        uid.LegacyConvertedEnhancedMRImageStorage,
        uid.PositronEmissionTomographyImageStorage,
        uid.EnhancedPETImageStorage,
        uid.NuclearMedicineImageStorage,
        uid.ComputedRadiographyImageStorage,
        uid.DigitalXRayImageStorageForPresentation,
        uid.DigitalMammographyXRayImageStorageForPresentation,
        uid.UltrasoundImageStorage,
        uid.UltrasoundMultiFrameImageStorage,
        uid.XRayAngiographicImageStorage,
        uid.XRayRadiofluoroscopicImageStorage,
        uid.SecondaryCaptureImageStorage,
        uid.MultiFrameTrueColorSecondaryCaptureImageStorage,
        uid.SegmentationStorage,
        uid.RTStructureSetStorage,
        uid.RTPlanStorage,
        uid.RTDoseStorage,
        uid.BasicTextSRStorage,
        uid.EnhancedSRStorage,
        uid.ComprehensiveSRStorage,
        uid.KeyObjectSelectionDocumentStorage,
        uid.GrayscaleSoftcopyPresentationStateStorage,
        uid.EncapsulatedPDFStorage,
    }
    assert wanted <= STORAGE
    assert {str(one) for one in uid.AllTransferSyntaxes} - TRANSFER == {
        "1.2.840.10008.1.2.4.204",
        "1.2.840.10008.1.2.4.205",
        "1.2.840.10008.1.2.7.1",
        "1.2.840.10008.1.2.7.2",
        "1.2.840.10008.1.2.7.3",
    }
    assert uid.MediaStorageDirectoryStorage not in STORAGE
    assert uid.HangingProtocolStorage not in STORAGE
