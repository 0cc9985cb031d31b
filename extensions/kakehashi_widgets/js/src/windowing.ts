// From values to grey: DICOM PS3.3 C.11.2.1.3.2, LINEAR_EXACT, to 8 bits, halves rounded up.

export interface Window {
  width: number;
  level: number;
}

export type Values = Int16Array | Float32Array;

function grey(value: number, { width, level }: Window): number {
  const shade = Math.floor(((value - level) / width + 0.5) * 255 + 0.5);
  return shade > 255 ? 255 : shade > 0 ? shade : 0;
}

/** Write the plane as opaque grey pixels into `rgba` (one 32-bit word a pixel). */
export function paint(values: Values, window: Window, rgba: Uint32Array): void {
  if (values instanceof Int16Array) {
    const table = new Uint32Array(65536);
    for (let value = -32768; value < 32768; value++) {
      table[value + 32768] = 0xff000000 | (grey(value, window) * 0x010101);
    }
    for (let n = 0; n < values.length; n++) {
      rgba[n] = table[(values[n] ?? 0) + 32768] ?? 0;
    }
  } else {
    for (let n = 0; n < values.length; n++) {
      rgba[n] = 0xff000000 | (grey(values[n] ?? 0, window) * 0x010101);
    }
  }
}

export interface Preset extends Window {
  english: string;
  nihongo: string;
}

/** The presets that fit a modality; `hint` is the server's own for this series. */
export function presets(modality: string, hint: Window): Preset[] {
  if (modality === "CT") {
    return [
      { english: "Soft tissue", nihongo: "軟部", width: 400, level: 40 },
      { english: "Lung", nihongo: "肺", width: 1500, level: -600 },
      { english: "Bone", nihongo: "骨", width: 1800, level: 400 },
      { english: "Brain", nihongo: "脳", width: 80, level: 40 },
    ];
  }
  return [{ english: "Auto", nihongo: "自動", ...hint }];
}
