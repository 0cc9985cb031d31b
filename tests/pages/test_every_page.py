"""Each page a person can see, in both languages, light and dark, in a real browser."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from kakehashi_spawners import i18n
from tests.pages.conftest import Visit
from tests.pages.summaries import nothing, summary

pytestmark = pytest.mark.browser

SESSION = "0123456789abcdef0123456789abcdef"
KEY_PREFIXES = sorted({key.partition(".")[0] for key in i18n.catalogue("en")})
BARE_KEY = re.compile(rf"\b(?:{'|'.join(KEY_PREFIXES)})\.[a-z][a-z0-9.-]*")


def login(visit: Visit) -> None:
    visit.go("login")


def logged_out(visit: Visit) -> None:
    visit.go("kakehashi/logged-out")


def home_idle(visit: Visit) -> None:
    visit.log_in("nobody-yet")


def home_running(visit: Visit) -> None:
    visit.log_in("run")
    if visit.page.locator("#stop").count() == 0:
        visit.start_session()
        visit.page.wait_for_url(re.compile("/user/run"))
        visit.go("home")
    visit.page.locator(".clock-value:not(:empty)").wait_for()


def home_ending_soon(visit: Visit) -> None:
    visit.log_in("late")
    if visit.page.locator("#stop").count() == 0:
        visit.start_session()
        visit.page.wait_for_url(re.compile("/user/late"))
        visit.go("home")
    visit.page.locator(".clock.soon").wait_for()


def home_stop_dialog(visit: Visit) -> None:
    home_running(visit)
    visit.page.locator("#stop").click()
    visit.page.locator("#stop-dialog").wait_for()


def home_starting(visit: Visit) -> None:
    pending(visit)
    visit.go("home")


def receipt(visit: Visit) -> None:
    visit.log_in("run")
    visit.go(f"kakehashi/receipt/{SESSION}")
    visit.page.locator("#receipt-items tr").nth(3).wait_for()


def receipt_missing(visit: Visit) -> None:
    visit.log_in("run")
    visit.go("kakehashi/receipt/" + "f" * 32)
    visit.page.locator("#receipt-trouble").wait_for()
    visit.complaints[:] = [one for one in visit.complaints if "status of 404" not in one]


def spawn(visit: Visit) -> None:
    visit.log_in("chooser")
    visit.go("spawn")
    visit.page.locator("#summary dl").wait_for()


def spawn_refused(visit: Visit) -> None:
    visit.log_in("chooser")
    visit.go("spawn")
    visit.page.get_by_text("V100").nth(1).click()
    visit.page.locator("#gpus").fill("2")
    visit.asked = ""
    with visit.page.expect_navigation() as navigation:
        visit.page.locator("#submit").click()
    visit.asked = navigation.value.url
    visit.page.locator("#trouble-gpus:not([hidden])").wait_for()
    visit.complaints[:] = [one for one in visit.complaints if "Failed to load" not in one]


def spawn_nothing(visit: Visit) -> None:
    visit.log_in("nao")
    visit.go("spawn")


def pending(visit: Visit) -> None:
    visit.log_in("ken")
    visit.go("home")
    if visit.page.locator("[data-reload]").count() == 0:
        visit.start_session()
    visit.go("spawn-pending/ken")
    visit.page.locator('[data-stage="queued"] .step-more:not(:empty)').wait_for()


def pending_nearly(visit: Visit) -> None:
    visit.log_in("nearly")
    visit.go("home")
    if visit.page.locator("[data-reload]").count() == 0:
        visit.start_session()
    visit.go("spawn-pending/nearly")
    visit.page.locator('[data-stage="mounted"].current').wait_for()


def stopping(visit: Visit) -> None:
    visit.log_in("yui")
    if visit.page.locator("#start").count() and not visit.page.locator("#stop").count():
        visit.start_session()
        visit.page.wait_for_url(re.compile("/user/yui"))
        visit.go("home")
    if visit.page.locator("#stop").count():
        visit.page.locator("#stop").click()
        visit.page.locator("#stop-yes").click()
        visit.page.locator("[data-reload]").wait_for()
    visit.go("spawn-pending/yui")


def home_stopping(visit: Visit) -> None:
    stopping(visit)
    visit.go("home")


def not_running(visit: Visit) -> None:
    visit.log_in("idle")
    visit.go("user/idle/lab")


def not_started(visit: Visit) -> None:
    visit.log_in("mio")
    visit.start_session()
    visit.page.wait_for_load_state()
    visit.complaints[:] = [one for one in visit.complaints if "status of 500" not in one]
    visit.go("spawn-pending/mio")


def no_project(visit: Visit) -> None:
    assert visit.go("outsider") == 403


def error(status: int) -> Callable[[Visit], None]:
    def bring_up(visit: Visit) -> None:
        assert visit.go(f"broken/{status}") == status

    return bring_up


def tokens(visit: Visit) -> None:
    visit.log_in("tokens")
    visit.go("token")
    visit.page.locator("#token-note").fill("cron job")
    visit.page.locator("#token-form button").click()
    visit.page.locator("#token-made").wait_for()
    visit.go("token")


def admin(visit: Visit) -> None:
    visit.log_in("root-of-portal")
    visit.go("admin")
    visit.page.locator("#react-admin-hook table").first.wait_for()


def arrivals(visit: Visit) -> None:
    visit.hub.store.answer = 200, summary(dt.datetime(2026, 11, 20, 3, 0, tzinfo=dt.UTC))
    visit.log_in("operator")
    assert visit.go("kakehashi/arrivals") == 200
    assert "2026" in visit.page.locator("#arrivals time").first.inner_text()


def arrivals_none(visit: Visit) -> None:
    visit.hub.store.answer = 404, {"error": "not-found", "message": "there is none yet"}
    visit.log_in("operator")
    assert visit.go("kakehashi/arrivals") == 200
    visit.page.locator("#arrivals-none").wait_for()


def arrivals_no_hospital(visit: Visit) -> None:
    visit.hub.store.answer = 200, nothing()
    visit.log_in("operator")
    assert visit.go("kakehashi/arrivals") == 200
    visit.page.locator("#arrivals-no-hospital").wait_for()


def arrivals_silent(visit: Visit) -> None:
    visit.hub.store.answer = None
    visit.log_in("operator")
    assert visit.go("kakehashi/arrivals") == 503
    visit.page.locator("#arrivals-silent").wait_for()


PAGES: dict[str, Callable[[Visit], None]] = {
    "login": login,
    "logged-out": logged_out,
    "home-idle": home_idle,
    "home-running": home_running,
    "home-ending-soon": home_ending_soon,
    "home-stop-dialog": home_stop_dialog,
    "home-starting": home_starting,
    "home-stopping": home_stopping,
    "receipt": receipt,
    "receipt-missing": receipt_missing,
    "spawn": spawn,
    "spawn-refused": spawn_refused,
    "spawn-nothing": spawn_nothing,
    "pending": pending,
    "pending-nearly": pending_nearly,
    "stopping": stopping,
    "not-running": not_running,
    "not-started": not_started,
    "no-project": no_project,
    "error-400": error(400),
    "error-403": error(403),
    "error-404": error(404),
    "error-418": error(418),
    "error-500": error(500),
    "error-503": error(503),
    "tokens": tokens,
    "admin": admin,
    "arrivals": arrivals,
    "arrivals-none": arrivals_none,
    "arrivals-no-hospital": arrivals_no_hospital,
    "arrivals-silent": arrivals_silent,
}

# Every text that is shown against the nearest background that is not transparent, WCAG 2.1 1.4.3.
CONTRAST = """
() => {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return context.getImageData(0, 0, 1, 1).data;
  };
  const channel = (value) => {
    const part = value / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  };
  const luminance = ([r, g, b]) =>
    0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const colour = rgba(getComputedStyle(one).backgroundColor);
      if (colour[3] > 250) return colour;
    }
    return rgba(getComputedStyle(document.body).backgroundColor);
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.textContent.trim();
    if (!text || !element.checkVisibility()) continue;
    if (element.closest("#react-admin-hook, script, [disabled], [aria-disabled=true]")) continue;
    const style = getComputedStyle(element);
    const [a, b] = [luminance(rgba(style.color)), luminance(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    if (ratio < (large ? 3 : 4.5)) found.push(`${ratio.toFixed(2)} ${text.slice(0, 40)}`);
  }
  return found;
}
"""

NAMELESS = """
() => [...document.querySelectorAll("input, select, textarea, button, a[href]")]
  .filter((one) => one.type !== "hidden" && !one.closest("#react-admin-hook"))
  .filter((one) => {
    const labelled = one.getAttribute("aria-labelledby");
    const name = one.getAttribute("aria-label")
      || (labelled && document.getElementById(labelled)?.textContent)
      || [...(one.labels ?? [])].map((label) => label.textContent).join("")
      || (["BUTTON", "A"].includes(one.tagName) ? one.textContent : "");
    return !name.trim();
  })
  .map((one) => one.outerHTML)
