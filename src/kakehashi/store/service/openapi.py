"""The description of the service, OpenAPI 3.1, from its routes and models."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from pydantic.json_schema import models_json_schema

from kakehashi import __version__
from kakehashi.store.service.models import Problem
from kakehashi.store.service.routes import JSON, ROUTES, Route

if TYPE_CHECKING:
    from pydantic import BaseModel

_REFERENCE = "#/components/schemas/{model}"
_REFUSALS = {
    "401": "The token is not valid, or not any more.",
    "403": "The session or its project has no access.",
    "404": "There is none, or the project may not see it.",
    "409": "Something changed meanwhile; ask again.",
    "422": "The request cannot be understood.",
    "429": "The session asks for too much at a time.",
    "507": "There is no room for another cohort or frozen list.",
    "503": "It took too long, or a newer request took its place.",
}


def document() -> dict[str, Any]:
    """Return the description as a JSON value."""
    shown: list[type[BaseModel]] = [Problem]
    for route in ROUTES:
        if route.request is not None and route.method == "POST":
            shown.append(route.request)
        if route.answer is not None:
            shown.append(route.answer)
    references, definitions = models_json_schema(
        [(model, "validation") for model in dict.fromkeys(shown)], ref_template=_REFERENCE
    )
    named = {model: schema for (model, _), schema in references.items()}
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, named)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Kakehashi catalogue",
            "version": __version__,
            "description": "What a session may ask of the catalogue of medical images.",
        },
        "security": [{"session": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"session": {"type": "http", "scheme": "bearer"}},
            "schemas": definitions["$defs"],
        },
    }


def _operation(route: Route, named: dict[Any, Any]) -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"\{(\w+)\}", route.path)
    ]
    operation: dict[str, Any] = {"operationId": route.run.__name__, "summary": route.summary}
    if route.request is not None and route.method == "POST":
        operation["requestBody"] = {
            "required": True,
            "content": {JSON: {"schema": named[route.request]}},
        }
    elif route.request is not None:
        schema = route.request.model_json_schema()
        needed = schema.get("required", [])
        parameters += [
            {"name": name, "in": "query", "required": name in needed, "schema": part}
            for name, part in schema["properties"].items()
        ]
    if parameters:
        operation["parameters"] = parameters
    content = {kind: {} if route.answer is None else {"schema": named[route.answer]}
               for kind in route.types}  # fmt: skip
    problem = {JSON: {"schema": named[Problem]}}
    operation["responses"] = {"200": {"description": "The answer.", "content": content}} | {
        status: {"description": text, "content": problem} for status, text in _REFUSALS.items()
    }
    return operation
