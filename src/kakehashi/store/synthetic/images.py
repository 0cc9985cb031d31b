"""CT, MR and PET slices as DICOM objects."""

from __future__ import annotations

import datetime as dt
import math
from typing import TYPE_CHECKING

import numpy as np
from pydicom import Dataset, uid

from kakehashi.store.synthetic.headers import code, common, image_pixels, items, moment_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kakehashi.store.synthetic.plan import Plan
    from kakehashi.store.synthetic.protocols import SeriesPlan
    from kakehashi.store.synthetic.scan import Grid

HALF_LIFE_S = 6586.2
"""Of fluorine-18, seconds."""

_UPTAKE_S = 3600
_MR_TIMES = {"t1": (500.0, 10.0, 90), "t2": (4200.0, 95.0, 120), "dwi": (5200.0, 78.0, 90)}


def frame(dataset: Dataset, plan: Plan, series: SeriesPlan, grid: Grid) -> None:
    """Add what places all slices of a series in the patient."""
    dataset.FrameOfReferenceUID = plan.frame_uid(series)
    dataset.PositionReferenceIndicator = ""
    dataset.PatientPosition = "HFS"
    dataset.ImageOrientationPatient = [1, 0, 0, *grid.column]
    dataset.PixelSpacing = [grid.spacing, grid.spacing]
    dataset.SliceThickness = series.thickness


def place(
    dataset: Dataset, plan: Plan, series: SeriesPlan, grid: Grid, at: tuple[int, int]
) -> None:
    """Add what places one slice, and names it.

    Parameters
    ----------
    at : tuple of int
        Volume and slice, from 0.
    """
    volume, k = at
    count = grid.slices
    down = plan.machine.ct is None or plan.machine.ct.first_at_head or series.kind == "pet"
    place_in_volume = count - k if down else k + 1
    dataset.SOPInstanceUID = plan.uid("image", series.number, volume, k)
    dataset.InstanceNumber = volume * count + place_in_volume
    position = grid.position(k)
    dataset.ImagePositionPatient = list(position)
    dataset.SliceLocation = round(position[1 if series.kind == "reformat" else 2], 3)


def ct_base(plan: Plan, series: SeriesPlan, grid: Grid) -> Dataset:
    """Return what the slices of a CT series have in common."""
    machine = plan.machine
    model, kernel = machine.ct, series.kernel
    assert model is not None  # noqa: S101 # a CT series is planned on a CT scanner
    found = common(plan, series, uid.CTImageStorage, machine)
    frame(found, plan, series, grid)
    kinds = {
        "reformat": ["DERIVED", "SECONDARY", "MPR"],
        "localizer": ["ORIGINAL", "PRIMARY", "LOCALIZER"],
    }
    found.ImageType = kinds.get(series.kind, ["ORIGINAL", "PRIMARY", "AXIAL"])
    found.BodyPartExamined = series.body_part
    found.ProtocolName = series.description
    found.KVP = series.kvp
    found.XRayTubeCurrent = round(series.mas * 2)
    found.ExposureTime = 500
    found.Exposure = round(series.mas)
    found.DataCollectionDiameter = 500
    found.ReconstructionDiameter = series.fov_mm
    found.GantryDetectorTilt = series.tilt_deg
    found.TableHeight = 150
    found.RotationDirection = "CW"
    found.FilterType = "BODY FILTER" if series.body_part != "HEAD" else "HEAD FILTER"
    found.ScanOptions = "HELICAL_CT" if not series.tilt_deg else "AXIAL_CT"
    if kernel:
        found.ConvolutionKernel = kernel.name.split("\\")
    if set(series.phases) - {"plain"}:
        found.ContrastBolusAgent = "イオパミロン370"
        found.ContrastBolusRoute = "IV"
        found.ContrastBolusVolume = 100
    stored = 12 if not model.signed and model.intercept == -1024 else 16
    image_pixels(found, grid.rows, grid.columns, stored=stored, signed=model.signed)
    found.RescaleIntercept = model.intercept
    found.RescaleSlope = 1
    if series.kind != "localizer":
        found.RescaleType = "HU"
    if model.padding is not None:
        found.add_new("PixelPaddingValue", "SS", model.padding)
    centre, width = (-600, 1600) if kernel and kernel.use == "lung" else (40, 350)
    found.WindowCenter, found.WindowWidth = centre, width
    found.LossyImageCompression = "00"
    return found


