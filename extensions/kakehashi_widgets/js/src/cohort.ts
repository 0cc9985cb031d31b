// The series of the cohort as a table: search, sort, choose. Only the rows in sight are drawn.

import { type Model, type RenderContext, h, requestJson, say, uniqueId, words } from "./host";

interface State {
  selected: string;
}

type Row = Record<string, unknown> & { uid: string };

interface Column {
  key: string;
  label: string;
  size: string;
  numeric?: boolean;
  text?: (row: Row) => string;
}

const ROW_PIXELS = 30;
const SPARE_ROWS = 6;

function plain(value: unknown): string {
  return value === null || value === undefined ? "" : String(value);
}

function thickness(row: Row): string {
  const value = Number(row["spacing_z"]);
  return Number.isFinite(value) && value > 0 ? value.toFixed(2) : "";
}

const COLUMNS: Column[] = [
  { key: "modality", label: say("Modality", "モダリティ"), size: "84px" },
  { key: "description", label: say("Description", "説明"), size: "minmax(150px, 3fr)" },
  { key: "body_part", label: say("Body part", "部位"), size: "minmax(80px, 1fr)" },
  { key: "patient_id", label: say("Patient", "患者"), size: "minmax(110px, 1.4fr)" },
  { key: "study_date", label: say("Study", "検査日"), size: "92px" },
  { key: "manufacturer", label: say("Manufacturer", "メーカー"), size: "minmax(110px, 1.2fr)" },
  { key: "slices", label: say("Slices", "枚数"), size: "66px", numeric: true },
  {
    key: "spacing_z",
    label: say("Step/mm", "間隔/mm"),
    size: "84px",
    numeric: true,
    text: thickness,
  },
];

function cell(row: Row, column: Column): string {
  return column.text ? column.text(row) : plain(row[column.key]);
}

class CohortTable {
  private rows: Row[] = [];
  private haystacks = new Map<Row, string>();
  private visible: Row[] = [];
  private columns: Column[] = COLUMNS;
  private sort: { key: string; down: boolean } | undefined;
  private active = 0;
  private readonly closed = new AbortController();
  private readonly stem = uniqueId("row");

  private readonly search = h("input", { type: "search", class: "kkh-search" });
  private readonly count = h("span", { class: "kkh-count", role: "status" });
  private readonly head = h("div", { class: "kkh-row kkh-header", role: "row" });
  private readonly spacer = h("div", { class: "kkh-spacer", role: "rowgroup" });
  private readonly scroller = h("div", { class: "kkh-scroller", tabindex: "0", role: "grid" });
  private readonly problem = h("div", { class: "kkh-problem", role: "alert", hidden: true });

  constructor(
    private readonly model: Model<State>,
    private readonly root: HTMLElement,
  ) {
    const name = say("Series of the cohort", "コホートのシリーズ");
    root.classList.add("kkh", "kkh-cohort");
    root.dataset["lmSuppressShortcuts"] = "true";
    this.search.placeholder = say("Search", "検索");
    this.search.setAttribute("aria-label", say("Search the series", "シリーズを検索"));
    this.scroller.setAttribute("aria-label", name);
    this.scroller.append(h("div", { role: "rowgroup" }, this.head), this.spacer);
    this.head.setAttribute("aria-rowindex", "1");
    root.append(
      h("div", { class: "kkh-head" }, h("div", { class: "kkh-title" }, name), this.count, this.search),
      this.scroller,
      this.problem,
    );
    this.listen();
    void this.load();
  }

  close(): void {
    this.closed.abort();
  }

  private listen(): void {
    const { signal } = this.closed;
    const selected = (): void => this.draw();
    this.model.on("change:selected", selected);
    signal.addEventListener("abort", () => this.model.off("change:selected", selected));
    this.search.addEventListener("input", () => this.filter(), { signal });
    this.search.addEventListener(
      "keydown",
      (event) => {
        if (event.key !== "ArrowDown") return;
        event.preventDefault();
        this.scroller.focus();
      },
      { signal },
    );
    this.scroller.addEventListener("scroll", () => this.draw(), { signal, passive: true });
    this.scroller.addEventListener("keydown", (event) => this.onKey(event), { signal });
    this.spacer.addEventListener(
      "click",
      (event) => {
        const line = (event.target as Element).closest<HTMLElement>("[data-n]");
        if (!line) return;
        this.active = Number(line.dataset["n"]);
        this.choose();
      },
      { signal },
    );
    const resized = new ResizeObserver(() => this.draw());
    resized.observe(this.scroller);
    signal.addEventListener("abort", () => resized.disconnect());
  }

  private async load(): Promise<void> {
    this.root.dataset["state"] = "loading";
    this.root.setAttribute("aria-busy", "true");
    this.problem.hidden = true;
    this.count.textContent = say("Loading", "読み込み中");
    try {
      const answer = await requestJson<{ rows: Row[] }>("cohort", this.closed.signal);
      this.rows = answer.rows;
      // A column that no row fills would only take the others' room.
      this.columns = COLUMNS.filter((column) => this.rows.some((row) => cell(row, column)));
      this.haystacks = new Map(
        this.rows.map((row) => [
          row,
          [row.uid, ...this.columns.map((column) => cell(row, column))].join("\n").toLowerCase(),
        ]),
      );
      this.root.style.setProperty("--kkh-columns", this.columns.map((c) => c.size).join(" "));
      this.filter();
      this.root.dataset["state"] = "ready";
    } catch (error) {
      if (this.closed.signal.aborted) return;
      const retry = h("button", { type: "button" }, say("Try again", "再試行"));
      retry.addEventListener("click", () => void this.load());
      this.problem.replaceChildren(h("p", {}, words(error)), retry);
      this.problem.hidden = false;
      this.count.textContent = "";
      this.root.dataset["state"] = "error";
    }
    this.root.setAttribute("aria-busy", "false");
  }

