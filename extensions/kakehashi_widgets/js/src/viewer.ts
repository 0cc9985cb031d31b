// One plane of a series at a time: slices by wheel, keys and slider, window by drag and presets.

import { type Affine, letters, toPatient } from "./geometry";
import { type Model, type RenderContext, h, requestJson, say, uniqueId, words } from "./host";
import { type Plane, Planes } from "./planes";
import { type Preset, paint, presets } from "./windowing";

interface State {
  uid: string;
  index: number | null;
  window: number | null;
  level: number | null;
}

interface Series {
  uid: string;
  modality: string;
  description: string;
  shape: [number, number, number];
  spacing_mm: [number, number, number];
  affine_lps: Affine;
  unit: string;
  window: { width: number; level: number };
}

const AHEAD = 4;
const BEHIND = 2;
const NARROWEST = 1e-3;
const MOST_ZOOM = 16;
// A wheel's notch is one slice; a touch pad's many small steps add up to one.
const NOTCH_PIXELS = 40;

const HELP = say(
  "Wheel or arrow keys: slices. Drag: window and level. Ctrl+wheel or + and -: zoom. " +
    "Shift+drag: move. 1 to 4: presets. R: reset.",
  "ホイールまたは矢印キー：スライス　ドラッグ：ウィンドウ幅・レベル　Ctrl＋ホイールまたは＋／−：拡大縮小　" +
    "Shift＋ドラッグ：移動　1〜4：プリセット　R：リセット",
);

function short(value: number): string {
  const size = Math.abs(value);
  if (Number.isInteger(value) || size >= 1000) return value.toFixed(0);
  return size >= 10 ? value.toFixed(1) : value.toPrecision(3);
}

class Viewer {
  private series: Series | undefined;
  private planes: Planes | undefined;
  private offered: Preset[] = [];
  private shown: Plane | undefined;
  private shownIndex = -1;
  private direction = 1;
  private zoom = 1;
  private shift = { x: 0, y: 0 };
  private wheel = 0;
  private pointer: { x: number; y: number } | undefined;
  private opening = new AbortController();
  private readonly closed = new AbortController();

  private readonly title = h("div", { class: "kkh-title" });
  private readonly facts = h("div", { class: "kkh-facts" });
  private readonly canvas = h("canvas", { class: "kkh-canvas", role: "img" });
  private readonly stage: HTMLElement;
  private readonly marks = {
    top: h("span", { class: "kkh-mark kkh-top" }),
    bottom: h("span", { class: "kkh-mark kkh-bottom" }),
    left: h("span", { class: "kkh-mark kkh-left" }),
    right: h("span", { class: "kkh-mark kkh-right" }),
  };
  private readonly count = h("span", { class: "kkh-corner kkh-north-east" });
  private readonly shade = h("span", { class: "kkh-corner kkh-north-west" });
  private readonly value = h("span", { class: "kkh-corner kkh-south-west" });
  private readonly position = h("span", { class: "kkh-corner kkh-south-east" });
  private readonly busy = h("div", { class: "kkh-busy", role: "status" });
  private readonly problem = h("div", { class: "kkh-problem", role: "alert", hidden: true });
  private readonly slider = h("input", { type: "range", min: "0", step: "1", class: "kkh-slider" });
  private readonly width = h("input", { type: "number", step: "any", class: "kkh-number" });
  private readonly level = h("input", { type: "number", step: "any", class: "kkh-number" });
  private readonly choices = h("div", { class: "kkh-presets", role: "group" });

