"""Geometry of volumes, in DICOM patient coordinates (LPS, mm)."""