  private filter(): void {
    const terms = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    this.visible = this.rows.filter((row) => {
      const haystack = this.haystacks.get(row) ?? "";
      return terms.every((term) => haystack.includes(term));
    });
    this.count.textContent =
      this.visible.length === this.rows.length
        ? say(`${this.rows.length} series`, `${this.rows.length} シリーズ`)
        : say(
            `${this.visible.length} of ${this.rows.length} series`,
            `${this.rows.length} 中 ${this.visible.length} シリーズ`,
          );
    this.order();
  }

  private order(): void {
    const { sort } = this;
    if (sort) {
      const column = this.columns.find(({ key }) => key === sort.key);
      const sign = sort.down ? -1 : 1;
      const words = new Intl.Collator(navigator.language, { numeric: true });
      this.visible.sort((a, b) => {
        const [left, right] = [a[sort.key], b[sort.key]];
        if (column?.numeric) return sign * (Number(left ?? 0) - Number(right ?? 0));
        return sign * words.compare(plain(left), plain(right));
      });
    }
    this.active = Math.max(
      0,
      this.visible.findIndex(({ uid }) => uid === this.model.get("selected")),
    );
    this.drawHead();
    this.scroller.scrollTop = 0;
    this.draw();
  }

  private drawHead(): void {
    const focused = this.head.contains(document.activeElement) ? this.sort?.key : undefined;
    this.head.replaceChildren(
      ...this.columns.map((column) => {
        const sorted = this.sort?.key === column.key ? this.sort : undefined;
        const button = h(
          "button",
          { type: "button" },
          column.label,
          h("span", { class: "kkh-arrow", "aria-hidden": "true" }, sorted ? (sorted.down ? "▼" : "▲") : ""),
        );
        button.addEventListener("click", () => {
          this.sort = { key: column.key, down: sorted ? !sorted.down : false };
          // Sorted by nothing, the rows stand in the cohort's own order.
          this.order();
        });
        const direction = sorted ? (sorted.down ? "descending" : "ascending") : "none";
        return h(
          "div",
          {
            role: "columnheader",
            "aria-sort": direction,
            class: column.numeric ? "kkh-numeric" : "",
            "data-key": column.key,
          },
          button,
        );
      }),
    );
    if (focused) this.head.querySelector<HTMLElement>(`[data-key="${focused}"] button`)?.focus();
    this.scroller.setAttribute("aria-rowcount", String(this.visible.length + 1));
    this.spacer.style.height = `${this.visible.length * ROW_PIXELS}px`;
  }

  private draw(): void {
    const first = Math.max(0, Math.floor(this.scroller.scrollTop / ROW_PIXELS) - SPARE_ROWS);
    const room = Math.ceil(this.scroller.clientHeight / ROW_PIXELS) + 2 * SPARE_ROWS;
    const last = Math.min(this.visible.length, first + room);
    const selected = this.model.get("selected");
    const lines: HTMLElement[] = [];
    for (let n = first; n < last; n++) {
      const row = this.visible[n];
      if (!row) continue;
      const line = h(
        "div",
        {
          role: "row",
          class: `kkh-row${n === this.active ? " kkh-active" : ""}`,
          id: `${this.stem}-${n}`,
          "aria-rowindex": n + 2,
          "aria-selected": String(row.uid === selected),
          "data-n": n,
          "data-uid": row.uid,
        },
        ...this.columns.map((column) => {
          const text = cell(row, column);
          return h(
            "div",
            { role: "gridcell", title: text, class: column.numeric ? "kkh-numeric" : "" },
            text,
          );
        }),
      );
      line.style.top = `${n * ROW_PIXELS}px`;
      lines.push(line);
    }
    this.spacer.replaceChildren(...lines);
    this.scroller.setAttribute("aria-activedescendant", `${this.stem}-${this.active}`);
    this.root.dataset["selected"] = selected;
  }

  private choose(): void {
    const row = this.visible[this.active];
    if (!row) return;
    this.model.set("selected", row.uid);
    this.model.save_changes();
    this.draw();
  }

  private onKey(event: KeyboardEvent): void {
    if (event.target !== this.scroller) return;
    const page = Math.max(1, Math.floor(this.scroller.clientHeight / ROW_PIXELS) - 2);
    const last = this.visible.length - 1;
    const moves: Record<string, number> = {
      ArrowDown: this.active + 1,
      ArrowUp: this.active - 1,
      PageDown: this.active + page,
      PageUp: this.active - page,
      Home: 0,
      End: last,
    };
    const target = moves[event.key];
    if (target !== undefined) {
      this.active = Math.min(Math.max(target, 0), Math.max(last, 0));
      this.reveal();
      this.draw();
    } else if (event.key === "Enter" || event.key === " ") {
      this.choose();
    } else {
      return;
    }
    event.preventDefault();
    event.stopPropagation();
  }

  private reveal(): void {
    const header = this.head.offsetHeight;
    const top = this.active * ROW_PIXELS;
    const room = this.scroller.clientHeight - header;
    if (top < this.scroller.scrollTop) this.scroller.scrollTop = top;
    else if (top + ROW_PIXELS > this.scroller.scrollTop + room) {
      this.scroller.scrollTop = top + ROW_PIXELS - room;
    }
  }
}

function render({ model, el }: RenderContext<State>): () => void {
  const root = h("div");
  el.append(root);
  const table = new CohortTable(model, root);
  return () => table.close();
}

export default { render };
