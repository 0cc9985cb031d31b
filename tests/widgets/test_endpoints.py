"""The server extension over HTTP, in a real JupyterLab, reading through a real SFTP server."""

from __future__ import annotations

import numpy as np
import pytest

from tests.widgets.conftest import Shore
from tests.widgets.lab import Lab


def plane(lab: Lab, uid: str, axis: str, index: int, level: int = 0) -> np.ndarray:
    answer = lab.get(f"kakehashi/series/{uid}/slice/{axis}/{index}?level={level}")
    assert answer.status_code == 200, answer.text
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["Content-Encoding"] == "gzip"
    shape = [int(n) for n in answer.headers["X-Kakehashi-Shape"].split(",")]
    dtype = np.dtype(answer.headers["X-Kakehashi-Dtype"]).newbyteorder("<")
    return np.frombuffer(answer.content, dtype).reshape(shape)


@pytest.mark.parametrize("name", ["ct", "mr", "pet", "tilted"])
def test_each_plane_is_the_stores_own(lab: Lab, shore: Shore, name: str) -> None:
    uid = getattr(shore, name)
    volume = shore.pack(uid).values()
    for axis, length in zip("zyx", volume.shape, strict=True):
        for index in (0, length // 2, length - 1):
            got = plane(lab, uid, axis, index)
            np.testing.assert_array_equal(got, volume.take(index, axis="zyx".index(axis)))


def test_ct_travels_in_two_bytes_a_voxel(lab: Lab, shore: Shore) -> None:
    assert plane(lab, shore.ct, "z", 0).dtype == np.int16


def test_a_coarser_level_is_the_packs_own(lab: Lab, shore: Shore) -> None:
    pack = shore.pack(shore.pet)
    np.testing.assert_array_equal(plane(lab, shore.pet, "z", 1, level=1), pack.slice(1, 1))


def test_description(lab: Lab, shore: Shore) -> None:
    answer = lab.get(f"kakehashi/series/{shore.ct}")
    assert answer.headers["Cache-Control"] == "no-store"
    pack, got = shore.pack(shore.ct), answer.json()
    assert got["uid"] == shore.ct
    assert tuple(got["shape"]) == pack.shape
    np.testing.assert_array_equal(got["affine_lps"], pack.affine_lps)
    assert tuple(got["spacing_mm"]) == pack.spacing_mm
    assert (got["modality"], got["unit"]) == ("CT", "HU")
    assert got["window"] == {"width": 400, "level": 40}


@pytest.mark.parametrize("name", ["mr", "pet"])
def test_a_window_without_a_fixed_scale_fits_the_values(lab: Lab, shore: Shore, name: str) -> None:
    uid = getattr(shore, name)
    hint = lab.get(f"kakehashi/series/{uid}").json()["window"]
    values = shore.pack(uid).values()
    white = (values >= hint["level"] + hint["width"] / 2).mean()
    assert 0 < white < 0.05
    assert hint["width"] > 0


def test_cohort(lab: Lab, shore: Shore) -> None:
    answer = lab.get("kakehashi/cohort")
    assert answer.headers["Cache-Control"] == "no-store"
    rows = answer.json()["rows"]
    assert [row["uid"] for row in rows] == [
        shore.ct,
        shore.mr,
        shore.pet,
        shore.tilted,
        shore.spare,
    ]
    assert [row["modality"] for row in rows] == ["CT", "MR", "PT", "CT", "CT"]


def test_session_clock_follows_the_lease(lab: Lab) -> None:
    first = lab.get("kakehashi/session").json()
    assert (first["person"], first["project"], first["site"]) == ("alice", "lung", "here")
    assert first["lease"]["state"] == "live"
    try:
        lab.session.lease(ends_in_s=60, state="offline", message="The hub cannot be reached.")
        later = lab.get("kakehashi/session").json()
        assert later["lease"]["state"] == "offline"
        assert later["lease"]["message"] == "The hub cannot be reached."
        assert later["ends_at"] < first["ends_at"]
    finally:
        lab.session.lease(ends_in_s=7200)


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("kakehashi/series/1.2.3", 404, "not in this session's cohort"),
        ("kakehashi/series/1.2.3/slice/z/0", 404, "not in this session's cohort"),
        ("kakehashi/series/{ct}/slice/z/12", 400, "there are 0 to 11"),
        ("kakehashi/series/{ct}/slice/w/0", 400, "axis 'w' is not one of z, y, x"),
        ("kakehashi/series/{ct}/slice/z/-1", 400, "the index must be a whole number"),
        ("kakehashi/series/{ct}/slice/z/1e3", 400, "the index must be a whole number"),
        ("kakehashi/series/{ct}/slice/z/%EF%BC%91", 400, "the index must be a whole number"),
        ("kakehashi/series/{ct}/slice/z/0?level=3", 400, "there are 0 to 2"),
        ("kakehashi/series/{ct}/slice/z/0?level=x", 400, "level must be a whole number"),
        ("kakehashi/series/..%2f..%2fmanifest", 404, ""),
    ],
)
def test_a_refusal_says_why(lab: Lab, shore: Shore, path: str, status: int, words: str) -> None:
    answer = lab.get(path.format(ct=shore.ct))
    assert answer.status_code == status
    if words:
        assert words in answer.json()["message"]
        assert answer.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("path", ["cohort", "session", "series/{ct}", "series/{ct}/slice/z/0"])
def test_nothing_without_the_persons_log_in(lab: Lab, shore: Shore, path: str) -> None:
    path = f"kakehashi/{path.format(ct=shore.ct)}"
    assert lab.get(path).status_code == 200
    assert lab.get(path, headers={"Authorization": "token wrong"}).status_code == 403


def test_bytes_changed_at_the_store_are_never_shown(lab: Lab, shore: Shore) -> None:
    # A series that no other test reads: what was read once is in memory, checked.
    path = f"kakehashi/series/{shore.spare}/slice/z/0"
    file = shore.store.root / "series" / f"{shore.spare}.ozx"
    original = file.read_bytes()
    try:
        file.write_bytes(bytes(byte ^ 1 for byte in original))
        answer = lab.get(path)
    finally:
        file.write_bytes(original)
    assert answer.status_code == 502
    assert "not those of the manifest" in answer.json()["message"]
    # The control: undamaged, the same request is answered.
    np.testing.assert_array_equal(plane(lab, shore.spare, "z", 0), shore.pack(shore.spare).slice(0))


def test_a_request_that_the_browser_drops_leaves_the_server_well(lab: Lab, shore: Shore) -> None:
    for k in range(12):
        with lab.get(f"kakehashi/series/{shore.ct}/slice/x/{k * 40}", stream=True) as answer:
            answer.raw.close()
    plane(lab, shore.ct, "z", 3)
    assert "Traceback" not in lab.log.read_text()
