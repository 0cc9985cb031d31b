// What the session reads from the store, live: rate, steps of the loops, round trip. The server
// is asked at most once a second, and not at all while nobody can see the answer.

import { type Model, type RenderContext, h, japanese, requestJson, say, words } from "./host";

interface State {
  minutes: number;
}

/** at, bytes, rereads, reconnects, steps, channels, asked, stalled, waited, rtt: as Moment. */
type Row = [number, number, number, number, number, number, number, number, number, number];

interface Summary {
  site: string;
  begin: number;
  bytes: number;
  mean_rate: number;
  best_rate: number;
  rtt_s: number | null;
  rtt_median_s: number | null;
  steps: number;
  waited_s: number;
  reconnects: number;
  rereads: number;
  outages: number;
  outage_s: number;
}

interface Answer {
  now: number;
  seconds: Row[];
  outages: [number, number][];
  summary: Summary;
}

interface Moment {
  at: number;
  bytes: number;
  reconnects: number;
  steps: number;
  channels: number;
  waited: number;
  rtt: number;
}

const HOUR_S = 3600;
const ASK_EVERY_MS = 1000;
const ASK_AGAIN_MS = 5000;
// Processes write a second down when it is over, each a moment later: it may not be whole yet.
const LATE_S = 2;
const SPANS = [1, 5, 15, 60];
const LEFT = 64;
const RIGHT = 12;
const SVG = "http://www.w3.org/2000/svg";
const LANGUAGE = japanese ? "ja-JP" : navigator.language;

function svg(tag: string, attributes: Record<string, string | number>, text = ""): SVGElement {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  element.textContent = text;
  return element;
}

/** The smallest of 1, 2, 5, 10, ... that is at least this: where an axis may end. */
function nice(value: number): number {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((times) => times * power).find((end) => end >= value * 0.999999) ?? value;
}

function number(value: number, digits = 1): string {
  return value.toLocaleString(LANGUAGE, { maximumFractionDigits: digits });
}

function size(bytes: number): string {
  return bytes >= 1e9 ? `${number(bytes / 1e9, 2)} GB` : `${number(bytes / 1e6)} MB`;
}

function rate(bytes: number): string {
  return `${number(bytes / 1e6)} MB/s`;
}

function milliseconds(seconds: number | null): string {
  return seconds === null ? say("unknown", "不明") : `${number(seconds * 1000)} ms`;
}

/** One of the plots that stand above each other, on one axis of time. */
interface Plot {
  name: string;
  unit: string;
  height: number;
  least: number;
  value: (moment: Moment) => number | undefined;
  filled: boolean;
}

const PLOTS: Plot[] = [
  {
    name: "rate",
    unit: "MB/s",
    height: 132,
    least: 1,
    value: ({ bytes }) => bytes / 1e6,
    filled: true,
  },
  {
    name: "steps",
    unit: say("batches/s", "バッチ/秒"),
    height: 56,
    least: 1,
    value: ({ steps }) => steps,
    filled: true,
  },
  {
    name: "wait",
    unit: say("waiting, %", "待ち %"),
    height: 44,
    least: 100,
    value: ({ waited }) => 100 * waited,
    filled: true,
  },
  {
    name: "rtt",
    unit: "RTT, ms",
    height: 44,
    least: 1,
    value: ({ rtt }) => (rtt > 0 ? 1000 * rtt : undefined),
    filled: false,
  },
];
// Above each plot, for its unit.
const GAP = 24;

class TrafficView {
  private moments = new Map<number, Moment>();
  private answer: Answer | undefined;
  private timer: ReturnType<typeof setTimeout> | undefined;
  private asking = false;
  // Seconds that the server's clock is ahead of the browser's.
  private skew = 0;
  private readonly closed = new AbortController();

