"""Plans: deterministic, plausible, of people who come again."""

from __future__ import annotations

import io
from collections import Counter, defaultdict

import pydicom
import pytest

from kakehashi.errors import StoreError
from kakehashi.store.dicom import UID
from kakehashi.store.synthetic import FACILITIES, is_synthetic, plan_studies
from kakehashi.store.synthetic.people import HOSPITALS
from kakehashi.store.synthetic.reports import structured, text_of
from kakehashi.store.synthetic.scanners import CT_SHARE, MODELS, SHARE


@pytest.fixture(scope="module")
def plans():
    return plan_studies(3000, seed=7)


def test_the_same_arguments_give_the_same_plans_and_a_longer_list_begins_alike(plans):
    assert plan_studies(50, seed=7) == plans[:50]
    assert plan_studies(50, seed=8) != plans[:50]
    assert [p.study_uid for p in plan_studies(5, seed=7, size=128)] != [
        p.study_uid for p in plans[:5]
    ]


def test_facilities_and_vendors_come_in_their_proportions(plans):
    facilities = Counter(plan.facility for plan in plans)
    for name, percent in SHARE.items():
        assert abs(facilities[name] / 30 - percent) < 3
    vendors = defaultdict(Counter)
    for plan in plans:
        if plan.machine.ct:
            vendors[plan.facility][plan.machine.ct.vendor] += 1
    for name, shares in CT_SHARE.items():
        assert sum(shares.values()) == 100
        assert set(vendors[name]) == set(shares)
        whole = vendors[name].total()
        assert all(
            abs(100 * vendors[name][vendor] / whole - share) < 15
            for vendor, share in shares.items()
        )


def test_one_facility_alone(plans):
    only = plan_studies(40, seed=7, facility="F03")
    assert {plan.facility for plan in only} == {"F03"}
    assert not {plan.study_uid for plan in only} & {plan.study_uid for plan in plans}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": -1}, "0 or more"),
        ({"count": 1, "size": 500}, "512, 256, 128"),
        ({"count": 1, "facility": "F11"}, "F01, F02"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(StoreError, match=message):
        plan_studies(**arguments, seed=1)


def test_people_come_again_under_the_same_number_and_no_two_share_one(plans):
    people = defaultdict(set)
    numbers = defaultdict(set)
    for plan in plans:
        people[plan.facility, plan.person].add(plan.patient_id)
        numbers[plan.facility, plan.patient_id].add(plan.person)
    assert all(len(ids) == 1 for ids in people.values())
    assert all(len(who) == 1 for who in numbers.values())
    visits = Counter(plan.person.number for plan in plans)
    assert 0.1 < sum(n > 1 for n in visits.values()) / len(visits) < 0.4
    hospitals = defaultdict(set)
    for plan in plans:
        hospitals[plan.person.number].add(plan.facility)
    assert any(len(found) > 1 for found in hospitals.values())


def test_people_are_mostly_old_and_of_both_sexes(plans):
    ages = sorted(plan.age for plan in plans)
    assert 58 < ages[len(ages) // 2] < 72
    assert 0 <= ages[0] < 16
    assert ages[-1] < 105
    sexes = Counter(plan.person.sex for plan in plans)
    assert 0.4 < sexes["F"] / len(plans) < 0.55


def test_every_uid_is_valid_and_own(plans):
    found = [plan.study_uid for plan in plans]
    found += [plan.series_uid(series) for plan in plans for series in plan.series]
    assert all(UID.fullmatch(uid) for uid in found)
    assert len(set(found)) == len(found)


def test_kernels_and_models_are_those_of_the_vendor(plans):
    kernels = defaultdict(set)
    for model in MODELS:
        kernels[model.manufacturer, model.model] |= {kernel.name for kernel in model.kernels}
    for plan in plans:
        for series in plan.series:
            if series.kernel:
                assert series.kernel.name in kernels[plan.machine.manufacturer, plan.machine.model]
    used = {(plan.machine.model, s.kernel.name) for plan in plans for s in plan.series if s.kernel}
    assert len(used) > 40


@pytest.mark.parametrize("facility", FACILITIES)
def test_names_in_three_scripts_come_back_from_the_files_of_each_hospital(facility):
    seen = set()
    for plan in plan_studies(25, seed=3, facility=facility):
        series = next(item for item in plan.series if item.kind == "sr")
        file = io.BytesIO()
        found = structured(plan, series)
        found.file_meta = pydicom.dataset.FileMetaDataset()
        found.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        found.save_as(file)
        back = pydicom.dcmread(io.BytesIO(file.getvalue()), force=True)
        name = plan.person.name
        first = name.half_width if HOSPITALS[facility].half_width else name.romaji
        assert str(back.PatientName) == "=".join(
            "^".join(group) for group in (first, name.kanji, name.kana)
        )
        assert back.InstitutionName == HOSPITALS[facility].name
        text = back.ContentSequence[1].ContentSequence[0].TextValue
        assert text.endswith(("認めません。", "目立ちません。"))
        assert is_synthetic(back)
        seen.add(str(back.PatientName))
        assert " ".join(name.kana) in text_of(plan)
    assert len(seen) > 8
