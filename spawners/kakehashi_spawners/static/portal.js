// Behaviour of the portal's pages. No library, no request to anywhere but the portal itself.
"use strict";
{
  const root = document.documentElement;
  const { page, baseUrl, user, xsrf } = document.body.dataset;
  const language = root.lang;
  const byId = (id) => document.getElementById(id);
  const json = (id) => JSON.parse(byId(id).textContent);
  const words = json("words");

  const t = (key, values = {}) =>
    words[key].replace(/\{(\w+)\}/g, (_, name) => String(values[name]));

  const plural = (key, count) => t(count === 1 ? key : `${key}-many`, { count });

  const element = (tag, text, className) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  };

  // ---- Times: the server writes UTC, a person reads the clock on the wall.

  const formats = {
    date: { dateStyle: "long" },
    shortdate: { dateStyle: "medium" },
    time: { hour: "2-digit", minute: "2-digit", hourCycle: "h23" },
    datetime: { dateStyle: "medium", timeStyle: "short", hourCycle: "h23" },
    monthday: { month: language === "ja" ? "numeric" : "short", day: "numeric" },
    weekday: { weekday: "short" },
  };

  const moment = (iso, format) => {
    const dateOnly = /^\d{4}-\d{2}-\d{2}$/.test(iso);
    const when = new Date(iso);
    if (Number.isNaN(when.getTime())) return iso;
    const zone = dateOnly ? { timeZone: "UTC" } : {};
    return new Intl.DateTimeFormat(language, { ...formats[format], ...zone }).format(when);
  };

  const soon = (when) => {
    const today = new Date().toDateString() === when.toDateString();
    return moment(when.toISOString(), today ? "time" : "datetime");
  };

  const tellTimes = (within) => {
    for (const time of within.querySelectorAll("time[data-format]")) {
      const { format } = time.dataset;
      time.textContent =
        format === "soon" ? soon(new Date(time.dateTime)) : moment(time.dateTime, format);
    }
  };
  tellTimes(document);

  // ---- Talking to the portal.

  const trouble = (text) => {
    byId("trouble-text").textContent = text;
    if (!byId("trouble").open) byId("trouble").showModal();
  };

  const request = (path, options = {}) =>
    fetch(baseUrl + path, {
      ...options,
      headers: { "X-XSRFToken": xsrf, "Content-Type": "application/json" },
      credentials: "same-origin",
      cache: "no-store",
    });

  // Answers the response where the portal did it; tells the person, and answers null, otherwise.
  const ask = async (path, options) => {
    let response;
    try {
      response = await request(path, options);
    } catch {
      trouble(t("js.unreachable"));
      return null;
    }
    if (response.ok) return response;
    const body = await response.json().catch(() => ({}));
    trouble(
      t("js.request-failed", { status: response.status, message: body.message ?? "" }).trim(),
    );
    return null;
  };

  const stopServer = () => ask(`api/users/${encodeURIComponent(user)}/server`, { method: "DELETE" });

  for (const button of document.querySelectorAll("[data-opens]")) {
    button.addEventListener("click", () => {
      const dialog = byId(button.dataset.opens);
      dialog.returnValue = "";
      dialog.showModal();
    });
  }

  const confirmed = (dialogId, action) => {
    const dialog = byId(dialogId);
    dialog?.addEventListener("close", () => {
      if (dialog.returnValue === "yes") action();
    });
  };

  const reload = document.querySelector("[data-reload]");
  if (reload) setTimeout(() => location.reload(), 1000 * Number(reload.dataset.reload));

  // The proxy asks for its error pages without the browser's headers, so the portal could not know
  // the language. The same page, asked for by the browser, comes in the right one.
  const putLanguageRight = async () => {
    const cookie = /(?:^|; )kakehashi-lang=(en|ja)(?:;|$)/.exec(document.cookie)?.[1];
    const wanted = cookie ?? (navigator.language.startsWith("ja") ? "ja" : "en");
    const code = document.querySelector(".status-code")?.textContent;
    if (wanted === language || !code) return;
    const response = await fetch(`${baseUrl}error/${code}`, { cache: "no-store" }).catch(() => null);
    if (!response) return;
    const better = new DOMParser().parseFromString(await response.text(), "text/html");
    root.lang = better.documentElement.lang;
    document.title = better.title;
    for (const part of ["header", "main", "footer"]) {
      document.querySelector(part).replaceWith(better.querySelector(part));
    }
  };
  if (root.hasAttribute("data-language-unknown") && page === "error") putLanguageRight();

  // ---- Home.

  const startClock = (clock) => {
    const end = new Date(clock.dataset.ends).getTime();
    const value = clock.querySelector(".clock-value");
    const warning = clock.querySelector(".clock-soon");
    const show = () => {
      const minutes = Math.ceil((end - Date.now()) / 60000);
      if (minutes <= 0) value.textContent = t("js.left-over");
      else if (minutes < 60) value.textContent = t("js.left-minutes", { minutes });
      else {
        value.textContent = t("js.left-hours", {
          hours: Math.floor(minutes / 60),
          minutes: minutes % 60,
        });
      }
      const ending = minutes > 0 && minutes <= 10;
      clock.classList.toggle("soon", ending);
      const text = ending ? t("js.left-soon") : "";
      if (warning.textContent !== text) warning.textContent = text;
    };
    show();
    setInterval(show, 10000);
  };

  const home = () => {
    const clock = document.querySelector(".clock");
    if (clock) startClock(clock);
    confirmed("stop-dialog", async () => {
      const stop = byId("stop");
      stop.disabled = true;
      stop.textContent = t("js.stopping");
      if (await stopServer()) location.reload();
      else location.assign(`${baseUrl}home`);
    });
  };

  // ---- A receipt.

  const named = (kind, value) => words[`js.${kind}.${value}`] ?? value ?? "";

  const receipt = async () => {
    const card = byId("receipt");
    const alert = byId("receipt-trouble");
    const path = `api/kakehashi/receipts/${encodeURIComponent(card.dataset.session)}`;
    const response = await request(path).catch(() => null);
    card.setAttribute("aria-busy", "false");
    if (!response?.ok) {
      alert.textContent = t(response?.status === 404 ? "js.receipt-missing" : "js.unreachable");
      alert.hidden = false;
      byId("receipt-found").hidden = true;
      return;
    }
    const answer = await response.json();
    const statement = answer.receipt ?? answer;
    for (const fact of card.querySelectorAll("[data-fact]")) {
      const value = statement[fact.dataset.fact] ?? "";
      fact.textContent = fact.dataset.fact.endsWith("_at") ? moment(value, "datetime") : value;
    }
    for (const item of statement.items ?? []) {
      const row = element("tr");
      row.append(element("td", item.item), element("td"), element("td"), element("td", item.detail));
      const kind = { gone: "good", left: "bad", unknown: "wait" }[item.result] ?? "";
      row.children[1].append(element("span", named("result", item.result), `tag ${kind}`));
      row.children[2].textContent = named("witness", item.witness);
      byId("receipt-items").append(row);
    }
  };

  // ---- The spawn page.

  const spawn = () => {
    const form = byId("spawn_form");
    if (!byId("choices")) return;
    let choices = json("choices");
    let freshAt = new Date();
    const fields = ["project", "site", "queue", "gpus", "hours"];
    const chosen = (name) => form.querySelector(`input[name="${name}"]:checked:not(:disabled)`)?.value;
    const queueNow = () =>
      choices.sites[chosen("site")]?.queues.find((queue) => queue.name === chosen("queue"));

    const complain = (field, text) => {
      const place = byId(`trouble-${field}`);
      place.textContent = text;
      place.hidden = !text;
      for (const input of form.querySelectorAll(`input[name="${field}"]`)) {
        if (text) input.setAttribute("aria-invalid", "true");
        else input.removeAttribute("aria-invalid");
      }
    };

    const problem = (field) => {
      if (["project", "site", "queue"].includes(field)) {
        return chosen(field) === undefined ? t("js.choose") : "";
      }
      const input = byId(field);
      const value = input.value.trim() === "" ? Number.NaN : Number(input.value);
      const [min, max] = [Number(input.min), Number(input.max)];
      const whole = field === "gpus";
      if (value >= min && value <= max && (!whole || Number.isInteger(value))) return "";
      return t(whole ? "js.whole" : "js.range", { min, max });
    };

    const pick = (name) => {
      const possible = [...form.querySelectorAll(`input[name="${name}"]:not(:disabled)`)];
      if (possible.length && !possible.some((input) => input.checked)) possible[0].checked = true;
    };

    // What does not fit the choice above it is taken away, so that no forbidden pair can be sent.
    const narrow = () => {
      const project = choices.projects.find((one) => one.id === chosen("project"));
      for (const input of form.querySelectorAll('input[name="site"]')) {
        const possible = !project || project.sites.includes(input.value);
        input.disabled = !possible;
        input.closest(".choice").hidden = !possible;
        if (!possible) input.checked = false;
      }
      pick("site");
      for (const group of form.querySelectorAll("[data-site]")) {
        const here = group.dataset.site === chosen("site");
        group.hidden = !here;
        for (const input of group.querySelectorAll("input")) {
          input.disabled = !here;
          if (!here) input.checked = false;
        }
      }
      pick("queue");
    };

    const limit = () => {
      const queue = queueNow();
      if (!queue) return;
      const gpus = byId("gpus");
      if (queue.max_gpus === 0) gpus.value = "0";
      else if (gpus.readOnly) gpus.value = "1";
      gpus.max = queue.max_gpus;
      gpus.readOnly = queue.max_gpus === 0;
      byId("help-gpus").textContent = queue.max_gpus
        ? t("js.gpus-help", { max: queue.max_gpus })
        : t("js.gpus-none");
      byId("hours").max = queue.max_hours;
      byId("help-hours").textContent = t("js.hours-help", { max: queue.max_hours });
    };

    const start = (queue) => {
      if (queue.starts_at) {
        const when = new Date(queue.starts_at);
        return when <= new Date()
          ? t("js.starts-now")
          : t("js.starts", { time: soon(when) });
      }
      return queue.max_gpus && queue.free_gpus > 0 ? t("js.starts-now") : t("js.starts-unknown");
    };

    const live = () => {
      for (const [site, { queues }] of Object.entries(choices.sites)) {
        for (const queue of queues) {
          const place = form.querySelector(`[data-live="${CSS.escape(`${site}/${queue.name}`)}"]`);
          if (!place) continue;
          const tags = [];
          if (queue.max_gpus) {
            const free = queue.free_gpus;
            if (free === null) tags.push([t("js.free-unknown"), "wait"]);
            else if (free > 0) tags.push([t("js.free", { count: free }), "good"]);
            else tags.push([t("js.free-none"), "wait"]);
          }
          const when = start(queue);
          tags.push([when, when === t("js.starts-now") ? "good" : "wait"]);
          place.replaceChildren(...tags.map(([text, kind]) => element("span", text, `tag ${kind}`)));
        }
      }
    };

    const summarise = () => {
      const queue = queueNow();
      const list = element("dl");
      const label = (name) =>
        form
          .querySelector(`input[name="${name}"]:checked`)
          ?.closest(".choice")
          .querySelector(".choice-name").textContent;
      const line = (term, text) => {
        if (text) list.append(element("dt", term), element("dd", text));
      };
      for (const name of ["project", "site", "queue"]) {
        line(form.querySelector(`#field-${name} legend`).textContent, label(name)?.trim());
      }
      const size = [];
      const gpus = Number(byId("gpus").value);
      const hours = Number(byId("hours").value);
      if (queue) size.push(gpus ? plural("js.gpus", gpus) : t("js.no-gpus"));
      if (hours > 0) size.push(plural("js.hours", hours));
      line(form.querySelector("#field-size legend").textContent, size.join(language === "ja" ? "、" : ", "));
      const parts = [list];
      if (!problem("hours")) {
        const end = new Date(Date.now() + hours * 3600000);
        parts.push(element("p", t("js.until", { time: soon(end) }), "help"));
      }
      const text = parts.map((part) => part.textContent).join();
      if (byId("summary").dataset.text === text) return;
      byId("summary").dataset.text = text;
      byId("summary").replaceChildren(...parts);
    };

    const update = () => {
      narrow();
      limit();
      live();
      summarise();
    };

    const refresh = async () => {
      const response = await request("api/kakehashi/sites").catch(() => null);
      const answer = response?.ok ? await response.json().catch(() => null) : null;
      if (answer?.sites && answer.projects) {
        choices = answer;
        freshAt = new Date();
        live();
        summarise();
      }
      byId("stale").hidden = Boolean(answer);
      byId("stale").textContent = answer
        ? ""
        : t("js.stale", { time: moment(freshAt.toISOString(), "time") });
    };

    form.addEventListener("input", (event) => {
      update();
      if (event.target.name && fields.includes(event.target.name)) complain(event.target.name, "");
    });
    form.addEventListener("submit", (event) => {
      const wrong = fields.filter((field) => {
        const text = problem(field);
        complain(field, text);
        return text;
      });
      if (wrong.length) {
        event.preventDefault();
        (form.querySelector(`input[name="${wrong[0]}"]:not(:disabled)`) ?? form).focus();
        return;
      }
      byId("submit").setAttribute("aria-disabled", "true");
      byId("submit").textContent = t("js.starting");
    });
    // Coming back with the browser's own button shows the page as it was left.
    addEventListener("pageshow", (event) => {
      if (event.persisted) location.reload();
    });

    const refusal = byId("refusal");
    if (refusal?.dataset.field) {
      const { field } = refusal.dataset;
      complain(field, byId("refusal-text").textContent);
      byId("refusal-text").hidden = true;
      form.querySelector(`input[name="${field}"]:not(:disabled)`)?.focus();
    }
    for (const place of form.querySelectorAll("[data-refused]")) {
      complain(place.id.slice("trouble-".length), place.textContent.trim());
    }
    update();
    setInterval(refresh, 10000);
  };

  // ---- Waiting for a session.

  const pending = () => {
    const card = byId("progress");
    const steps = [...card.querySelectorAll("[data-stage]")];
    const log = byId("progress-log");
    let reached = 0;
    let over = false;

    const mark = () => {
      steps.forEach((step, index) => {
        const state = index < reached ? "done" : index === reached ? "current" : "waiting";
        step.className = state === "waiting" ? "" : state;
        step.querySelector(".step-state").textContent = t(`js.step-${state}`);
        if (state === "current") step.setAttribute("aria-current", "step");
        else step.removeAttribute("aria-current");
        if (state !== "current") step.querySelector(".step-more").textContent = "";
      });
    };

    const more = (event) => {
      const parts = [];
      if (event.reason && event.reason !== "None") {
        const plain = words[`js.reason.${event.reason}`] ?? event.reason;
        parts.push(t("js.reason", { reason: plain }));
      }
      if (event.stage === "queued") {
        const when = event.starts_at ? new Date(event.starts_at) : null;
        parts.push(when ? t("js.estimated", { time: soon(when) }) : t("js.estimated-none"));
      }
      return parts.join(" · ");
    };

    const status = (text) => {
      byId("status").textContent = text;
      byId("status").hidden = !text;
    };

    const fail = (text) => {
      over = true;
      card.classList.add("failed");
      byId("failed").textContent = `${t("js.start-failed")} ${text}`.trim();
      byId("failed").hidden = false;
      byId("cancel").hidden = true;
      byId("again").hidden = false;
      byId("progress-details").open = true;
      status("");
    };

    const source = new EventSource(card.dataset.progressUrl);
    source.onopen = () => status("");
    source.onerror = () => {
      if (!over) status(t("js.connection-lost"));
    };
    source.onmessage = (message) => {
      if (over) return;
      const event = JSON.parse(message.data);
      if (typeof event.progress === "number") {
        card.querySelector(".meter").setAttribute("aria-valuenow", String(event.progress));
        byId("meter-fill").style.width = `${event.progress}%`;
      }
      const index = steps.findIndex((step) => step.dataset.stage === event.stage);
      if (index >= 0) {
        reached = Math.max(reached, index);
        mark();
        if (index === reached) steps[index].querySelector(".step-more").textContent = more(event);
      }
      if (event.message && log.lastElementChild?.textContent !== event.message) {
        log.append(element("li", event.message));
      }
      if (event.ready) {
        over = true;
        source.close();
        location.reload();
      } else if (event.failed) {
        source.close();
        fail((event.message ?? "").replace(/^Spawn failed:? ?/, ""));
      }
    };
    mark();

    confirmed("cancel-dialog", async () => {
      over = true;
      source.close();
      byId("cancel").disabled = true;
      status(t("js.cancelling"));
      if (await stopServer()) location.assign(`${baseUrl}home`);
      else {
        byId("cancel").disabled = false;
        status("");
      }
    });
  };

  // ---- Arrivals: new figures come in the place of the old ones, so that nobody loses theirs.

  const arrivals = () => {
    const place = byId("arrivals");
    const stale = byId("arrivals-stale");
    let freshAt = new Date();
    let before = "";

    const put = (answer) => {
      if (answer.innerHTML === before) return;
      before = answer.innerHTML;
      const scrolled = [...place.querySelectorAll(".scroll")].map((one) => [one.id, one.scrollLeft]);
      const focused = place.contains(document.activeElement) ? document.activeElement.id : "";
      place.replaceChildren(...answer.childNodes);
      tellTimes(place);
      for (const [id, left] of scrolled) byId(id)?.scrollTo({ left, behavior: "instant" });
      if (focused) byId(focused)?.focus({ preventScroll: true });
    };

    const refresh = async () => {
      const response = await fetch(location.href, { cache: "no-store" }).catch(() => null);
      if (response?.redirected || response?.status === 403) {
        location.reload();
        return;
      }
      const text = response?.ok ? await response.text().catch(() => "") : "";
      const answer = new DOMParser().parseFromString(text, "text/html").getElementById("arrivals");
      if (answer) {
        freshAt = new Date();
        put(answer);
      }
      const said = t("js.stale", { time: moment(freshAt.toISOString(), "time") });
      if (stale.textContent !== said) stale.textContent = said;
      stale.hidden = Boolean(answer || byId("arrivals-silent"));
    };
    setInterval(refresh, 60000);
  };

  // ---- Tokens.

  const token = () => {
    byId("token-form").addEventListener("submit", async (event) => {
      event.preventDefault();
      const response = await ask(`api/users/${encodeURIComponent(user)}/tokens`, {
        method: "POST",
        body: JSON.stringify({
          note: byId("token-note").value.trim() || t("js.token-note"),
          expires_in: Number(byId("token-expires").value),
        }),
      });
      if (!response) return;
      byId("token-result").textContent = (await response.json()).token;
      byId("token-made").hidden = false;
      byId("token-result").focus();
    });
    for (const button of document.querySelectorAll("[data-revoke]")) {
      button.addEventListener("click", async () => {
        const row = button.closest("tr");
        const path = `api/users/${encodeURIComponent(user)}/tokens/${row.dataset.tokenId}`;
        if (await ask(path, { method: "DELETE" })) {
          button.replaceWith(element("span", t("js.revoked"), "help"));
        }
      });
    }
  };

  ({ arrivals, home, receipt, spawn, pending, token })[page]?.();
}
