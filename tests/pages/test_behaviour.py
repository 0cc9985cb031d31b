"""What a person does with the pages, and what the pages must not do."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPResponse

import pytest

from tests.pages.conftest import Hub, Visit, wait_until

browser = pytest.mark.browser


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: object) -> None:
        return None


def ask(url: str, **headers: str) -> HTTPResponse | urllib.error.HTTPError:
    request = urllib.request.Request(url, headers=headers)
    try:
        return urllib.request.build_opener(NoRedirect).open(request, timeout=10)
    except urllib.error.HTTPError as error:
        return error


# ---- Language


@browser
def test_switching_the_language_stays_on_the_page_and_is_kept(visit: Callable[..., Visit]) -> None:
    person = visit("en")
    person.log_in("switcher")
    person.go("token")
    person.page.get_by_role("link", name="日本語").click()
    person.page.wait_for_url("**/hub/token")
    assert person.page.locator("html").get_attribute("lang") == "ja"
    person.go("home")
    assert person.page.locator("h1").inner_text() == "セッション"
    person.page.get_by_role("link", name="EN").click()
    assert person.page.locator("h1").inner_text() == "Your session"


@pytest.mark.parametrize(
    "elsewhere",
    [
        "https://evil.example/",
        "//evil.example/",
        "/\\evil.example",
        "/%5cevil.example%0d%0aX:1",
        "\tjavascript:alert(1)",
        "/\t/evil.example",
        "http:/evil.example",
    ],
)
def test_switching_the_language_leads_nowhere_else(hub: Hub, elsewhere: str) -> None:
    response = ask(
        f"{hub.url}kakehashi/language/ja?next={urllib.request.quote(elsewhere, safe='%')}"
    )
    assert response.status == 302
    location = response.headers["Location"]
    assert re.match(r"/[^/\\]", location), location
    assert "evil.example" not in location or location.startswith("/%5c")
    assert "X" not in response.headers


def test_a_language_that_there_is_not_is_not_set(hub: Hub) -> None:
    response = ask(f"{hub.url}kakehashi/language/xx")
    assert response.status == 404
    assert "kakehashi-lang" not in str(response.headers)


@browser
def test_the_link_back_does_not_repeat_what_the_address_carried(
    visit: Callable[..., Visit],
) -> None:
    person = visit()
    person.go("broken/400?code=secret&state=secret&_xsrf=secret&opt-site=flow&next=/hub/token")
    for link in person.page.locator(".languages a").all():
        href = link.get_attribute("href")
        assert href is not None
        assert "secret" not in href
        assert "opt-site" not in href
        assert "token" in href


@browser
def test_an_error_page_that_the_proxy_asked_for_is_put_right_in_the_browser(
    visit: Callable[..., Visit], hub: Hub
) -> None:
    """The proxy sends neither cookie nor language; what it got is what the browser shows."""
    bare = ask(f"{hub.url}error/503?url=%2Fuser%2Faya%2F")
    served = bare.read().decode()
    assert 'lang="en" data-language-unknown' in served
    person = visit("ja")
    person.page.route(
        "**/user/aya/lab",
        lambda route: route.fulfill(status=503, content_type="text/html", body=served),
    )
    person.page.goto(hub.url + "user/aya/lab")
    person.page.locator("h1", has_text="セッションが応答しません").wait_for()
    assert person.page.locator("html").get_attribute("lang") == "ja"
    assert "応答" in person.page.locator("main").inner_text()


# ---- What every page carries


@pytest.mark.parametrize("path", ["login", "broken/500", "nothing/here", "kakehashi/logged-out"])
def test_pages_are_not_stored_and_run_nothing_foreign(hub: Hub, path: str) -> None:
    response = ask(hub.url + path)
    assert response.headers["Cache-Control"] == "no-store"
    policies = response.headers.get_all("Content-Security-Policy")
    assert any("default-src 'none'; script-src 'self';" in policy for policy in policies)
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    body = response.read().decode()
    assert not re.search(r"<script(?![^>]*(?:src=|application/json))", body)
    assert not re.search(r"""(?:src|href|action)=["']?(?:https?:)?//""", body)