def ct_slice(
    base: Dataset, plan: Plan, series: SeriesPlan, hounsfield: NDArray[np.int16], volume: int
) -> None:
    """Put the pixels of one slice, in HU, into the dataset.

    What lies outside the circle that was reconstructed has the lowest value, or the maker's
    padding.
    """
    model = plan.machine.ct
    assert model is not None  # noqa: S101 # a CT series is planned on a CT scanner
    stored = hounsfield.astype(np.int32) - round(model.intercept)
    if series.kind == "ct":
        rows, columns = stored.shape
        j, i = np.ogrid[:rows, :columns]
        outside = np.hypot(j - (rows - 1) / 2, i - (columns - 1) / 2) > rows / 2
        stored[outside] = model.padding if model.padding is not None else -1024 - model.intercept
    base.PixelData = stored.astype("<i2" if model.signed else "<u2").tobytes()
    moment = moment_of(plan, series) + dt.timedelta(seconds=35 * volume)
    base.AcquisitionNumber = volume + 1
    base.AcquisitionDate = base.ContentDate = moment.strftime("%Y%m%d")
    base.AcquisitionTime = base.ContentTime = moment.strftime("%H%M%S")


def mr_base(plan: Plan, series: SeriesPlan, grid: Grid) -> Dataset:
    """Return what the slices of an MR series have in common."""
    found = common(plan, series, uid.MRImageStorage, plan.machine)
    frame(found, plan, series, grid)
    weighting = "dwi" if series.phases[0].startswith("b") else series.phases[0]
    repetition, echo, flip = _MR_TIMES[weighting]
    found.ImageType = ["ORIGINAL", "PRIMARY", "M" if weighting != "dwi" else "DIFFUSION"]
    found.BodyPartExamined = series.body_part
    found.ProtocolName = series.description
    found.ScanningSequence = "EP" if weighting == "dwi" else "SE"
    found.SequenceVariant = "SK"
    found.ScanOptions = "FS" if weighting == "dwi" else ""
    found.MRAcquisitionType = "2D"
    found.RepetitionTime = repetition
    found.EchoTime = echo
    found.EchoTrainLength = 1 if weighting == "t1" else 16
    found.FlipAngle = flip
    found.MagneticFieldStrength = plan.machine.tesla
    found.ImagingFrequency = round(42.577 * plan.machine.tesla, 4)
    found.ImagedNucleus = "1H"
    found.NumberOfAverages = 1
    found.SpacingBetweenSlices = series.interval
    found.PixelBandwidth = 230
    image_pixels(found, grid.rows, grid.columns, stored=12, signed=False)
    found.WindowCenter, found.WindowWidth = 500, 1000
    found.LossyImageCompression = "00"
    return found


def mr_slice(
    base: Dataset, plan: Plan, series: SeriesPlan, signal: NDArray[np.float32], volume: int
) -> None:
    """Put the pixels of one slice into the dataset."""
    base.PixelData = np.clip(np.rint(signal), 0, 4095).astype("<u2").tobytes()
    base.AcquisitionNumber = volume + 1
    moment = moment_of(plan, series) + dt.timedelta(seconds=90 * volume)
    base.AcquisitionDate = base.ContentDate = moment.strftime("%Y%m%d")
    base.AcquisitionTime = base.ContentTime = moment.strftime("%H%M%S")
    phase = series.phases[volume]
    if phase.startswith("b"):
        base.DiffusionBValue = float(phase[1:])
        base.DiffusionDirectionality = "NONE" if phase == "b0" else "ISOTROPIC"


