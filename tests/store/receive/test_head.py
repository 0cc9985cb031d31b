"""UIDs from the first bytes of a data set, against pydicom."""

from __future__ import annotations

import struct
from contextlib import suppress

import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kakehashi.store.receive.head import (
    BIG_ENDIAN,
    IMPLICIT,
    Head,
    HeadError,
    ShortError,
    read_head,
)

from ..conftest import DATA
from .scu import CT, EXPLICIT, data_set, ui
from .test_fuzz import sequences
from .test_receiver import data_set_of

FILES = [
    path
    for path in sorted(DATA.rglob("*"))
    if path.is_file() and path.read_bytes()[128:132] == b"DICM"
]


def test_all_test_data_are_read_as_pydicom_does():
    assert len(FILES) > 150
    for path in FILES:
        dataset = pydicom.dcmread(path, stop_before_pixels=True)
        found = read_head(data_set_of(path), str(dataset.file_meta.TransferSyntaxUID))
        assert found == Head(
            dataset.SOPClassUID,
            dataset.SOPInstanceUID,
            dataset.StudyInstanceUID,
            dataset.SeriesInstanceUID,
        ), path


def test_sequences_on_the_way_are_stepped_over():
    assert read_head(sequences("1.2.3"), EXPLICIT).sop == "1.2.3"


def test_what_stands_in_a_sequence_is_not_taken_for_the_object_s_own():
    # UN of undefined length: what is in it has no value representations.
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    inner = struct.pack("<HHI", 0x20, 0xD, 4) + b"9.9\0"
    ends = b"".join(struct.pack("<HHI", 0xFFFE, n, 0) for n in (0xE00D, 0xE0DD))
    private = struct.pack("<HH2sHI", 9, 0x1010, b"UN", 0, 0xFFFFFFFF) + item + inner + ends
    whole = data_set("1.2.3")
    cut = whole.index(struct.pack("<HH", 0x20, 0xD))
    assert read_head(whole[:cut] + private + whole[cut:], EXPLICIT).study == "1.2.3.1"


@given(st.binary(max_size=300), st.sampled_from([EXPLICIT, IMPLICIT, BIG_ENDIAN]))
def test_any_bytes_are_read_or_refused(raw, syntax):
    for data in (raw, data_set("1.2.3")[:40] + raw):
        with suppress(HeadError, ShortError):
            assert read_head(data, syntax)


@given(st.integers(0, 81))
def test_a_cut_is_never_taken_for_the_whole(length):
    whole = data_set("1.2.3")
    with pytest.raises(ShortError):
        read_head(whole[:length], EXPLICIT)


def test_depth_without_end_is_refused():
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    head = struct.pack("<HH2sHI", 8, 0x1140, b"SQ", 0, 0xFFFFFFFF)
    with pytest.raises(HeadError, match="levels deep"):
        read_head((head + item) * 5000, EXPLICIT)


def test_uids_that_are_missing_are_empty():
    assert read_head(ui(8, 0x16, CT) + ui(0x28, 2, "1"), EXPLICIT) == Head(sop_class=CT)