  private readonly facts = h("span", { class: "kkh-facts", role: "status" });
  private readonly spans = h("div", { class: "kkh-presets", role: "group" });
  private readonly plots = h("div", { class: "kkh-plots" });
  private readonly figures = h("div", { class: "kkh-figures" });
  private readonly problem = h("div", { class: "kkh-problem", role: "alert", hidden: true });

  constructor(
    private readonly model: Model<State>,
    private readonly root: HTMLElement,
  ) {
    root.classList.add("kkh", "kkh-traffic");
    root.dataset["state"] = "loading";
    this.spans.setAttribute("aria-label", say("Time shown", "表示期間"));
    root.append(
      h(
        "div",
        { class: "kkh-head" },
        h("div", { class: "kkh-title" }, say("Read from the store", "ストアからの読み込み")),
        this.facts,
        this.spans,
      ),
      this.plots,
      this.figures,
      h(
        "div",
        { class: "kkh-help" },
        say(
          "Verified bytes that this session's Python processes read, and that were read for programs below the verified view. Not counted: what is written.",
          "このセッションの Python プロセスと、検証付きビュー経由のプログラムのために読み込まれ、検証されたバイト数です。書き込みは含みません。",
        ),
      ),
      this.problem,
    );
    this.listen();
  }

  close(): void {
    this.closed.abort();
    clearTimeout(this.timer);
  }

  private listen(): void {
    const { signal } = this.closed;
    const changed = (): void => this.draw();
    this.model.on("change:minutes", changed);
    // Also told when it is first laid out, and when its tab is shown again.
    const resized = new ResizeObserver(() => {
      this.draw();
      this.wake();
    });
    resized.observe(this.plots);
    signal.addEventListener("abort", () => {
      this.model.off("change:minutes", changed);
      resized.disconnect();
    });
    document.addEventListener("visibilitychange", () => this.wake(), { signal });
  }

  private wake(): void {
    if (!this.asking && this.timer === undefined) void this.ask();
  }

  private async ask(): Promise<void> {
    this.timer = undefined;
    if (document.hidden || this.plots.clientWidth === 0 || this.closed.signal.aborted) return;
    this.asking = true;
    let pause = ASK_EVERY_MS;
    try {
      const known = Math.max(0, ...this.moments.keys());
      const back = this.answer
        ? Math.min(HOUR_S, Math.ceil(Date.now() / 1000 + this.skew - known) + 2 * LATE_S)
        : HOUR_S;
      this.take(await requestJson<Answer>(`traffic?seconds=${back}`, this.closed.signal));
      this.problem.hidden = true;
      this.root.dataset["state"] = "ready";
    } catch (error) {
      if (this.closed.signal.aborted) return;
      this.problem.replaceChildren(h("p", {}, words(error)));
      this.problem.hidden = false;
      this.root.dataset["state"] = "error";
      pause = ASK_AGAIN_MS;
    } finally {
      this.asking = false;
    }
    this.timer = setTimeout(() => void this.ask(), pause);
  }

  private take(answer: Answer): void {
    this.answer = answer;
    this.skew = answer.now - Date.now() / 1000;
    for (const [at, bytes, , reconnects, steps, channels, , , waited, rtt] of answer.seconds) {
      this.moments.set(at, { at, bytes, reconnects, steps, channels, waited, rtt });
    }
    for (const at of this.moments.keys()) {
      if (at < answer.now - HOUR_S) this.moments.delete(at);
    }
    this.draw();
  }

  private draw(): void {
    const { answer } = this;
    if (!answer || this.closed.signal.aborted) return;
    const minutes = this.model.get("minutes");
    const end = Math.floor(answer.now) - LATE_S + 1;
    const begin = end - 60 * minutes;
    const moments = [...this.moments.values()]
      .filter(({ at }) => at >= begin && at < end)
      .sort((a, b) => a.at - b.at);
    this.drawSpans(minutes);
    this.drawPlots(moments, begin, end, answer.outages);
    this.drawFigures(moments, end, answer.summary);
    this.root.dataset["end"] = String(end);
  }

