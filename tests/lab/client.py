"""A person of the lab without a browser: log-in by the form, then as scripts would do it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from html.parser import HTMLParser
from http.cookiejar import CookieJar
from urllib.parse import urljoin

import requests

from kakehashi.verify.visitor import Kernel, Visitor
from kakehashi.verify.visitor import VisitError as ClientError
from tests.lab.people import PEOPLE

__all__ = ["Client", "ClientError", "Kernel"]


class _Forms(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.action: str | None = None
        self.fields: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "form" and self.action is None:
            self.action = values.get("action") or ""
        if tag == "input" and values.get("name"):
            self.fields[str(values["name"])] = values.get("value") or ""


class Client(Visitor):
    """One person at one portal, known by cookies."""

    def log_in(self, password: str | None = None) -> requests.Response:
        """Log in at the identity provider; return the page that follows."""
        if password is None:
            password = next(person.password for person in PEOPLE if person.name == self.name)
        page = self.http.get(f"{self.url}/hub/oauth_login", params={"next": "/hub/home"})
        forms = _Forms()
        forms.feed(page.text)
        if forms.action is None:
            raise ClientError(f"no log-in form at {page.url}: {page.status_code}")
        fields = {**forms.fields, "login": self.name, "password": password}
        return self.http.post(urljoin(page.url, forms.action), data=fields)

    def _xsrf(self, path: str) -> str:
        # The most specific cookie for a path is the one that the server there compares with.
        tokens = [c for c in self.http.cookies if c.name == "_xsrf" and path.startswith(c.path)]
        return max(tokens, key=lambda cookie: len(cookie.path)).value or "" if tokens else ""

    def headers(self, path: str) -> dict[str, str]:
        return {"X-XSRFToken": self._xsrf(path), "Referer": self.url + "/hub/home"}

    def stop(self, seconds: float = 60) -> None:
        super().stop(seconds)
        # The next server does not know the log-in of this one.
        cookies: CookieJar = self.http.cookies
        for cookie in list(cookies):
            if cookie.path == f"/user/{self.name}/":
                cookies.clear(cookie.domain, cookie.path, cookie.name)

    def enter_lab(self) -> None:
        """Get the cookies of the person's server by its log-in through the hub."""
        page = self.http.get(f"{self.url}/user/{self.name}/lab")
        if page.status_code != 200:
            raise ClientError(f"lab: {page.status_code} {page.text[:500]}")

    @contextlib.contextmanager
    def kernel(self) -> Iterator[Kernel]:
        if not any(c.path == f"/user/{self.name}/" for c in self.http.cookies):
            self.enter_lab()
        with super().kernel() as kernel:
            yield kernel
