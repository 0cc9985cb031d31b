// Patient coordinates are DICOM's: LPS, in mm. A voxel index is (i, j, k) = (column, row, slice).

export type Affine = number[][];
export type Triple = [number, number, number];

/** Position in mm (LPS) of a voxel index, which may be fractional. */
export function toPatient(affine: Affine, [i, j, k]: Triple): Triple {
  const along = (row: number[]): number =>
    (row[0] ?? 0) * i + (row[1] ?? 0) * j + (row[2] ?? 0) * k + (row[3] ?? 0);
  return [along(affine[0] ?? []), along(affine[1] ?? []), along(affine[2] ?? [])];
}

const POSITIVE = ["L", "P", "H"];
const NEGATIVE = ["R", "A", "F"];
// A direction is named by a second letter too where it leans by more than about 20 degrees.
const LEANS = Math.sin((20 * Math.PI) / 180);

/**
 * Letters of the direction in which an index grows (DICOM PS3.3 C.7.6.1.1.1): the strongest
 * component first.
 */
export function letters(affine: Affine, axis: 0 | 1 | 2, sign: 1 | -1): string {
  const direction = [0, 1, 2].map((row) => sign * (affine[row]?.[axis] ?? 0));
  const length = Math.hypot(...direction);
  if (!(length > 0)) return "";
  return direction
    .map((value, row) => ({ share: Math.abs(value) / length, row, value }))
    .filter((part) => part.share > LEANS)
    .sort((a, b) => b.share - a.share)
    .map((part) => (part.value > 0 ? POSITIVE : NEGATIVE)[part.row] ?? "")
    .join("");
}