  private drawSpans(minutes: number): void {
    const focused = this.spans.contains(document.activeElement)
      ? (document.activeElement as HTMLElement).dataset["minutes"]
      : undefined;
    this.spans.replaceChildren(
      ...SPANS.map((span) => {
        const button = h(
          "button",
          { type: "button", "data-minutes": span, "aria-pressed": String(span === minutes) },
          say(`${span} min`, `${span} 分`),
        );
        button.addEventListener("click", () => {
          this.model.set("minutes", span);
          this.model.save_changes();
          this.draw();
        });
        return button;
      }),
    );
    this.spans.querySelector<HTMLElement>(`[data-minutes="${focused ?? ""}"]`)?.focus();
  }

  private drawPlots(
    moments: Moment[],
    begin: number,
    end: number,
    outages: [number, number][],
  ): void {
    const width = Math.max(320, this.plots.clientWidth);
    const height = PLOTS.reduce((sum, plot) => sum + plot.height + GAP, GAP);
    const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img" });
    const x = (at: number): number =>
      LEFT + ((at - begin) / (end - begin)) * (width - LEFT - RIGHT);
    const floor = height;
    // Below everything else, so that no line runs through a word.
    picture.append(...this.times(begin, end, x, floor));
    for (const [from, to] of outages) {
      if (to <= begin || from >= end) continue;
      const left = x(Math.max(from, begin));
      const shade = svg("rect", {
        class: "kkh-outage",
        x: left,
        y: GAP,
        width: x(Math.min(to, end)) - left,
        height: floor - 2 * GAP,
        "data-seconds": to - from,
      });
      shade.append(svg("title", {}, say(`Nothing came for ${to - from} s`, `${to - from} 秒間 受信なし`)));
      picture.append(shade);
    }
    let top = GAP;
    for (const plot of PLOTS) {
      picture.append(this.plot(plot, moments, top, x, width));
      top += plot.height + GAP;
    }
    picture.setAttribute(
      "aria-label",
      say("Rate, batches, waiting and round trip over time", "速度、バッチ、待ち時間、往復時間の推移"),
    );
    this.plots.replaceChildren(picture);
  }