  constructor(
    private readonly model: Model<State>,
    private readonly root: HTMLElement,
  ) {
    const help = uniqueId("help");
    this.stage = h(
      "div",
      {
        class: "kkh-stage",
        tabindex: "0",
        role: "application",
        "aria-label": say("Image of the series", "シリーズの画像"),
        "aria-describedby": help,
      },
      this.canvas,
      ...Object.values(this.marks),
      this.count,
      this.shade,
      this.value,
      this.position,
      this.busy,
      this.problem,
    );
    this.slider.setAttribute("aria-label", say("Slice", "スライス"));
    this.choices.setAttribute("aria-label", say("Window presets", "ウィンドウのプリセット"));
    const field = (label: string, input: HTMLElement): HTMLElement =>
      h("label", { class: "kkh-field" }, h("span", {}, label), input);
    root.classList.add("kkh", "kkh-viewer");
    root.dataset["state"] = "loading";
    // JupyterLab's own shortcuts must not act on keys that were meant for the image.
    root.dataset["lmSuppressShortcuts"] = "true";
    root.append(
      h("div", { class: "kkh-head" }, this.title, this.facts),
      this.stage,
      h(
        "div",
        { class: "kkh-bar" },
        this.slider,
        this.choices,
        h(
          "div",
          { class: "kkh-fields" },
          field(say("Width", "幅"), this.width),
          field(say("Level", "レベル"), this.level),
        ),
      ),
      h("div", { class: "kkh-help", id: help }, HELP),
    );
    this.listen();
    void this.open();
  }

  close(): void {
    this.closed.abort();
    this.opening.abort();
    this.planes?.close();
  }

  private listen(): void {
    const { signal } = this.closed;
    const changes: [string, () => void][] = [
      ["change:uid", () => void this.open()],
      ["change:index", () => void this.show()],
      ["change:window", () => this.draw()],
      ["change:level", () => this.draw()],
    ];
    for (const [event, act] of changes) {
      this.model.on(event, act);
      signal.addEventListener("abort", () => this.model.off(event, act));
    }
    this.stage.addEventListener("wheel", (event) => this.onWheel(event), {
      passive: false,
      signal,
    });
    this.stage.addEventListener("keydown", (event) => this.onKey(event), { signal });
    this.stage.addEventListener("pointerdown", (event) => this.onDown(event), { signal });
    this.stage.addEventListener(
      "pointermove",
      (event) => {
        this.pointer = { x: event.clientX, y: event.clientY };
        this.readOut();
      },
      { signal },
    );
    this.stage.addEventListener(
      "pointerleave",
      () => {
        this.pointer = undefined;
        this.readOut();
      },
      { signal },
    );
    this.slider.addEventListener("input", () => this.go(this.slider.valueAsNumber), { signal });
    for (const input of [this.width, this.level]) {
      input.addEventListener("change", () => this.typed(input), { signal });
      input.addEventListener("keydown", ({ key }) => key === "Enter" && this.typed(input), {
        signal,
      });
    }
    const resized = new ResizeObserver(() => this.place());
    resized.observe(this.stage);
    signal.addEventListener("abort", () => resized.disconnect());
  }

  private async open(): Promise<void> {
    this.opening.abort();
    this.opening = new AbortController();
    const { signal } = this.opening;
    this.planes?.close();
    this.planes = this.series = this.shown = undefined;
    this.canvas.hidden = true;
    const uid = this.model.get("uid");
    if (!uid) {
      this.title.textContent = say("No series chosen", "シリーズが選択されていません");
      this.facts.textContent = "";
      this.setState("empty");
      return;
    }
    this.setState("loading");
    try {
      const series = await requestJson<Series>(`series/${encodeURIComponent(uid)}`, signal);
      this.planes = new Planes(uid);
      this.series = series;
      this.offered = presets(series.modality, series.window);
      this.describe(series);
      this.reset();
      await this.show();
    } catch (error) {
      if (!signal.aborted) this.fail(error, () => void this.open());
    }
  }

