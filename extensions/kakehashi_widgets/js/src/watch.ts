// How long a session still has, and whether its link to the store lives.

import { type ServerError, h, japanese, requestJson, say, words } from "./host";

export interface Session {
  now: string;
  ends_at: string;
  person: string;
  project: string;
  site: string;
  lease: { state: "live" | "offline" | "ending"; message: string };
}

const ASK_EVERY_MS = 15_000;
export const WARN_SECONDS = 600;

function clock(seconds: number): string {
  const whole = Math.max(0, Math.floor(seconds));
  const two = (value: number): string => String(value).padStart(2, "0");
  const hours = Math.floor(whole / 3600);
  const days = Math.floor(hours / 24);
  const prefix = days > 0 ? `${days} ${say(days === 1 ? "day" : "days", "日")} ` : "";
  return `${prefix}${two(hours % 24)}:${two(Math.floor(whole / 60) % 60)}:${two(whole % 60)}`;
}

/** The clock as an element that keeps itself current until `signal` says stop. */
export function sessionClock(
  signal: AbortSignal,
  onWarning: (message: string) => void = () => undefined,
): HTMLElement {
  const left = h("span", { class: "kkh-remaining", role: "timer" });
  const ends = h("span", { class: "kkh-ends" });
  const link = h("span", { class: "kkh-link", role: "status" });
  const note = h("span", { class: "kkh-note", role: "alert" });
  const dot = h("span", { class: "kkh-dot", "aria-hidden": "true" });
  const root = h("div", { class: "kkh kkh-clock", "data-state": "loading" }, dot, left, ends, link, note);
  let session: Session | undefined;
  let skew = 0;
  let warned = false;

  const setText = (element: HTMLElement, text: string): void => {
    // Untouched when equal, so that a screen reader hears only what is new.
    if (element.textContent !== text) element.textContent = text;
  };

  const tick = (): void => {
    if (!session) return;
    const end = Date.parse(session.ends_at);
    const seconds = (end - Date.now() - skew) / 1000;
    const over = seconds <= 0;
    const soon = seconds <= WARN_SECONDS;
    setText(left, over ? say("Time is up", "終了しました") : clock(seconds));
    left.setAttribute("aria-label", say("Time left in the session", "セッションの残り時間"));
    const time = new Date(end - skew).toLocaleTimeString(japanese ? "ja-JP" : navigator.language, {
      hour: "2-digit",
      minute: "2-digit",
    });
    setText(ends, say(`until ${time}`, `${time} まで`));
    const { state, message } = session.lease;
    const texts = {
      live: say("Store connected", "ストア接続中"),
      offline: say("Store out of reach", "ストアに接続できません"),
      ending: say("Session is ending", "終了処理中"),
    };
    setText(link, texts[state]);
    link.title = message;
    const warning =
      state !== "live"
        ? message
        : soon && !over
          ? say("Save your work: the session ends soon.", "まもなく終了します。保存してください。")
          : "";
    setText(note, warning);
    root.dataset["state"] = over ? "over" : state !== "live" ? state : soon ? "soon" : "live";
    root.title = `${session.person} · ${session.project} · ${session.site}`;
    if (soon && !over && !warned) {
      warned = true;
      onWarning(
        say(
          `The session ends at ${time}. Save your work; what is in your work folder is kept.`,
          `セッションは ${time} に終了します。保存してください。作業フォルダの内容は保持されます。`,
        ),
      );
    }
    if (!soon) warned = false;
  };

  const ask = async (): Promise<void> => {
    try {
      session = await requestJson<Session>("session", signal);
      skew = Date.parse(session.now) - Date.now();
      tick();
    } catch (error) {
      if (signal.aborted) return;
      const outside = (error as ServerError).status === 404;
      root.dataset["state"] = outside ? "outside" : "error";
      setText(note, words(error));
      if (outside) session = undefined;
    }
  };

  const ticking = setInterval(tick, 1000);
  const asking = setInterval(() => void ask(), ASK_EVERY_MS);
  signal.addEventListener("abort", () => {
    clearInterval(ticking);
    clearInterval(asking);
  });
  void ask();
  return root;
}