  private plot(
    plot: Plot,
    moments: Moment[],
    top: number,
    x: (at: number) => number,
    width: number,
  ): SVGElement {
    const group = svg("g", { class: `kkh-plot kkh-plot-${plot.name}` });
    const values = moments.map((moment) => ({ at: moment.at, value: plot.value(moment) }));
    const most = nice(Math.max(plot.least, ...values.map(({ value }) => value ?? 0)));
    const floor = top + plot.height;
    const y = (value: number): number => floor - (value / most) * plot.height;
    for (const value of plot.height > 100 ? [0, most / 2, most] : [0, most]) {
      group.append(
        svg("line", { class: "kkh-rule", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) }),
        svg("text", { class: "kkh-tick", x: LEFT - 6, y: y(value) + 4, "data-value": value }, number(value)),
      );
    }
    group.append(svg("text", { class: "kkh-unit", x: LEFT, y: top - 7 }, plot.unit));
    let line = "";
    let last = Number.NaN;
    for (const { at, value } of values) {
      if (value === undefined) continue;
      // What no process wrote down is nothing, not a line across.
      if (at !== last) line += plot.filled ? drop(x, y, last, at) : `M${x(at)} ${y(value)}`;
      line += `L${x(at)} ${y(value)}L${x(at + 1)} ${y(value)}`;
      last = at + 1;
    }
    if (plot.filled && line) line += `L${x(last)} ${y(0)}`;
    group.append(svg("path", { class: plot.filled ? "kkh-area" : "kkh-curve", d: line }));
    if (plot.name === "rate") {
      for (const { at, reconnects } of moments) {
        if (!reconnects) continue;
        const centre = x(at + 0.5);
        const mark = svg("path", {
          class: "kkh-lost",
          d: `M${centre - 4} ${floor + 6}L${centre + 4} ${floor + 6}L${centre} ${floor - 1}Z`,
        });
        mark.append(
          svg("title", {}, say(`${reconnects} channels lost`, `切断されたチャネル ${reconnects}`)),
        );
        group.append(mark);
      }
    }
    return group;
  }

  private times(
    begin: number,
    end: number,
    x: (at: number) => number,
    floor: number,
  ): SVGElement[] {
    const step = [15, 60, 300, 900].find((one) => (end - begin) / one <= 6) ?? 900;
    const marks: SVGElement[] = [];
    for (let at = Math.ceil(begin / step) * step; at <= end; at += step) {
      const time = new Date(1000 * (at - this.skew)).toLocaleTimeString(LANGUAGE, {
        hour: "2-digit",
        minute: "2-digit",
        ...(step < 60 ? { second: "2-digit" } : {}),
      });
      marks.push(
        svg("line", { class: "kkh-rule", x1: x(at), x2: x(at), y1: GAP, y2: floor - GAP }),
        svg("text", { class: "kkh-time", x: x(at), y: floor - GAP + 16 }, time),
      );
    }
    return marks;
  }

  private drawFigures(moments: Moment[], end: number, summary: Summary): void {
    const recent = moments.filter(({ at }) => at >= end - 3);
    const now = recent.reduce((sum, { bytes }) => sum + bytes, 0) / 3;
    const channels = recent.at(-1)?.channels ?? 0;
    const cuts = say(
      `${summary.outages} (${summary.outage_s} s)`,
      `${summary.outages} 回 (${summary.outage_s} 秒)`,
    );
    const shown: [string, string, string][] = [
      ["now", say("Now", "現在"), rate(now)],
      ["mean", say("Mean while reading", "読み込み中の平均"), rate(summary.mean_rate)],
      ["best", say("Best second", "最高 (1 秒)"), rate(summary.best_rate)],
      ["read", say("Read", "読み込み量"), size(summary.bytes)],
      ["rtt", say("RTT, shortest", "RTT 最短"), milliseconds(summary.rtt_s)],
      ["rtt-median", say("RTT, median", "RTT 中央値"), milliseconds(summary.rtt_median_s)],
      ["channels", say("Channels", "チャネル"), number(channels, 0)],
      ["steps", say("Batches", "バッチ"), number(summary.steps, 0)],
      ["waited", say("Loops waited", "ループの待ち"), `${number(summary.waited_s)} s`],
      ["outages", say("Outages", "途絶"), cuts],
      ["lost", say("Channels lost", "切断"), number(summary.reconnects, 0)],
      ["rereads", say("Read again", "再読み込み"), number(summary.rereads, 0)],
    ];
    this.figures.replaceChildren(
      ...shown.map(([key, name, text]) =>
        h(
          "div",
          {},
          h("div", { class: "kkh-facts" }, name),
          h("div", { class: "kkh-value", "data-figure": key }, text),
        ),
      ),
    );
    const since = summary.begin
      ? new Date(1000 * (summary.begin - this.skew)).toLocaleTimeString(LANGUAGE, {
          hour: "2-digit",
          minute: "2-digit",
        })
      : "";
    const facts = since
      ? say(`${summary.site}, since ${since}`, `${summary.site}、${since} から`)
      : say(`${summary.site}, nothing read yet`, `${summary.site}、まだ読み込みなし`);
    if (this.facts.textContent !== facts) this.facts.textContent = facts;
  }
}

/** The way from the end of what was known down to nothing, and on to where it is known again. */
function drop(
  x: (at: number) => number,
  y: (value: number) => number,
  last: number,
  at: number,
): string {
  const down = Number.isNaN(last) ? "M" : `L${x(last)} ${y(0)}L`;
  return `${down}${x(at)} ${y(0)}`;
}

function render({ model, el }: RenderContext<State>): () => void {
  const view = new TrafficView(model, el);
  return () => view.close();
}

export default { render };