  private describe(series: Series): void {
    const [slices, rows, columns] = series.shape;
    const [dz, dy, dx] = series.spacing_mm;
    this.title.textContent = series.description || series.uid;
    this.facts.replaceChildren(
      h("span", { class: "kkh-chip" }, series.modality),
      ` ${columns} × ${rows} × ${slices} · ${dx.toFixed(2)} × ${dy.toFixed(2)} × ${dz.toFixed(2)} mm`,
    );
    const { affine_lps: affine } = series;
    this.marks.right.textContent = letters(affine, 0, 1);
    this.marks.left.textContent = letters(affine, 0, -1);
    this.marks.bottom.textContent = letters(affine, 1, 1);
    this.marks.top.textContent = letters(affine, 1, -1);
    this.slider.max = String(slices - 1);
    this.choices.replaceChildren(
      ...this.offered.map((preset, n) => {
        const button = h(
          "button",
          { type: "button", title: `${say("Key", "キー")} ${n + 1}` },
          say(preset.english, preset.nihongo),
        );
        button.addEventListener("click", () => this.setWindow(preset.width, preset.level));
        return button;
      }),
    );
  }

  private reset(): void {
    this.zoom = 1;
    this.shift = { x: 0, y: 0 };
    this.place();
  }

  /** Fill in what nobody has chosen yet, and bring what was chosen into the series' range. */
  private settle(series: Series): { index: number; width: number; level: number } {
    const [slices] = series.shape;
    const asked = this.model.get("index") ?? Math.floor(slices / 2);
    const index = Math.min(Math.max(Math.trunc(asked), 0), slices - 1);
    const first = this.offered[0] ?? series.window;
    const width = Math.max(this.model.get("window") ?? first.width, NARROWEST);
    const level = this.model.get("level") ?? first.level;
    const changed =
      index !== this.model.get("index") ||
      width !== this.model.get("window") ||
      level !== this.model.get("level");
    if (changed) {
      this.model.set("index", index);
      this.model.set("window", width);
      this.model.set("level", level);
      this.model.save_changes();
    }
    return { index, width, level };
  }

  private async show(): Promise<void> {
    const { planes, series } = this;
    if (!planes || !series) return;
    const { index } = this.settle(series);
    this.slider.value = String(index);
    this.direction = index < this.shownIndex ? -1 : 1;
    planes.keepOnly(new Set([index, ...this.near(index)]));
    if (!planes.get(index)) this.setState("loading");
    try {
      const plane = await planes.fetch(index);
      if (planes !== this.planes || index !== this.model.get("index")) return;
      this.shown = plane;
      this.shownIndex = index;
      this.draw();
      this.setState("ready");
      void this.prefetch(planes, index);
    } catch (error) {
      if (planes !== this.planes || index !== this.model.get("index")) return;
      this.fail(error, () => void this.show());
    }
  }

  private near(index: number): number[] {
    const slices = this.series?.shape[0] ?? 0;
    const steps = [1, 2, -1, 3, 4, -2].filter((step) => step <= AHEAD && step >= -BEHIND);
    return steps
      .map((step) => index + step * this.direction)
      .filter((n) => n >= 0 && n < slices);
  }

  private async prefetch(planes: Planes, index: number): Promise<void> {
    for (const neighbour of this.near(index)) {
      if (planes !== this.planes || index !== this.shownIndex) return;
      try {
        await planes.fetch(neighbour);
      } catch {
        // Only a guess at what comes next: if it is asked for, the error is shown then.
        return;
      }
    }
  }

  private draw(): void {
    const { series, shown } = this;
    if (!series || !shown) return;
    const { width, level } = this.settle(series);
    const { rows, columns } = shown;
    if (this.canvas.width !== columns || this.canvas.height !== rows) {
      this.canvas.width = columns;
      this.canvas.height = rows;
    }
    const context = this.canvas.getContext("2d");
    if (!context) throw new Error("The browser gives no 2D canvas.");
    const image = new ImageData(columns, rows);
    paint(shown.values, { width, level }, new Uint32Array(image.data.buffer));
    context.putImageData(image, 0, 0);
    this.canvas.hidden = false;
    this.place();

    const slices = series.shape[0];
    this.count.textContent = `${this.shownIndex + 1} / ${slices}`;
    this.shade.textContent = `W ${short(width)}  L ${short(level)}`;
    this.width.value = short(width);
    this.level.value = short(level);
    for (const [n, button] of [...this.choices.children].entries()) {
      const preset = this.offered[n];
      const pressed = preset?.width === width && preset.level === level;
      button.setAttribute("aria-pressed", String(pressed));
    }
    this.slider.setAttribute("aria-valuetext", `${this.shownIndex + 1} / ${slices}`);
    this.canvas.setAttribute(
      "aria-label",
      say(
        `Slice ${this.shownIndex + 1} of ${slices}, window ${short(width)}, level ${short(level)}`,
        `スライス ${this.shownIndex + 1} / ${slices}、ウィンドウ幅 ${short(width)}、レベル ${short(level)}`,
      ),
    );
    this.root.dataset["uid"] = series.uid;
    this.root.dataset["index"] = String(this.shownIndex);
    this.root.dataset["window"] = String(width);
    this.root.dataset["level"] = String(level);
    this.readOut();
  }

