// The session clock as a widget of a notebook.

import type { RenderContext } from "./host";
import { sessionClock } from "./watch";

function render({ el }: RenderContext<object>): () => void {
  const closed = new AbortController();
  el.append(sessionClock(closed.signal));
  return () => closed.abort();
}

export default { render };
