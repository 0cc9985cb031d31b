"""Beside the pixels nothing else is in pixel data: comments, what follows them, thumbnails."""

from __future__ import annotations

import io
import struct

import numpy as np
import pydicom
import pytest
from pydicom import Dataset, Sequence, uid
from pydicom.encaps import encapsulate, encapsulate_extended, itemize_fragment

from tests.store.conftest import DATA
from tests.store.deidentify.plants import ct, item

SECRET = b"SUZUKI ICHIRO 19500101"


def done(deidentifier, dataset: Dataset):
    """De-identify what comes as a file; give the outcome and what is written."""
    source, target = io.BytesIO(), io.BytesIO()
    dataset.save_as(source, enforce_file_format=True)
    source.seek(0)
    outcome = deidentifier.object(pydicom.dcmread(source), facility="F01")
    outcome.write(target)
    return outcome, target.getvalue()


def compressed(syntax: str, value: bytes, frames: int = 1) -> Dataset:
    dataset = ct()
    dataset.file_meta.TransferSyntaxUID = uid.UID(syntax)
    dataset.PixelData = value
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    if frames > 1:
        dataset.NumberOfFrames = frames
    return dataset


def segment(marker: int, value: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(value) + 2) + value


def jpeg(*more: bytes, late: bytes = b"", after: bytes = b"", ls: bool = False) -> bytes:
    """Return a stream with the markers of a JPEG image, which no decoder has to like."""
    entropy = b"\x12\xff\x7f\x56" if ls else b"\x12\xff\x00\x34\xff\xd0\x56"
    frame = segment(0xF7 if ls else 0xC3, b"\x0c\0\x08\0\x08\x01\x01\x11\0")
    scan = segment(0xDA, b"\x01\x01\0\x01\0\0") + entropy
    return b"\xff\xd8" + b"".join(more) + frame + scan + late + b"\xff\xd9" + after


JPEGS = [
    (uid.JPEGLosslessSV1, False),
    (uid.JPEGBaseline8Bit, False),
    (uid.JPEGLSLossless, True),
]
WHERE = {
    "comment": lambda ls: jpeg(segment(0xFE, SECRET), ls=ls),
    "application": lambda ls: jpeg(segment(0xE1, b"Exif\0\0" + SECRET), ls=ls),
    "between scans": lambda ls: jpeg(late=segment(0xFE, SECRET), ls=ls),
    "after the end": lambda ls: jpeg(after=SECRET, ls=ls),
    "after an end of its own": lambda ls: jpeg(after=SECRET + b"\xff\xd9", ls=ls),
}


@pytest.mark.parametrize(("syntax", "ls"), JPEGS)
@pytest.mark.parametrize("where", WHERE)
def test_what_is_beside_the_image_of_a_jpeg_stream_is_blanked(deidentifier, syntax, ls, where):
    frame = WHERE[where](ls)
    dataset = compressed(syntax, encapsulate([frame, jpeg(ls=ls)]), 2)
    outcome, written = done(deidentifier, dataset)
    assert outcome.held is None
    assert SECRET not in written
    # Nothing has moved, and the image's own bytes are as they were.
    image = frame.replace(SECRET, bytes(len(SECRET)))
    assert image.replace(b"Exif", bytes(4)).removesuffix(b"\xff\xd9")[-20:] in written
    assert len(outcome.dataset.PixelData) == len(dataset.PixelData)
    assert jpeg(ls=ls) in written


@pytest.mark.parametrize(("syntax", "ls"), JPEGS)
def test_a_stream_that_is_only_an_image_is_not_changed(deidentifier, syntax, ls):
    for frame in (jpeg(ls=ls), jpeg(segment(0xFE, bytes(7)), after=b"\0", ls=ls)):
        dataset = compressed(syntax, encapsulate([frame, frame]), 2)
        outcome, _ = done(deidentifier, dataset)
        assert outcome.held is None
        assert outcome.dataset.PixelData == dataset.PixelData


def test_a_frame_in_several_fragments_is_one_image(deidentifier):
    frame = jpeg(segment(0xFE, SECRET + b"."), segment(0xFE, SECRET + b"."))
    dataset = compressed(
        uid.JPEGLosslessSV1, encapsulate([frame], fragments_per_frame=3, has_bot=False)
    )
    outcome, written = done(deidentifier, dataset)
    assert outcome.held is None
    assert b"SUZUKI" not in written
    assert b"19500101" not in written


@pytest.mark.parametrize(
    ("syntax", "frame"),
    [
        (uid.JPEGLosslessSV1, jpeg()[:-2]),
        (uid.JPEGLosslessSV1, SECRET + jpeg()),
        (uid.JPEGLosslessSV1, jpeg(segment(0xF5, SECRET))),
        (uid.JPEG2000Lossless, b"\0\0\0\x0cjP  \r\n\x87\n" + SECRET),
        (uid.JPEG2000Lossless, b"\xff\x4f" + segment(0x21, SECRET)),
        (uid.RLELossless, struct.pack("<16I", 1, 640, *[0] * 14) + SECRET),
        (uid.RLELossless, struct.pack("<16I", 16, *[64] * 15) + SECRET),
        (uid.MPEG4HP41, SECRET),
    ],
)
def test_a_stream_that_cannot_be_followed_is_held(deidentifier, syntax, frame):
    outcome, _ = done(deidentifier, compressed(syntax, encapsulate([frame])))
    assert outcome.held is not None
    assert "compressed" in outcome.held
    assert "SUZUKI" not in outcome.held


def in_main_header(stream: bytes) -> bytes:
    return stream[:2] + _siz(stream) + segment(0x64, b"\0\x01" + SECRET) + _after_siz(stream)


