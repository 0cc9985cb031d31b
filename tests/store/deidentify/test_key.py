from __future__ import annotations

import pickle
import threading

import pytest
from pydicom import uid

from kakehashi.errors import StoreError
from kakehashi.secret import Secret
from kakehashi.store.deidentify import Deidentifier, load_key


def test_a_key_is_made_once_with_mode_600_and_stays(tmp_path):
    path = tmp_path / "key"
    key = load_key(path, create=True)
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(bytes.fromhex(key.reveal())) == 32
    assert load_key(path) == key == load_key(path, create=True)
    assert [file.name for file in tmp_path.iterdir()] == ["key"]


def test_of_many_that_make_a_key_at_once_all_get_the_same(tmp_path):
    start = threading.Barrier(8)
    keys = []

    def make() -> None:
        start.wait()
        keys.append(load_key(tmp_path / "key", create=True).reveal())

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 8
    assert len(set(keys)) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["key"]


def test_a_key_is_never_shown(tmp_path):
    key = load_key(tmp_path / "key", create=True)
    assert key.reveal() not in f"{key} {key!r} {Deidentifier(key)!r} {vars(Deidentifier(key))}"
    with pytest.raises(TypeError):
        pickle.dumps(key)


@pytest.mark.parametrize("content", ["", "00" * 31, "zz" * 32, "00" * 33])
def test_a_file_that_is_no_key_is_refused_without_showing_it(tmp_path, content):
    path = tmp_path / "key"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(StoreError, match="not a key") as error:
        load_key(path)
    assert not content or content not in str(error.value)


def test_a_key_that_others_can_read_is_refused(tmp_path):
    load_key(tmp_path / "key", create=True)
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(StoreError, match="chmod 600"):
        load_key(tmp_path / "key")


def test_a_missing_key_or_a_link_is_refused(tmp_path):
    with pytest.raises(StoreError, match="cannot be read"):
        load_key(tmp_path / "none")
    load_key(tmp_path / "key", create=True)
    (tmp_path / "link").symlink_to(tmp_path / "key")
    with pytest.raises(StoreError, match="cannot be read"):
        load_key(tmp_path / "link")


def test_one_person_of_one_facility_is_one_pseudonym(deidentifier):
    first = deidentifier.patient_id("F01", "12345")
    assert first == deidentifier.patient_id("F01", " 12345 ")
    others = [("F02", "12345"), ("F01", "12346"), ("F0", "112345"), ("F011", "2345"), ("F01", "")]
    made = {deidentifier.patient_id(*other) for other in others}
    assert len(made | {first}) == 6
    assert all(len(one) == 17 and one[0] == "K" and one.isalnum() for one in made)


def test_another_key_gives_other_pseudonyms(deidentifier):
    other = Deidentifier(Secret("5b" * 32))
    assert other.patient_id("F01", "1") != deidentifier.patient_id("F01", "1")
    assert other.uid("1.2.3") != deidentifier.uid("1.2.3")


def test_uids_are_valid_stable_and_registered_ones_stay(deidentifier):
    made = {deidentifier.uid(f"1.2.392.{number}") for number in range(200)}
    assert len(made) == 200
    assert all(uid.UID(one).is_valid and one.startswith("2.25.") for one in made)
    assert deidentifier.uid("1.2.392.1") == deidentifier.uid("1.2.392.1\0")
    assert deidentifier.uid(uid.CTImageStorage) == uid.CTImageStorage
    assert deidentifier.uid(uid.JPEG2000Lossless) == uid.JPEG2000Lossless
    assert deidentifier.uid("") == ""


def test_days_are_whole_weeks_within_bounds(deidentifier):
    days = [deidentifier.shift_days("F01", str(number)) for number in range(3000)]
    assert all(day % 7 == 0 and -3640 <= day <= -364 for day in days)
    assert len(set(days)) > 400
    assert deidentifier.shift_days("F01", "7") == deidentifier.shift_days("F01", "7 ")
