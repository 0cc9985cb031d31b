"""Who a person is, and which projects they have: asked at log-in and again and again.

The identity provider says who somebody is and their groups; the store's authority says which
projects those groups have. Somebody without a project has no business here.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jwt
from oauthenticator.generic import GenericOAuthenticator
from oauthenticator.oauth2 import OAuthCallbackHandler, OAuthLogoutHandler
from tornado.httpclient import HTTPClientError
from tornado.web import HTTPError
from traitlets import Float, Unicode
from traitlets import Set as SetTrait

from kakehashi.errors import KakehashiError
from kakehashi_spawners.pages import NoProjectError
from kakehashi_spawners.portal import current

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jupyterhub.handlers import BaseHandler

# The token was made a moment ago, by a clock that need not be the hub's.
CLOCK_LEEWAY_S = 15 * 60.0
# Two requests of a page need not ask the provider twice.
FRESH_S = 5.0
# The provider, or its firewall, says that it is not well; the person's right is not touched.
BUSY = frozenset({408, 425, 429})
# As the store takes them: one odd name must not keep the person's others from being asked about.
GROUP_MAX = 255


class ProviderSilentError(KakehashiError):
    """The identity provider gave no answer: nothing is known, and nothing is lost."""


@dataclass
class _Asked:
    """When a person was last asked about, and how it stood."""

    at: float = float("-inf")
    model: dict[str, Any] | None = None


def project_ids(projects: Iterable[dict[str, Any]]) -> frozenset[str]:
    """Return the ids of listed projects."""
    return frozenset(str(project["id"]) for project in projects if "id" in project)


class CallbackHandler(OAuthCallbackHandler):  # type: ignore[misc]  # oauthenticator has no types
    """The way back from the provider; a refusal is shown as what it is."""

    async def get(self) -> None:
        """Log in, and record it."""
        self.check_arguments()
        try:
            user = await self.login_user()
        except HTTPClientError as error:
            # The code or its verifier is wrong, or the provider is not well.
            current().record("log-in-refused", None, {"words": f"provider: {error.code}"})
            raise HTTPError(
                403, "the identity provider did not confirm this log-in; log in again"
            ) from error
        if user is None:
            current().record("log-in-refused", None, {"words": "not allowed"})
            raise HTTPError(403, "this account may not use the portal")
        current().record("log-in", user.name, {"groups": [group.name for group in user.groups]})
        self.redirect(self.get_next_url(user))


class LogoutHandler(OAuthLogoutHandler):  # type: ignore[misc]  # oauthenticator has no types
    """Log-out, recorded."""

    async def handle_logout(self) -> None:
        """Record the log-out of whoever was logged in."""
        if self.current_user is not None:
            current().record("log-out", self.current_user.name, {})
        await super().handle_logout()


class KakehashiAuthenticator(GenericOAuthenticator):  # type: ignore[misc]  # it has no types
    """OpenID Connect with PKCE; whoever has no project is not let in.

    Attributes
    ----------
    required_claim, required_value : str
        A claim that a log-in must carry, in the ID token or the user data, e.g. ``amr`` with
        ``mfa``. Empty: none.
    issuer : str
        What the ID token must name as its issuer.
    operator_groups : set of str
        Groups whose people operate the portal: they are let in without a project. What else
        they may do is a role's matter (``configure.py``).
    fresh_s : float
        Seconds for which an answer of the provider holds.
    """

    callback_handler = CallbackHandler
    logout_handler = LogoutHandler

    required_claim = Unicode("", config=True)
    required_value = Unicode("", config=True)
    issuer = Unicode("", config=True)
    operator_groups = SetTrait(Unicode(), config=True)
    fresh_s = Float(FRESH_S, config=True)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._asking: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._asked: defaultdict[str, _Asked] = defaultdict(_Asked)

    # -- log-in -------------------------------------------------------------------------------

    async def get_user_groups(self, auth_state: dict[str, Any]) -> set[str]:
        """Return the groups that can be a project's; what else a provider says is no name."""
        return {
            group
            for group in await super().get_user_groups(auth_state)
            if isinstance(group, str) and 0 < len(group) <= GROUP_MAX and group.isprintable()
        }

    async def check_allowed(self, username: str, auth_model: dict[str, Any] | None) -> bool:
        """Let in who shows the required claim and has a project, or operates the portal."""
        # JupyterHub also asks about names in its database, without a log-in; that is no right.
        if auth_model is None:
            return False
        state = auth_model.get("auth_state") or {}
        if not self._shows_claim(state):
            current().record(
                "log-in-refused", username, {"words": f"claim {self.required_claim} missing"}
            )
            raise HTTPError(
                403,
                f"this log-in lacks {self.required_claim} = {self.required_value}; "
                "log in with the second factor that the platform asks for",
            )
        groups = sorted(auth_model.get("groups") or ())
        try:
            projects = project_ids(await current().authority.projects(groups))
        except KakehashiError as error:
            raise HTTPError(
                503, "the store cannot say which projects you have; try again"
            ) from error
        if not projects and not self.operator_groups.intersection(groups):
            current().record("log-in-refused", username, {"words": "no project", "groups": groups})
            raise NoProjectError(username, groups)
        if not state.get("refresh_token"):
            self.log.warning(
                "%s: the provider gave no refresh token; the log-in ends with its access token",
                username,
            )
        # A new log-in replaces what was known of the person.
        self._asked.pop(username, None)
        return True

    def _shows_claim(self, state: dict[str, Any]) -> bool:
        if not self.required_claim:
            return True
        claims = {**self._id_claims(state), **(state.get(self.user_auth_state_key) or {})}
        value = claims.get(self.required_claim)
        values = value if isinstance(value, list) else [value]
        return self.required_value in values

    def _id_claims(self, state: dict[str, Any]) -> dict[str, Any]:
        """Read the ID token of this very log-in.

        It came from the token endpoint over TLS, where OpenID Connect (3.1.3.7, 6) lets the
        server's certificate stand for the token's signature.
        """
        token = state.get("id_token")
        if not token:
            return {}
        try:
            claims: dict[str, Any] = jwt.decode(
                token,
                audience=self.client_id,
                issuer=self.issuer or None,
                leeway=CLOCK_LEEWAY_S,
                options={
                    "verify_signature": False,
                    "verify_aud": True,
                    "verify_exp": True,
                    "verify_iss": bool(self.issuer),
                },
            )
        except jwt.InvalidTokenError as error:
            self.log.warning("the provider's ID token is not valid: %s", error)
            return {}
        return claims

    # -- afterwards ---------------------------------------------------------------------------

    async def refresh_user(
        self,
        user: Any,
        handler: BaseHandler | None = None,  # noqa: ARG002 - JupyterHub's signature
        **_options: Any,
    ) -> dict[str, Any] | bool:
        """Ask again; False sends the person to log in.

        A provider or a store that is out of reach takes no right away.
        """
        try:
            model = await self._model(user)
        except ProviderSilentError as error:
            self.log.warning("%s: %s", user.name, error)
            return True
        return model or False

    async def ask(self, user: Any) -> None:
        """Ask for a person with a running session, who may not be clicking anywhere.

        Sessions whose project is lost are ended through the portal.
        """
        try:
            model = await self._model(user)
        except ProviderSilentError as error:
            self.log.warning("%s: %s", user.name, error)
            return
        if model is not None:
            user.sync_groups(model["groups"])

    async def _model(self, user: Any) -> dict[str, Any] | None:
        """Return the person's state as it is now, or None where every right is lost.

        Raises
        ------
        ProviderSilentError
            Nothing is known.
        """
        async with self._asking[user.name]:
            known = self._asked[user.name]
            if time.monotonic() - known.at < self.fresh_s:
                return known.model
            state = await user.get_auth_state()
            model = await self._renewed(state) if state else None
            if model is not None and model["name"] != user.name:
                model = None
            if model is not None:
                # At once: a refresh token is good for one use, and the next one is in here.
                await user.save_auth_state(model["auth_state"])
            await self._apply(user.name, model)
            self._asked[user.name] = _Asked(time.monotonic(), model)
            return model

    async def _apply(self, person: str, model: dict[str, Any] | None) -> None:
        groups = sorted(model["groups"]) if model else []
        try:
            projects = project_ids(await current().authority.projects(groups)) if model else set()
        except KakehashiError as error:
            raise ProviderSilentError(f"projects are not known: {error}") from error
        current().keep_only(
            person,
            projects,
            "the project is no longer open to them"
            if model
            else "the identity provider no longer confirms them",
        )

    async def _renewed(self, state: dict[str, Any]) -> dict[str, Any] | None:
        token_info = state.get("token_response") or {}
        model = await self._confirmed(token_info)
        refresh_token = state.get("refresh_token")
        if model is not None or not refresh_token:
            return model
        parameters = self.build_refresh_token_request_params(refresh_token)
        try:
            token_info = await self.get_token_info(None, parameters)
        except HTTPClientError as error:
            self._must_be_refusal(error)
            return None
        except HTTPError as error:
            # Status 200 with an error inside, or without a token.
            self.log.warning("no new access token: %s", error.log_message)
            return None
        except OSError as error:
            raise ProviderSilentError(f"the identity provider gave no answer: {error}") from error
        token_info.setdefault("refresh_token", refresh_token)
        return await self._confirmed(token_info)

    async def _confirmed(self, token_info: dict[str, Any]) -> dict[str, Any] | None:
        """Return what the provider says to an access token, None where it refuses it."""
        if "access_token" not in token_info:
            return None
        try:
            model: dict[str, Any] = await self._token_to_auth_model(token_info)
        except HTTPClientError as error:
            self._must_be_refusal(error)
            return None
        except OSError as error:
            raise ProviderSilentError(f"the identity provider gave no answer: {error}") from error
        return model

    def _must_be_refusal(self, error: HTTPClientError) -> None:
        if not 400 <= error.code < 500 or error.code in BUSY:
            raise ProviderSilentError(
                f"the identity provider gave no answer: {error.code}"
            ) from error