def in_tile_header(stream: bytes) -> bytes:
    comment = segment(0x64, b"\0\x01" + SECRET)
    at = stream.index(b"\xff\x90")
    (length,) = struct.unpack_from(">I", stream, at + 6)
    longer = struct.pack(">I", length + len(comment) if length else 0)
    return stream[: at + 6] + longer + stream[at + 10 : at + 12] + comment + stream[at + 12 :]


def _siz(stream: bytes) -> bytes:
    (length,) = struct.unpack_from(">H", stream, 4)
    return stream[2 : 4 + length]


def _after_siz(stream: bytes) -> bytes:
    return stream[2 + len(_siz(stream)) :]


def smooth() -> Dataset:
    """Return an image of which every compressed byte is needed."""
    dataset = ct(64)
    dataset.PixelData = np.add.outer(np.arange(64), np.arange(64)).astype("<u2").tobytes()
    return dataset


def frame_of(dataset: Dataset) -> bytes:
    return next(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1))


@pytest.mark.parametrize(
    "put", [in_main_header, in_tile_header, lambda stream: stream.rstrip(b"\0") + SECRET]
)
def test_comments_of_jpeg_2000_are_blanked_and_the_image_is_the_same(deidentifier, put):
    source = smooth()
    pixels = source.pixel_array.copy()
    source.compress(uid.JPEG2000Lossless, generate_instance_uid=False)
    dataset = compressed(uid.JPEG2000Lossless, encapsulate([put(frame_of(source))]))
    dataset.Rows = dataset.Columns = 64
    outcome, written = done(deidentifier, dataset)
    assert outcome.held is None
    assert SECRET not in written
    assert (pydicom.dcmread(io.BytesIO(written)).pixel_array == pixels).all()


@pytest.mark.parametrize("where", ["header", "after"])
def test_what_is_beside_the_runs_of_rle_is_blanked_and_the_image_is_the_same(deidentifier, where):
    source = smooth()
    pixels = source.pixel_array.copy()
    source.compress(uid.RLELossless, generate_instance_uid=False)
    clean = frame_of(source)
    frame = clean + SECRET if where == "after" else clean[:20] + SECRET + clean[42:]
    for secret, value in ((True, frame), (False, clean)):
        dataset = compressed(uid.RLELossless, encapsulate([value]))
        dataset.Rows = dataset.Columns = 64
        outcome, written = done(deidentifier, dataset)
        assert outcome.held is None
        assert SECRET not in written
        assert secret or outcome.dataset.PixelData == dataset.PixelData
        assert (pydicom.dcmread(io.BytesIO(written)).pixel_array == pixels).all()


def test_a_table_of_offsets_is_one_or_goes(deidentifier):
    frames = [jpeg(), jpeg()]
    text = SECRET + b".."
    value = struct.pack("<HHI", 0xFFFE, 0xE000, len(text)) + text
    value += b"".join(itemize_fragment(frame) for frame in frames)
    outcome, written = done(deidentifier, compressed(uid.JPEGLosslessSV1, value, 2))
    assert SECRET not in written
    assert outcome.held is None
    value, offsets, lengths = encapsulate_extended(frames)
    dataset = compressed(uid.JPEGLosslessSV1, value, 2)
    dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths = offsets, lengths
    assert done(deidentifier, dataset)[0].dataset.ExtendedOffsetTable == offsets
    dataset.ExtendedOffsetTable = SECRET[:15] + b"\0"
    outcome, written = done(deidentifier, dataset)
    assert b"SUZUKI" not in written
    assert "ExtendedOffsetTableLengths" not in outcome.dataset


def test_bytes_after_the_last_pixel_are_cut(deidentifier):
    dataset = ct()
    pixels = dataset.PixelData
    dataset.PixelData = pixels + SECRET
    outcome, written = done(deidentifier, dataset)
    assert SECRET not in written
    assert outcome.dataset.PixelData == pixels
    # One bit a pixel, an odd number of bytes: the pad is no pixel.
    dataset.BitsAllocated = dataset.BitsStored = 1
    dataset.HighBit, dataset.Rows, dataset.Columns = 0, 3, 5
    dataset.PixelData = b"\1\2" + SECRET
    assert done(deidentifier, dataset)[0].dataset.PixelData == b"\1\2"


def test_pixel_data_of_which_the_size_is_not_said_are_held(deidentifier):
    dataset = ct()
    del dataset.Rows
    assert "size" in str(done(deidentifier, dataset)[0].held)


@pytest.mark.parametrize("sequence", ["IconImageSequence", "ReferencedImageSequence"])
def test_thumbnails_and_other_pixel_data_in_items_go(deidentifier, sequence):
    dataset = ct()
    icon = item(Rows=8, Columns=8, BitsAllocated=8, BitsStored=8, HighBit=7)
    icon.PixelData = SECRET + bytes(42)
    setattr(dataset, sequence, Sequence([icon]))
    outcome, written = done(deidentifier, dataset)
    assert outcome.held is None
    assert SECRET not in written
    assert len([one for one in outcome.dataset.iterall() if one.keyword == "PixelData"]) == 1


def test_what_follows_the_data_set_goes(deidentifier):
    dataset = ct()
    dataset[0xFFFCFFFC] = pydicom.DataElement(0xFFFCFFFC, "OB", SECRET)
    assert SECRET not in done(deidentifier, dataset)[1]


@pytest.mark.parametrize("name", ["mr_small/MR_small_RLE.dcm"])
def test_a_real_compressed_image_is_not_changed(deidentifier, name):
    before = pydicom.dcmread(DATA / name)
    outcome = deidentifier.object(before, facility="F01")
    assert outcome.dataset.PixelData == before.PixelData