"""

DOUBLE_IDS = """
() => {
  const ids = [...document.querySelectorAll("main [id], dialog[id]")].map((one) => one.id);
  return ids.filter((id, index) => ids.indexOf(id) !== index);
}
"""


@pytest.mark.parametrize("language", i18n.LANGUAGES)
@pytest.mark.parametrize("name", PAGES)
def test_page(name: str, language: str, visit: Callable[..., Visit], screenshots: Path) -> None:
    """It comes up in its language, complete, readable, and asks nobody but the portal."""
    person = visit(language)
    PAGES[name](person)
    page = person.page
    page.screenshot(path=screenshots / f"{name}.{language}.png", full_page=True)
    assert page.locator("html").get_attribute("lang") == language
    assert page.locator("main h1").count() == 1
    assert page.locator(".languages a").count() == 2
    text = page.locator("body").inner_text()
    assert BARE_KEY.findall(text) == []
    assert "{" not in text
    assert page.evaluate(NAMELESS) == []
    assert page.evaluate(DOUBLE_IDS) == []
    assert page.evaluate(CONTRAST) == []
    wide = page.evaluate("document.documentElement.scrollWidth > innerWidth")
    assert not wide, "the page must not scroll sideways"


@pytest.mark.parametrize("name", PAGES)
def test_page_in_the_dark_on_a_telephone(
    name: str, visit: Callable[..., Visit], screenshots: Path
) -> None:
    """Dark colours are readable too, and nothing is cut off on a narrow screen."""
    person = visit("ja", color_scheme="dark", viewport={"width": 390, "height": 844})
    PAGES[name](person)
    page = person.page
    page.screenshot(path=screenshots / f"{name}.dark.png", full_page=True)
    assert page.evaluate(CONTRAST) == []
    if name != "admin":  # its table is JupyterHub's own and wide
        assert not page.evaluate("document.documentElement.scrollWidth > innerWidth")


def test_the_checks_see_what_they_look_for(visit: Callable[..., Visit]) -> None:
    """Planted faults turn each of the checks red."""
    person = visit()
    login(person)
    page = person.page
    page.evaluate(
        """() => {
          const main = document.querySelector("main");
          main.insertAdjacentHTML("beforeend", `<p class="pale">login.heading</p><input type="text">
            <p id="twice"></p><p id="twice"></p>`);
          main.querySelector(".pale").style.color = "#999";
        }"""
    )
    assert any("login.heading" in one for one in page.evaluate(CONTRAST))
    assert len(page.evaluate(NAMELESS)) == 1
    assert page.evaluate(DOUBLE_IDS) == ["twice"]
    assert BARE_KEY.findall(page.locator("body").inner_text()) == ["login.heading"]
    page.evaluate("fetch('http://192.0.2.1/x').catch(() => null)")
    page.evaluate("console.error('planted')")
    assert any("planted" in one for one in person.complaints)
    assert any("Content Security Policy" in one for one in person.complaints)
    person.complaints.clear()
