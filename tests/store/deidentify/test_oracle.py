"""An independent tool as oracle: what it takes away is not in our output as it was."""

from __future__ import annotations

import copy
import io

import pydicom
import pytest
from dicomanonymizer import anonymize_dataset
from dicomanonymizer.simpledicomanonymizer import initialize_actions
from pydicom._uid_dict import UID_dictionary

from kakehashi.store.deidentify.actions import Action, rule_of, table_actions
from tests.store.conftest import DATA
from tests.store.deidentify.plants import planted

KEPT = {Action.NUMBER, Action.TEXT, Action.DEVICE, Action.CLEAN, Action.AGE}
"""What options let stay where the Basic Profile alone would take it away."""

FILES = [
    "ct_chest/1-20.dcm",
    "ct_enhanced/eCT_Supplemental.dcm",
    "ct_tilted/axial/I110",
    "ct_tiny/17106",
    "mr_adc/1-01.dcm",
    "pet_uneven/1-128.dcm",
    "seg_tiny/seg_image_ct_binary.dcm",
    "sts/CT/mask/RS.dcm",
]


def values(dataset: pydicom.Dataset, path: tuple = ()) -> dict[tuple, str]:
    found = {}
    for element in dataset:
        if element.VR == "SQ":
            for number, item in enumerate(element.value):
                found |= values(item, (*path, int(element.tag), number))
        elif element.value not in (None, "", b"") and element.tag.group != 0x7FE0:
            found[(*path, int(element.tag))] = str(element.value)
    return found


def _newest() -> dict:
    return initialize_actions("dicomfields_2026c")


def check(deidentifier, dataset: pydicom.Dataset) -> int:
    before = values(dataset)
    theirs = copy.deepcopy(dataset)
    anonymize_dataset(theirs, base_rules_gen=_newest, delete_private_tags=True)
    after = values(theirs)
    ours = values(deidentifier.object(dataset, facility="F01").dataset)
    gone = {path: value for path, value in before.items() if after.get(path) != value}
    assert gone
    for path, value in gone.items():
        tag = path[-1]
        rule = rule_of(tag)
        if ours.get(path) != value:
            continue
        # What stays is private and safe, a time of day, or the documented options'.
        kept = (
            tag >> 16 & 1
            or rule.vr == "TM"
            or value in UID_dictionary
            or (table_actions().get(tag) in KEPT)
            or any(part == 0x0040A730 for part in path[:-1])
        )
        assert kept, f"{tag:08X} {value}"
    return len(gone)


@pytest.mark.parametrize("name", FILES)
def test_what_the_oracle_takes_from_real_objects_does_not_stay(deidentifier, name):
    assert check(deidentifier, pydicom.dcmread(DATA / name)) >= 5


def test_what_the_oracle_takes_from_a_planted_object_does_not_stay(deidentifier):
    dataset = pydicom.dcmread(io.BytesIO(planted().write("utf8")))
    # The oracle stops at the elements that are of another VR than they should be.
    for tag in (0x00281201, 0x00182010, 0x00182010):
        dataset.pop(tag, None)
    assert check(deidentifier, dataset) >= 60


def test_every_attribute_of_the_table_has_an_action():
    table = _newest()
    plain = {group << 16 | element for group, element, *masks in table if not masks}
    assert plain == set(table_actions())
    for tag in plain:
        rule = rule_of(tag)
        if not rule.vr:
            assert rule.action is Action.REMOVE
    for group in (0x5000, 0x5002, 0x6000, 0x601E):
        assert rule_of(group << 16 | 0x3000).action is Action.REMOVE