  /** Fit the plane into the stage with its true proportions in mm, then zoom and move it. */
  private place(): void {
    const { series } = this;
    if (!series) return;
    const [, rows, columns] = series.shape;
    const [, dy, dx] = series.spacing_mm;
    const box = { width: this.stage.clientWidth, height: this.stage.clientHeight };
    const perMm = Math.min(box.width / (columns * dx), box.height / (rows * dy));
    this.canvas.style.width = `${columns * dx * perMm}px`;
    this.canvas.style.height = `${rows * dy * perMm}px`;
    this.canvas.style.transform = `translate(${this.shift.x}px, ${this.shift.y}px) scale(${this.zoom})`;
  }

  private readOut(): void {
    const { series, shown, pointer } = this;
    let value = "";
    let position = "";
    if (series && shown && pointer) {
      const box = this.canvas.getBoundingClientRect();
      const i = Math.floor(((pointer.x - box.left) / box.width) * shown.columns);
      const j = Math.floor(((pointer.y - box.top) / box.height) * shown.rows);
      if (i >= 0 && j >= 0 && i < shown.columns && j < shown.rows) {
        const here = shown.values[j * shown.columns + i] ?? 0;
        const [x, y, z] = toPatient(series.affine_lps, [i, j, this.shownIndex]);
        value = `${short(here)} ${series.unit}`;
        position = `L ${x.toFixed(1)}  P ${y.toFixed(1)}  H ${z.toFixed(1)} mm`;
      }
    }
    this.value.textContent = value;
    this.position.textContent = position;
  }

  private setState(state: "empty" | "loading" | "ready" | "error"): void {
    this.root.dataset["state"] = state;
    this.root.setAttribute("aria-busy", String(state === "loading"));
    this.busy.textContent = state === "loading" ? say("Loading", "読み込み中") : "";
    if (state !== "error") this.problem.hidden = true;
  }

  private fail(error: unknown, again: () => void): void {
    this.setState("error");
    const retry = h("button", { type: "button" }, say("Try again", "再試行"));
    retry.addEventListener("click", again);
    this.problem.replaceChildren(h("p", {}, words(error)), retry);
    this.problem.hidden = false;
  }

  private go(index: number): void {
    const slices = this.series?.shape[0];
    if (slices === undefined) return;
    this.model.set("index", Math.min(Math.max(index, 0), slices - 1));
    this.model.save_changes();
  }

  private setWindow(width: number, level: number): void {
    this.model.set("window", Math.max(width, NARROWEST));
    this.model.set("level", level);
    this.model.save_changes();
  }

  private typed(input: HTMLInputElement): void {
    const number = input.valueAsNumber;
    // The fields show rounded numbers: only the one that was typed into is taken from them.
    const width = input === this.width ? number : (this.model.get("window") ?? 1);
    const level = input === this.level ? number : (this.model.get("level") ?? 0);
    if (width > 0 && Number.isFinite(level)) this.setWindow(width, level);
    else this.draw();
  }

