// The planes of one series, fetched one by one and kept in memory only, within a bound.

import { request } from "./host";
import type { Values } from "./windowing";

export interface Plane {
  values: Values;
  rows: number;
  columns: number;
}

const KEEP_BYTES = 96 * 2 ** 20;

function decode(buffer: ArrayBuffer, type: string | null): Values {
  if (type === "int16") return new Int16Array(buffer);
  if (type === "float32") return new Float32Array(buffer);
  throw new Error(`The server sent values of the type ${type}; int16 or float32 was expected.`);
}

export class Planes {
  private readonly kept = new Map<number, Plane>();
  private readonly running = new Map<number, { result: Promise<Plane>; stop: AbortController }>();
  private bytes = 0;

  constructor(private readonly uid: string) {}

  get(index: number): Plane | undefined {
    return this.kept.get(index);
  }

  /** The plane, from memory or from the server. */
  fetch(index: number): Promise<Plane> {
    const kept = this.kept.get(index);
    if (kept) {
      // Newest last: what was not asked for longest is dropped first.
      this.kept.delete(index);
      this.kept.set(index, kept);
      return Promise.resolve(kept);
    }
    const running = this.running.get(index);
    if (running) return running.result;
    const stop = new AbortController();
    const result = this.load(index, stop.signal).finally(() => {
      if (this.running.get(index)?.stop === stop) this.running.delete(index);
    });
    this.running.set(index, { result, stop });
    return result;
  }

  /** Stop every request whose plane is not among those wanted. */
  keepOnly(wanted: ReadonlySet<number>): void {
    for (const [index, { stop }] of this.running) {
      if (wanted.has(index)) continue;
      this.running.delete(index);
      stop.abort();
    }
  }

  close(): void {
    this.keepOnly(new Set());
    this.kept.clear();
    this.bytes = 0;
  }

  private async load(index: number, signal: AbortSignal): Promise<Plane> {
    const path = `series/${encodeURIComponent(this.uid)}/slice/z/${index}`;
    const response = await request(path, signal);
    const shape = (response.headers.get("X-Kakehashi-Shape") ?? "").split(",").map(Number);
    const [rows = 0, columns = 0] = shape;
    const values = decode(await response.arrayBuffer(), response.headers.get("X-Kakehashi-Dtype"));
    if (values.length !== rows * columns) {
      throw new Error(`${values.length} values came, ${rows} x ${columns} were announced.`);
    }
    signal.throwIfAborted();
    const plane = { values, rows, columns };
    this.kept.set(index, plane);
    this.bytes += values.byteLength;
    for (const [oldest, { values: old }] of this.kept) {
      if (this.bytes <= KEEP_BYTES || oldest === index) break;
      this.kept.delete(oldest);
      this.bytes -= old.byteLength;
    }
    return plane;
  }
}
