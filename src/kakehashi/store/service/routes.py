"""All addresses of the service: what the server answers, and what its description lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kakehashi.store.service import cohort_endpoints as cohorts
from kakehashi.store.service import endpoints, models

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pydantic import BaseModel

    from kakehashi.store.service.call import Call

JSON = "application/json"


@dataclass(frozen=True)
class Route:
    """One thing that can be asked.

    Attributes
    ----------
    path : str
        With names of parts in braces.
    run : callable
        Answers a call.
    request : type of BaseModel, optional
        Of the body of a POST, or of the parameters of a GET.
    answer : type of BaseModel, optional
        Of a JSON answer.
    types : tuple of str
        Content types of the answer.
    """

    method: str
    path: str
    summary: str
    run: Callable[[Call], Awaitable[BaseModel | None]]
    request: type[BaseModel] | None = None
    answer: type[BaseModel] | None = None
    types: tuple[str, ...] = (JSON,)


_COHORT = "/v1/cohorts/{cohort}"
_SERIES = "/v1/series/{series}"
_ROWS = (endpoints.LINES, endpoints.ARROW)

ROUTES = (
    Route("POST", "/v1/facets", "Count series by the values of facets.",
          endpoints.facets, models.FacetsRequest, models.FacetsAnswer),
    Route("POST", "/v1/page", "List series, a page at a time.",
          endpoints.page, models.PageRequest, models.PageAnswer),
    Route("POST", "/v1/histogram", "Count series by a number or a date.",
          endpoints.histogram, models.HistogramRequest, models.HistogramAnswer),
    Route("POST", "/v1/pivot", "Count series by two facets.",
          endpoints.pivot, models.PivotRequest, models.PivotAnswer),
    Route("POST", "/v1/combinations", "Count series by the values of several facets together.",
          endpoints.combinations, models.CombinationsRequest, models.CombinationsAnswer),
    Route("GET", _SERIES, "Show one series.", endpoints.series, None, models.SeriesAnswer),
    Route("GET", f"{_SERIES}/thumbnail", "Draw the middle slice of one series.",
          endpoints.thumbnail, models.ThumbnailQuery, None, ("image/png",)),
    Route("POST", "/v1/search", "Find words in descriptions and reports.",
          endpoints.search, models.SearchRequest, models.SearchAnswer),
    Route("POST", "/v1/export", "Give chosen columns of all series, as a stream.",
          endpoints.export, models.ExportRequest, None, _ROWS),
    Route("POST", "/v1/cohorts", "Save a query under a name.",
          cohorts.save, models.SaveRequest, models.CohortFacts),
    Route("GET", "/v1/cohorts", "List the cohorts.", cohorts.visible, None, models.CohortsAnswer),
    Route("GET", _COHORT, "Show a cohort and its versions.",
          cohorts.show, None, models.CohortAnswer),
    Route("POST", f"{_COHORT}/share", "Let the whole project see a cohort.",
          cohorts.share, models.ShareRequest, models.CohortFacts),
    Route("POST", f"{_COHORT}/freeze", "Fix the list of series that a cohort gives now.",
          cohorts.freeze, models.FreezeRequest, models.FrozenAnswer),
    Route("GET", f"{_COHORT}/versions/{{version}}", "Show a fixed list with its manifest.",
          cohorts.version, None, models.VersionAnswer),
    Route("GET", f"{_COHORT}/diff", "Compare two versions of a cohort.",
          cohorts.diff, models.DiffQuery, models.DiffAnswer),
    Route("GET", "/v1/openapi.json", "Describe this interface.", endpoints.description),
)  # fmt: skip
