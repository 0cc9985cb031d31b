// JupyterLab's plugin: the session clock in the top bar, and a notice before the session ends.
// Written as the module container that the lab looks for, since it needs none of the lab's own
// modules: the application object carries all that is used.

import css from "./style.css";
import { sessionClock } from "./watch";

interface Lab {
  restored: Promise<void>;
  commands: {
    hasCommand(id: string): boolean;
    execute(id: string, args: Record<string, unknown>): Promise<unknown>;
  };
}

const plugin = {
  id: "kakehashi:session-clock",
  description: "Time left in the session, and the state of its link to the store.",
  autoStart: true,
  activate: (app: Lab): void => {
    void app.restored.then(() => {
      const bar = document.getElementById("jp-top-panel");
      if (!bar) return;
      const style = document.createElement("style");
      style.textContent = css;
      document.head.append(style);
      const clock = sessionClock(new AbortController().signal, (message) => {
        if (!app.commands.hasCommand("apputils:notify")) return;
        void app.commands.execute("apputils:notify", {
          message,
          type: "warning",
          options: { autoClose: false },
        });
      });
      clock.classList.add("kkh-in-bar");
      bar.append(clock);
    });
  },
};

interface Container {
  init(): void;
  get(module: string): Promise<() => unknown>;
}

const known = window as typeof window & { _JUPYTERLAB?: Record<string, Container> };
known._JUPYTERLAB ??= {};
known._JUPYTERLAB["kakehashi"] = {
  init: () => undefined,
  get: () => Promise.resolve(() => ({ __esModule: true, default: [plugin] })),
};