def dose_bq(plan: Plan) -> float:
    """Return the activity that was injected: 3.7 MBq per kg."""
    return round(plan.person.weight_kg * 3.7e6, -3)


def suv_factor(plan: Plan) -> float:
    """Return the Bq/ml at the series' begin that are an SUV (body weight) of 1."""
    left = dose_bq(plan) * math.pow(2, -_UPTAKE_S / HALF_LIFE_S)
    return left / (plan.person.weight_kg * 1000)


def pet_base(plan: Plan, series: SeriesPlan, grid: Grid) -> Dataset:
    """Return what the slices of a PET series have in common."""
    found = common(plan, series, uid.PositronEmissionTomographyImageStorage, plan.pet_machine)
    frame(found, plan, series, grid)
    begin = moment_of(plan, series)
    injected = begin - dt.timedelta(seconds=_UPTAKE_S)
    # PET says the position in the codes below.
    del found.PatientPosition
    found.ImageType = ["ORIGINAL", "PRIMARY"]
    found.BodyPartExamined = series.body_part
    found.AcquisitionDate = found.ContentDate = begin.strftime("%Y%m%d")
    found.AcquisitionTime = found.ContentTime = begin.strftime("%H%M%S")
    found.Units = "BQML"
    found.CountsSource = "EMISSION"
    found.SeriesType = ["WHOLE BODY", "IMAGE"]
    found.NumberOfSlices = grid.slices
    found.CorrectedImage = ["NORM", "DTIM", "ATTN", "SCAT", "DECY", "RAN"]
    found.RandomsCorrectionMethod = "DLYD"
    found.AttenuationCorrectionMethod = "CT"
    found.ScatterCorrectionMethod = "Model-based"
    found.DecayCorrection = "START"
    found.ReconstructionMethod = "OSEM+TOF 3i5s"
    found.CollimatorType = "NONE"
    found.FrameReferenceTime = 60_000
    found.ActualFrameDuration = 120_000
    found.DecayFactor = 1.0
    isotope = Dataset()
    isotope.Radiopharmaceutical = "FDG"
    isotope.RadiopharmaceuticalStartTime = injected.strftime("%H%M%S")
    isotope.RadiopharmaceuticalStartDateTime = injected.strftime("%Y%m%d%H%M%S")
    isotope.RadionuclideTotalDose = dose_bq(plan)
    isotope.RadionuclideHalfLife = HALF_LIFE_S
    isotope.RadionuclidePositronFraction = 0.967
    isotope.RadionuclideCodeSequence = items(code("77004003", "SCT", "^18^Fluorine"))
    found.RadiopharmaceuticalInformationSequence = items(isotope)
    orientation = code("102538003", "SCT", "recumbent")
    orientation.PatientOrientationModifierCodeSequence = items(code("40199007", "SCT", "supine"))
    found.PatientOrientationCodeSequence = items(orientation)
    found.PatientGantryRelationshipCodeSequence = items(code("102540008", "SCT", "headfirst"))
    image_pixels(found, grid.rows, grid.columns, stored=16, signed=True)
    found.RescaleIntercept = 0
    found.LossyImageCompression = "00"
    return found


def pet_slice(base: Dataset, suv: NDArray[np.float32], factor: float) -> None:
    """Put the pixels of one slice, given as SUV, into the dataset; each slice has a slope."""
    activity = np.clip(suv.astype(np.float64), 0, None) * factor
    slope = float(f"{max(float(activity.max()), 1.0) / 32767 * 1.0001:.6g}")
    base.RescaleSlope = slope
    base.PixelData = np.rint(activity / slope).astype("<i2").tobytes()
    base.ImageIndex = base.InstanceNumber
