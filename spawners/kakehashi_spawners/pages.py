"""What a person sees of the login server.

:func:`configure_pages` puts the portal's own templates, static files and words in place of
JupyterHub's, and gives every page the language of its request and a strict content policy.
:func:`render_form` makes the fields of the spawn page.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import re
import secrets
from contextvars import ContextVar
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, urlencode, urlsplit

import jinja2
from jupyterhub.handlers.base import BaseHandler
from jupyterhub.handlers.static import CacheControlStaticFilesHandler
from tornado import web
from tornado.log import app_log

from kakehashi import __version__
from kakehashi.config import Identity
from kakehashi.unkept import Unkept
from kakehashi_spawners import i18n
from kakehashi_spawners.arrivals import ArrivalsHandler

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tornado.httputil import HTTPHeaders, HTTPServerRequest

    from kakehashi.config import Config, Site

TEMPLATES: Final = Path(__file__).parent / "templates"
STATIC: Final = Path(__file__).parent / "static"
FIELDS: Final = ("project", "site", "queue", "gpus", "hours")
DEFAULT_HOURS: Final = 2.0
COOKIE_SECONDS: Final = 365 * 24 * 3600

# Nothing but the portal's own files runs or loads; this stands beside JupyterHub's own policy.
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)

# Below the portal's address: files that are the same for everybody, and may be kept.
SHARED: Final = ("/hub/static/", "/hub/kakehashi/static/", "/hub/logo")
# Where a person has done with a session, or with the portal.
LOG_OUT: Final = ("/hub/logout", "/hub/kakehashi/logged-out")
OWN_SERVER: Final = re.compile(r"/hub/api/users/[^/]+/server")

# Refusals of kakehashi_spawners.options that the page can say in the person's language; any other
# is shown as it came.
_REFUSALS: Final = tuple(
    (re.compile(pattern), key)
    for pattern, key in (
        (r"at most (?P<value>[0-9.]+) here", "refusal.at-most"),
        (r"choose one", "refusal.choose"),
        (r"you have no project .*", "refusal.project"),
        (r"you have no account at .*", "refusal.account"),
        (r"project .* may not compute at .*", "refusal.not-here"),
        (r".* has no queue .*", "refusal.queue"),
        (r"must be a (whole )?number.*", "refusal.number"),
    )
)

_request: ContextVar[HTTPServerRequest | None] = ContextVar("kakehashi_request", default=None)


class NoProjectError(web.HTTPError):
    """Somebody is logged in and belongs to no open project; the page says what to do.

    Parameters
    ----------
    person : str
        Name at the identity provider.
    groups : iterable of str
        The groups that the provider sent.
    """

    def __init__(self, person: str, groups: Iterable[str]) -> None:
        super().__init__(403, "%s belongs to no open project", person)
        self.no_project = {"person": person, "groups": sorted(groups)}


class RequestContext(Unkept):
    """Notes a request's language before its handler runs, and guards the pages it answers.

    Tornado makes one of these for each request, in the context that the handler's task copies:
    the only place that every page passes, error pages of unknown addresses included.
    """

    def __init__(self, base: str, request: HTTPServerRequest) -> None:
        super().__init__(tuple(base + path for path in SHARED), POLICY, request)
        cookie = request.cookies.get(i18n.COOKIE)
        i18n.set_current(
            i18n.negotiate(cookie.value if cookie else None, request.headers.get("Accept-Language"))
        )
        _request.set(request)
        self._language = i18n.current_language()
        below = request.path.removeprefix(base)
        self._ends = below in LOG_OUT or (
            request.method == "DELETE" and OWN_SERVER.fullmatch(below) is not None
        )

    def add(self, headers: HTTPHeaders, *, page: bool) -> None:
        """Add the headers of a page, and those of an end."""
        if self._ends:
            # A second line: nothing that was a person's should be there to be cleared.
            headers["Clear-Site-Data"] = '"cache", "storage"'
        if page:
            headers["Content-Language"] = self._language
            headers["X-Content-Type-Options"] = "nosniff"
            headers.add("Vary", "Cookie, Accept-Language")


class LanguageHandler(BaseHandler):  # type: ignore[misc]  # jupyterhub has no types
    """Keeps the language that a person chose, and goes back to where they were."""

    def get(self, language: str) -> None:
        """Set the cookie; ``next`` may only be a page of this portal."""
        self.set_cookie(
            i18n.COOKIE,
            language,
            path=self.base_url,
            max_age=COOKIE_SECONDS,
            samesite="Lax",
            secure=self.request.protocol == "https",
        )
        wanted = self.get_argument("next", "")
        self.redirect(wanted if _is_own_page(wanted, self.base_url) else self.hub.base_url + "home")


class ReceiptHandler(BaseHandler):  # type: ignore[misc]  # jupyterhub has no types
    """The page of one receipt; whose it is, the interface that it asks decides."""

    @web.authenticated
    async def get(self, session: str) -> None:
        """Render the frame; the browser fetches the receipt into it."""
        self.finish(await self.render_template("receipt.html", session=session))


class LoggedOutHandler(BaseHandler):  # type: ignore[misc]  # jupyterhub has no types
    """Where a person lands after logging out."""

    async def get(self) -> None:
        """Say what goes on, and how to come back."""
        self._jupyterhub_user = None
        self.finish(await self.render_template("logout.html"))


def configure_pages(c: Any, config: Config) -> None:
    """Make JupyterHub show the portal's pages.

    Call it last: it adds to ``tornado_settings``, ``template_vars``, ``template_paths`` and
    ``extra_handlers`` whatever stands there already.

    Parameters
    ----------
    c : traitlets.config.Config
        JupyterHub's configuration.
    config : Config
        The deployment; ``[portal]`` must be there.

    Raises
    ------
    ConfigError
        There is no ``[portal]``.
    """
    portal = config.need_portal()
    login_service = Identity.model_fields["login_service"].default
    own_service = config.identity is not None and config.identity.login_service != login_service
    c.JupyterHub.template_paths = [str(TEMPLATES), *_list(c.JupyterHub, "template_paths")]
    c.JupyterHub.template_vars = {
        **_dict(c.JupyterHub, "template_vars"),
        "portal_title": portal.title,
        "portal_version": __version__,
        "own_login_service": own_service,
        # JupyterHub calls what can be called with the person, once for each page.
        "t": lambda _person: i18n.translate,
        "lang": lambda _person: i18n.current_language(),
        "lang_known": lambda _person: i18n.current().known,
        "here": lambda _person: _here(),
        "script_words": lambda _person: _script_words(i18n.current_language()),
        "asset": lambda _person: _asset,
        "error_event": lambda _person: _error_event,
        "refused_field": lambda _person: refused_field,
        "session_facts": lambda _person: _session_facts,
        "site_title": lambda _person: partial(_site_title, config.sites),
    }
    if config.identity is None or config.identity.logout_url is None:
        base = urlsplit(portal.url).path
        c.OAuthenticator.logout_redirect_url = f"{base}/hub/kakehashi/logged-out"
    settings = _dict(c.JupyterHub, "tornado_settings")
    base_path = urlsplit(portal.url).path.rstrip("/")
    settings["transforms"] = [partial(RequestContext, base_path), *settings.get("transforms", ())]
    c.JupyterHub.tornado_settings = settings
    c.JupyterHub.extra_handlers = [
        *_list(c.JupyterHub, "extra_handlers"),
        (r"/kakehashi/static/(.*)", CacheControlStaticFilesHandler, {"path": str(STATIC)}),
        (r"/kakehashi/language/(en|ja)", LanguageHandler),
        (r"/kakehashi/receipt/([0-9a-f]{32})", ReceiptHandler),
        (r"/kakehashi/logged-out", LoggedOutHandler),
        (r"/kakehashi/arrivals", ArrivalsHandler),
    ]


def render_form(choices: Mapping[str, Any], language: i18n.Language, error: str | None) -> str:
    """Render the fields of the spawn page.

    Parameters
    ----------
    choices : mapping
        What the person may have: ``{"projects": [..], "sites": {..}}`` as ``kakehashi/sites``
        answers.
    language : {"en", "ja"}
        Language of the page.
    error : str or None
        Why the last attempt was refused, ``FIELD: TEXT`` where one field is to blame.

    Returns
    -------
    str
        HTML to stand inside JupyterHub's form; every value is escaped.
    """
    title = "title_ja" if language == "ja" else "title"
    sites = {
        name: {**site, "shown": site.get(title) or site["title"]}
        for name, site in choices["sites"].items()
        if site["queues"]
    }
    projects = [
        {"series": None, **project, "shown": project.get(title) or project["title"]}
        for project in choices["projects"]
        if any(name in sites for name in project["sites"])
    ]
    return (
        _form_environment()
        .get_template("spawn_form.html")
        .render(
            t=lambda key, **values: i18n.translate(key, language, **values),
            # Without a project the page says so; a project without a site is another matter.
            projects=projects if sites else choices["projects"],
            sites=sites if projects else {},
            choices={"projects": projects, "sites": sites},
            refusal=refused_field(error, language),
            **_preselect(projects, sites, _posted()),
        )
    )


def refused_field(
    message: str | None, language: i18n.Language | None = None
) -> dict[str, str | None] | None:
    """Split a refusal into the field that is to blame and the text for a person.

    Parameters
    ----------
    message : str or None
        ``FIELD: TEXT``, or any text; JupyterHub's ``HTTP 400: Bad Request (...)`` around it is
        taken off.
    language : {"en", "ja"}, optional
        Of the text; the current request's by default.

    Returns
    -------
    dict or None
        ``{"field": NAME or None, "text": TEXT}``; None where there is no message.
    """
    if not message:
        return None
    wrapped = re.fullmatch(r"HTTP \d{3}: [^(]*\((.*)\)", message, re.DOTALL)
    text = wrapped[1] if wrapped else message
    field, colon, rest = text.partition(": ")
    if colon and field in FIELDS:
        return {"field": field, "text": _in_words(rest, language)}
    return {"field": None, "text": text}


def _in_words(refusal: str, language: i18n.Language | None) -> str:
    for pattern, key in _REFUSALS:
        found = pattern.fullmatch(refusal)
        if found:
            return i18n.translate(key, language, **found.groupdict())
    return refusal


def _preselect(
    projects: list[dict[str, Any]], sites: dict[str, dict[str, Any]], posted: Mapping[str, str]
) -> dict[str, Any]:
    """Choose what stands in the form: what was sent before where possible, else the first."""
    if not projects or not sites:
        return {"chosen": {}, "limits": {}}
    project = next((one for one in projects if one["id"] == posted.get("project")), projects[0])
    possible = [name for name in sites if name in project["sites"]]
    site = posted["site"] if posted.get("site") in possible else possible[0]
    queues = sites[site]["queues"]
    queue = next((one for one in queues if one["name"] == posted.get("queue")), queues[0])
    return {
        "chosen": {
            "project": project["id"],
            "site": site,
            "queue": queue["name"],
            "gpus": posted.get("gpus", str(min(1, queue["max_gpus"]))),
            "hours": posted.get("hours", _number(min(DEFAULT_HOURS, queue["max_hours"]))),
        },
        "limits": {"max_gpus": queue["max_gpus"], "max_hours": queue["max_hours"]},
    }


def _posted() -> dict[str, str]:
    request = _request.get()
    if request is None or request.method != "POST":
        return {}
    return {
        name: values[-1].decode("utf-8", "replace")
        for name, values in request.body_arguments.items()
        if name in FIELDS
    }


@cache
def _form_environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    environment.filters["memory"] = lambda gigabytes: (
        f"{gigabytes:.0f}" if gigabytes >= 10 else _number(gigabytes)
    )
    return environment


def _number(value: float) -> str:
    """Write a number as a person would: no ``.0``, one decimal at most beyond one."""
    return f"{round(value, 1 if value >= 1 else 2):g}"


def _site_title(sites: Mapping[str, Site], name: str) -> str:
    site = sites.get(name)
    if site is None:
        return name
    return (site.title_ja if i18n.current_language() == "ja" else None) or site.title


def _session_facts(spawner: Any) -> dict[str, Any]:
    """Gather what pages show of a session; a spawner that cannot say something leaves it out."""
    options = getattr(spawner, "user_options", None) or {}
    session = spawner.page_session() if hasattr(spawner, "page_session") else {}
    receipts = spawner.page_receipts() if hasattr(spawner, "page_receipts") else []
    return {
        "chosen": {
            name: _number(float(options[name])) if name == "hours" else options[name]
            for name in FIELDS
            if name in options
        },
        "ends_at": session.get("ends_at"),
        "receipts": receipts,
    }


def _error_event(status: int) -> dict[str, str]:
    """Give an error page a number for support, and write the same number into the log."""
    event = f"K-{secrets.token_hex(4).upper()}"
    request = _request.get()
    where = f"{request.method} {request.path}" if request else "(no request)"
    app_log.warning("event %s: page with status %s for %s", event, status, where)
    now = dt.datetime.now(dt.UTC)
    return {"id": event, "time": now.strftime("%Y-%m-%dT%H:%M:%SZ")}


def _here() -> str:
    """Return the address of this page for coming back to, without anything secret in it.

    Of the query only ``next`` is kept: the rest may be a code of the log-in, a token against
    forged requests, or options that would start a session.
    """
    request = _request.get()
    if request is None or request.path.endswith("/oauth_callback"):
        return ""
    query = [(key, value) for key, value in parse_qsl(request.query) if key == "next"]
    return request.path + (f"?{urlencode(query)}" if query else "")


def _is_own_page(address: str, base_url: str) -> bool:
    """Tell whether an address is a path below the portal's own, and cannot lead elsewhere."""
    if not address.startswith(base_url) or re.search(r"[\\\x00-\x20]", address):
        return False
    parts = urlsplit(address)
    return not address.startswith("//") and not parts.scheme and not parts.netloc


@cache
def _asset(name: str) -> str:
    """Return a static file's name with its content's hash, so that browsers may keep it."""
    return f"{name}?v={hashlib.sha256((STATIC / name).read_bytes()).hexdigest()[:12]}"


@cache
def _script_words(language: i18n.Language) -> dict[str, str]:
    return {key: text for key, text in i18n.catalogue(language).items() if key.startswith("js.")}


def _list(section: Any, name: str) -> list[Any]:
    return list(section[name]) if name in section else []


def _dict(section: Any, name: str) -> dict[str, Any]:
    return dict(section[name]) if name in section else {}
