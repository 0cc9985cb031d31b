// What surrounds a widget: the server that it talks to, the language of the person, the DOM.

/** The part of anywidget's model that the widgets use. */
export interface Model<State> {
  get<Key extends keyof State & string>(key: Key): State[Key];
  set<Key extends keyof State & string>(key: Key, value: State[Key]): void;
  save_changes(): void;
  on(event: string, callback: () => void): void;
  off(event: string, callback: () => void): void;
}

export interface RenderContext<State> {
  model: Model<State>;
  el: HTMLElement;
}

/** A refusal of the server, in its own words. */
export class ServerError extends Error {
  constructor(
    readonly status: number,
    message: string,
  ) {
    super(message);
  }
}

function labConfig(): Record<string, unknown> {
  const text = document.getElementById("jupyter-config-data")?.textContent;
  return text ? (JSON.parse(text) as Record<string, unknown>) : {};
}

/** Address of one of the extension's endpoints, under the prefix that a hub gives. */
export function endpoint(path: string): URL {
  const configured = labConfig()["baseUrl"];
  const base = typeof configured === "string" ? configured : "/";
  return new URL(`${base.replace(/\/$/, "")}/kakehashi/${path}`, location.origin);
}

/** Fetch without leaving a copy in the browser's cache; a refusal becomes a ServerError. */
/** JupyterHub wants its token also with reads, unless a person's own navigation makes them. */
function xsrf(): Record<string, string> {
  const token = /(?:^|;\s*)_xsrf=([^;]*)/.exec(document.cookie)?.[1];
  return token ? { "X-XSRFToken": token } : {};
}

export async function request(path: string, signal?: AbortSignal): Promise<Response> {
  let response: Response;
  try {
    response = await fetch(endpoint(path), {
      cache: "no-store",
      credentials: "same-origin",
      headers: xsrf(),
      redirect: "error",
      ...(signal ? { signal } : {}),
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ServerError(
      0,
      say(
        "The session's server cannot be reached. It may have ended; your work folder is kept.",
        "セッションのサーバーに接続できません。終了した可能性があります。作業フォルダは保存されています。",
      ),
    );
  }
  if (!response.ok) {
    const text = await response.text();
    let message = `${response.status} ${response.statusText}`;
    try {
      const body = JSON.parse(text) as { message?: unknown };
      if (typeof body.message === "string" && body.message) message = body.message;
    } catch {
      // Not ours (a proxy's page, for instance): the status is all that can be told.
    }
    throw new ServerError(response.status, message);
  }
  return response;
}

export async function requestJson<T>(path: string, signal?: AbortSignal): Promise<T> {
  return (await (await request(path, signal)).json()) as T;
}

export const japanese = navigator.language.toLowerCase().startsWith("ja");

/** The text in the person's language. */
export function say(english: string, nihongo: string): string {
  return japanese ? nihongo : english;
}

/** Message of whatever was thrown. */
export function words(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

type Attributes = Record<string, string | number | boolean>;

/** Make an element; a string child is text, never markup. */
export function h<Tag extends keyof HTMLElementTagNameMap>(
  tag: Tag,
  attributes: Attributes = {},
  ...children: (Node | string)[]
): HTMLElementTagNameMap[Tag] {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false) continue;
    element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children);
  return element;
}

let counter = 0;

/** An id that no other widget on the page has. */
export function uniqueId(stem: string): string {
  counter += 1;
  return `kkh-${stem}-${Date.now().toString(36)}-${counter}`;
}