@pytest.mark.parametrize("path", ["api/", "api/user", "api/users", "home", "static/nothing.js"])
def test_no_answer_but_a_static_file_is_kept(hub: Hub, path: str) -> None:
    assert ask(hub.url + path).headers["Cache-Control"] == "no-store"


def test_a_browser_is_told_to_clear_what_it_has_where_a_person_has_done(hub: Hub) -> None:
    assert ask(hub.url + "kakehashi/logged-out").headers["Clear-Site-Data"] == '"cache", "storage"'
    assert ask(hub.url + "login").headers["Clear-Site-Data"] is None


def test_static_files_may_be_kept_and_only_they_are_served(hub: Hub) -> None:
    body = ask(hub.url + "login").read().decode()
    for path in re.findall(r'"(/hub/kakehashi/static/[^"]+)"', body):
        response = ask(hub.url.removesuffix("/hub/") + path)
        assert response.status == 200
        assert "no-cache" not in (response.headers["Cache-Control"] or "")
    for path in ["../pages.py", "%2e%2e/pages.py", "..%2fpages.py", "nothing.js"]:
        assert ask(f"{hub.url}kakehashi/static/{path}").status in {403, 404}


def test_an_error_page_names_an_event_that_stands_in_the_log(hub: Hub) -> None:
    body = ask(hub.url + "broken/500?secret=1").read().decode()
    found = re.search(r'id="event">(K-[0-9A-F]{8})<', body)
    assert found
    wait_until(lambda: found[1] in hub.log(), "the event is in the log")
    line = next(line for line in hub.log().splitlines() if found[1] in line)
    assert "500 for GET /hub/broken/500" in line
    assert "secret" not in line


def test_words_of_others_are_escaped(hub: Hub) -> None:
    body = ask(hub.url + "broken/500").read().decode()
    assert "&lt;b&gt;of&lt;/b&gt;" in body
    body = ask(hub.url + "outsider").read().decode()
    assert "&lt;staff&gt;, radiology" in body


# ---- The spawn page


@browser
def test_the_spawn_page_works_without_a_mouse(visit: Callable[..., Visit]) -> None:
    person = visit()
    person.log_in("keys")
    person.go("spawn")
    page = person.page
    page.locator('input[name="project"]').first.focus()
    page.keyboard.press("Tab")  # to the places
    page.keyboard.press("ArrowDown")
    assert page.locator('input[name="site"]:checked').get_attribute("value") == "mdx"
    page.keyboard.press("Tab")  # to the queues of that place
    assert page.evaluate("document.activeElement.name") == "queue"
    page.keyboard.press("Tab")
    page.keyboard.type("1")
    page.keyboard.press("Tab")
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.type("1.5")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("/user/keys"))
    person.go("home")
    shown = page.locator("main").inner_text()
    assert "mdx" in shown
    assert "1.5" in shown


@browser
def test_choices_narrow_to_what_fits(visit: Callable[..., Visit]) -> None:
    person = visit()
    person.log_in("narrow")
    person.go("spawn")
    page = person.page
    page.locator('input[value="mdx"]').check()
    assert page.locator('input[name="queue"]:not(:disabled)').count() == 1
    page.locator('input[value="liver-mr"]').check()
    assert page.locator('input[value="mdx"]').is_disabled()
    assert page.locator('input[name="site"]:checked').get_attribute("value") == "flow"
    page.locator('input[value="cpu"]').check()
    assert page.locator("#gpus").input_value() == "0"
    assert page.locator("#gpus").get_attribute("readonly") is not None
    page.locator('input[value="gpu-node"]').check()
    assert page.locator("#gpus").input_value() == "1"
    assert page.locator("#gpus").get_attribute("max") == "4"


@browser
@pytest.mark.parametrize(
    ("field", "value"), [("gpus", "2"), ("gpus", "0.5"), ("gpus", ""), ("hours", "25")]
)
def test_what_is_out_of_range_is_said_at_the_field_and_not_sent(
    visit: Callable[..., Visit], field: str, value: str
) -> None:
    person = visit("ja")
    person.log_in("ranges")
    person.go("spawn")
    page = person.page
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.method))
    page.locator(f"#{field}").fill(value)
    page.locator("#submit").click()
    complaint = page.locator(f"#trouble-{field}")
    complaint.wait_for()
    assert "入力してください" in complaint.inner_text()
    assert page.locator(f"#{field}").get_attribute("aria-invalid") == "true"
    assert page.evaluate("document.activeElement.id") == field
    assert "POST" not in sent


