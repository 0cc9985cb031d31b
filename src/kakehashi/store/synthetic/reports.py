"""Reports (所見) in Japanese: as plain text and as DICOM SR."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydicom import Dataset, uid

from kakehashi.store.synthetic.headers import code, common, items
from kakehashi.store.synthetic.protocols import PROTOCOLS

if TYPE_CHECKING:
    from kakehashi.store.synthetic.plan import Plan
    from kakehashi.store.synthetic.protocols import SeriesPlan

_PLACES = {
    "lung_right": "右肺",
    "lung_left": "左肺",
    "liver": "肝",
    "hemisphere_right": "右大脳半球",
    "hemisphere_left": "左大脳半球",
}
_LOOKS = {
    "nodule": ("充実性結節", "肺腫瘍の可能性があります。"),
    "metastasis": ("低吸収腫瘤", "転移性腫瘍を疑います。"),
    "carcinoma": ("早期濃染を示す腫瘤", "肝細胞癌を疑います。"),
    "cyst": ("境界明瞭な嚢胞", "単純性嚢胞と考えます。"),
    "bleeding": ("出血", "脳内出血です。"),
    "infarct": ("低吸収域", "脳梗塞を疑います。"),
}
_SEXES = {"M": "男性", "F": "女性"}
_NORMAL = {
    "torso": "明らかなリンパ節腫大は認めません。胸水・腹水は認めません。",
    "head": "正中構造の偏位は認めません。脳室の拡大は目立ちません。",
}


def findings_of(plan: Plan) -> tuple[str, str]:
    """Return the findings and the impression, in Japanese."""
    about = PROTOCOLS[plan.protocol]
    lines = [
        f"{_PLACES[finding.organ]}に長径{finding.diameter_mm:.0f}mmの"
        f"{_LOOKS[finding.tissue][0]}を認めます。"
        for finding in plan.findings
    ]
    if plan.metal:
        lines.append("金属によるアーチファクトがあります。")
    lines.append(_NORMAL[about.body])
    seen = dict.fromkeys(_LOOKS[finding.tissue][1] for finding in plan.findings)
    return "".join(lines), "".join(seen) or "特記すべき異常は認めません。"


def text_of(plan: Plan) -> str:
    """Return the whole report as a hospital prints it, names and numbers included."""
    who = plan.person
    findings, impression = findings_of(plan)
    family, given = who.name.kanji
    return "\n".join(
        [
            f"{plan.hospital.name} 画像診断報告書",
            f"患者ID: {plan.patient_id}",
            f"患者氏名: {family} {given}({' '.join(who.name.kana)}) {' '.join(who.name.romaji)}",
            f"生年月日: {who.birth:%Y年%m月%d日} {plan.age}歳 {_SEXES[who.sex]}",
            f"検査日: {plan.moment:%Y年%m月%d日} 検査: {PROTOCOLS[plan.protocol].japanese}",
            f"依頼医: {' '.join(plan.referring.kanji)}  読影医: {' '.join(plan.reading.kanji)}",
            f"所見: {findings}",
            f"診断: {family}様の検査です。{impression}",
            "(合成データ)",
            "",
        ]
    )


def structured(plan: Plan, series: SeriesPlan) -> Dataset:
    """Return the report as Basic Text SR."""
    found = common(plan, series, uid.BasicTextSRStorage, None)
    found.SOPInstanceUID = plan.uid("sr")
    found.InstanceNumber = 1
    found.ContentDate = found.SeriesDate
    found.ContentTime = found.SeriesTime
    found.CompletionFlag = "COMPLETE"
    found.VerificationFlag = "VERIFIED"
    found.ReferencedPerformedProcedureStepSequence = items()
    found.PerformedProcedureCodeSequence = items()
    observer = Dataset()
    observer.VerifyingObserverName = plan.reading.dicom(half_width=plan.hospital.half_width)
    observer.VerifyingObserverIdentificationCodeSequence = items()
    observer.VerifyingOrganization = plan.hospital.name
    observer.VerificationDateTime = plan.moment.strftime("%Y%m%d%H%M%S")
    found.VerifyingObserverSequence = items(observer)

    found.ValueType = "CONTAINER"
    found.ConceptNameCodeSequence = items(code("18748-4", "LN", "Diagnostic imaging report"))
    found.ContinuityOfContent = "SEPARATE"
    language = Dataset()
    language.RelationshipType = "HAS CONCEPT MOD"
    language.ValueType = "CODE"
    language.ConceptNameCodeSequence = items(
        code("121049", "DCM", "Language of Content Item and Descendants")
    )
    language.ConceptCodeSequence = items(code("ja", "RFC5646", "Japanese"))
    findings, impression = findings_of(plan)
    who = f"{' '.join(plan.person.name.kanji)}様({plan.patient_id})"
    found.ContentSequence = items(
        language,
        _section("121070", "Findings", _text("121071", "Finding", findings)),
        _section("121072", "Impressions", _text("121073", "Impression", f"{who} {impression}")),
    )
    return found


def _section(value: str, meaning: str, inner: Dataset) -> Dataset:
    item = Dataset()
    item.RelationshipType = "CONTAINS"
    item.ValueType = "CONTAINER"
    item.ConceptNameCodeSequence = items(code(value, "DCM", meaning))
    item.ContinuityOfContent = "SEPARATE"
    item.ContentSequence = items(inner)
    return item


def _text(value: str, meaning: str, text: str) -> Dataset:
    item = Dataset()
    item.RelationshipType = "CONTAINS"
    item.ValueType = "TEXT"
    item.ConceptNameCodeSequence = items(code(value, "DCM", meaning))
    item.TextValue = text
    return item