  private onWheel(event: WheelEvent): void {
    const slices = this.series?.shape[0] ?? 0;
    if (event.ctrlKey) {
      event.preventDefault();
      this.zoomBy(event.deltaY < 0 ? 1.25 : 0.8, event);
      return;
    }
    const pixels = event.deltaMode === WheelEvent.DOM_DELTA_PIXEL;
    this.wheel += pixels ? event.deltaY : event.deltaY * NOTCH_PIXELS;
    const notch = pixels && Math.abs(event.deltaY) >= NOTCH_PIXELS;
    const steps = notch ? Math.sign(event.deltaY) : Math.trunc(this.wheel / NOTCH_PIXELS);
    const next = (this.model.get("index") ?? 0) + steps;
    // At either end the wheel belongs to the notebook again.
    if (steps !== 0 && (next < 0 || next >= slices)) return;
    event.preventDefault();
    if (steps === 0) return;
    this.wheel = notch ? 0 : this.wheel - steps * NOTCH_PIXELS;
    this.go(next);
  }

  private onKey(event: KeyboardEvent): void {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const index = this.model.get("index") ?? 0;
    const last = (this.series?.shape[0] ?? 1) - 1;
    const first = this.offered[0];
    const actions: Record<string, () => void> = {
      ArrowUp: () => this.go(index - 1),
      ArrowLeft: () => this.go(index - 1),
      ArrowDown: () => this.go(index + 1),
      ArrowRight: () => this.go(index + 1),
      PageUp: () => this.go(index - 10),
      PageDown: () => this.go(index + 10),
      Home: () => this.go(0),
      End: () => this.go(last),
      "+": () => this.zoomBy(1.25),
      "-": () => this.zoomBy(0.8),
      r: () => {
        this.reset();
        if (first) this.setWindow(first.width, first.level);
      },
    };
    const preset = this.offered[Number(event.key) - 1];
    const act = preset
      ? () => this.setWindow(preset.width, preset.level)
      : actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!act) return;
    event.preventDefault();
    event.stopPropagation();
    act();
  }

  private zoomBy(factor: number, at?: { clientX: number; clientY: number }): void {
    const zoom = Math.min(Math.max(this.zoom * factor, 1), MOST_ZOOM);
    const box = this.stage.getBoundingClientRect();
    const x = at ? at.clientX - box.left - box.width / 2 : 0;
    const y = at ? at.clientY - box.top - box.height / 2 : 0;
    const ratio = zoom / this.zoom;
    this.zoom = zoom;
    this.shift =
      zoom === 1
        ? { x: 0, y: 0 }
        : { x: x - (x - this.shift.x) * ratio, y: y - (y - this.shift.y) * ratio };
    this.place();
    this.readOut();
  }

  private onDown(event: PointerEvent): void {
    if (event.button !== 0 || !this.series || this.problem.contains(event.target as Node)) return;
    const start = {
      x: event.clientX,
      y: event.clientY,
      width: this.model.get("window") ?? 1,
      level: this.model.get("level") ?? 0,
      shift: this.shift,
    };
    // The whole stage is about twice the window that the drag began with.
    const perPixel = (2 * start.width) / Math.max(this.stage.clientWidth, 1);
    const done = new AbortController();
    const signal = AbortSignal.any([done.signal, this.closed.signal]);
    this.stage.setPointerCapture(event.pointerId);
    this.stage.addEventListener(
      "pointermove",
      (move) => {
        const dx = move.clientX - start.x;
        const dy = move.clientY - start.y;
        if (event.shiftKey) {
          this.shift = { x: start.shift.x + dx, y: start.shift.y + dy };
          this.place();
        } else {
          const round = (value: number): number =>
            start.width >= 50 ? Math.round(value) : Number(value.toPrecision(4));
          this.setWindow(
            Math.max(round(start.width + dx * perPixel), NARROWEST),
            round(start.level - dy * perPixel),
          );
        }
      },
      { signal },
    );
    for (const end of ["pointerup", "pointercancel"] as const) {
      this.stage.addEventListener(end, () => done.abort(), { signal });
    }
  }
}

function render({ model, el }: RenderContext<State>): () => void {
  const root = h("div");
  el.append(root);
  const viewer = new Viewer(model, root);
  return () => viewer.close();
}

export default { render };