@browser
def test_a_refusal_by_the_server_is_said_once_and_keeps_the_choice(
    visit: Callable[..., Visit],
) -> None:
    person = visit()
    person.log_in("refused")
    person.go("spawn")
    page = person.page
    page.locator('input[value="liver-mr"]').check()
    page.locator("#hours").fill("3.5")
    page.locator("#submit").click()
    page.locator('.notice.bad[role="alert"]').wait_for()
    assert page.get_by_text("the store <b>does</b> not answer").count() == 1
    assert page.locator('input[name="project"]:checked').get_attribute("value") == "liver-mr"
    assert page.locator("#hours").input_value() == "3.5"
    person.complaints[:] = [one for one in person.complaints if "Failed to load" not in one]


@browser
def test_free_gpus_are_asked_again_and_again(visit: Callable[..., Visit]) -> None:
    person = visit()
    person.log_in("live")
    person.page.clock.install()
    person.go("spawn")
    place = person.page.locator('[data-live="flow/gpu-share"]')
    assert "3 free now" in place.inner_text()
    person.page.clock.run_for(10_500)
    person.page.locator('[data-live="flow/gpu-share"]', has_text="2 free now").wait_for()


@browser
def test_figures_that_are_old_are_called_old(visit: Callable[..., Visit]) -> None:
    person = visit()
    person.log_in("stale")
    person.page.clock.install()
    person.go("spawn")
    person.page.clock.run_for(10_500)
    person.page.locator("#stale:not([hidden])").wait_for()
    assert "out of reach" in person.page.locator("#stale").inner_text()
    person.complaints[:] = [one for one in person.complaints if "Failed to load" not in one]


# ---- Waiting and stopping


@browser
def test_a_session_that_waits_can_be_cancelled(visit: Callable[..., Visit]) -> None:
    person = visit()
    person.log_in("cancels")
    person.start_session()
    page = person.page
    page.wait_for_url("**/spawn-pending/**")
    assert page.locator('[data-stage="queued"]').get_attribute("class") != "done"
    page.locator("#cancel").click()
    page.locator("#cancel-dialog").get_by_role("button", name="Go on waiting").click()
    assert "/spawn-pending/cancels" in page.url
    page.locator("#cancel").click()
    page.locator("#cancel-yes").click()
    page.wait_for_url("**/hub/home")
    page.get_by_text("No session is running").wait_for()


@browser
def test_a_session_can_be_stopped(visit: Callable[..., Visit]) -> None:
    person = visit()
    person.log_in("stops")
    person.start_session()
    person.page.wait_for_url(re.compile("/user/stops"))
    person.go("home")
    person.page.locator("#stop").click()
    person.page.keyboard.press("Escape")
    assert person.page.locator("#stop").is_enabled()
    person.page.locator("#stop").click()
    person.page.locator("#stop-yes").click()
    person.page.get_by_text("No session is running").wait_for()


@browser
def test_a_message_of_an_unknown_stage_is_text_in_the_log(visit: Callable[..., Visit]) -> None:
    person = visit()
    person.log_in("odd")
    person.start_session()
    person.page.wait_for_url("**/spawn-pending/**")
    person.page.locator("#progress-details summary").click()
    person.page.get_by_text("<img src=x> [strange]").wait_for()
    assert person.page.locator("#progress-log img").count() == 0


@browser
def test_a_token_is_shown_once_and_can_be_revoked(visit: Callable[..., Visit]) -> None:
    person = visit()
    person.log_in("revoker")
    person.go("token")
    page = person.page
    page.locator("#token-note").fill("a < b")
    page.get_by_role("button", name="Make the token").click()
    page.locator("#token-made").wait_for()
    token = page.locator("#token-result").inner_text()
    assert len(token) >= 32
    person.go("token")
    assert token not in page.content()
    page.get_by_role("button", name="Revoke: a < b").click()
    page.get_by_text("Revoked").wait_for()
    response = ask(f"{person.hub.url}api/user", Authorization=f"token {token}")
    assert response.status == 403
