"""Shared by all pages: the services behind them, reading in threads, rendering, and selections in URLs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Concatenate, Final, ParamSpec, TypeVar
from urllib.parse import urlencode

import redis
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette_admin.flash import flash
from starlette_admin.routing import route
from starlette_admin.views import CustomView

from tombola.producers.domain.causes import LetterState
from tombola.producers.domain.errors import IdempotencyKeyReused, InvalidRequest, MovementRejected
from tombola.producers.settings import Settings
from tombola.producers.storage.chunks import IN_LIST_MAX
from tombola.producers.storage.faults import explain
from tombola.worker.console.jobs import ForecastRunner, ReplayRunner
from tombola.worker.console.security.roles import must_act
from tombola.worker.console.simulations import SimulationRunner
from tombola.worker.console.threads import in_thread
from tombola.worker.dead_letters.letters import Selection
from tombola.worker.operators.users import Operator

P = ParamSpec("P")
T = TypeVar("T")
Handler = Callable[[Any, Request], Awaitable[Response]]

ALL: Final = "all"
OPEN: Final = "open"
# The choices of the age filters, in seconds.
AGES: Final = {"15m": 900.0, "1h": 3600.0, "6h": 21_600.0, "1d": 86_400.0, "7d": 604_800.0, "30d": 2_592_000.0}


@dataclass
class Services:
    """The services behind the pages. None connects before its first use."""

    settings: Settings
    engine: Engine
    redis: redis.Redis | None
    forecasts: ForecastRunner
    replays: ReplayRunner
    simulations: SimulationRunner

    def read(self, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of `function`, which reads in a transaction of its own. Raises the DrawError of `explain`."""
        try:
            with self.engine.connect().execution_options(read_only=True) as connection:
                return function(connection, *args, **kwargs)
        except SQLAlchemyError as error:
            raise explain(error) from error


def page(path: str, *, methods: tuple[str, ...] = ("GET",)) -> Callable[[Handler], Handler]:
    """Serve a method of a Page at `path`, below the page's path."""
    mark: Callable[[Handler], Handler] = route(path, methods=list(methods))
    return mark


class Page(CustomView):
    """A page in the menu, and the pages below it."""

    def __init__(self, services: Services) -> None:
        super().__init__()
        self.services = services

    def is_active(self, request: Request) -> bool:
        path: str = request.url.path
        return path == self.path or (self.path != "/" and path.startswith(f"{self.path}/"))

    async def read(self, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Services.read in a thread."""
        return await in_thread(lambda: self.services.read(function, *args, **kwargs))

    def show(self, request: Request, template: str, title: str, **context: Any) -> Response:
        """The page that a template renders."""
        assert self._admin is not None
        operator: Operator = request.state.operator
        return self._admin._template_response(
            request, template, {"title": title, "can_act": operator.can_act, **context}
        )


async def act(
    request: Request, function: Callable[..., T], *args: Any, message: Callable[[T], str], back: str, **kwargs: Any
) -> Response:
    """Call `function` for an operator; redirect to `back`, which shows `message` of its result, or its error.

    Raises 403 for a viewer.
    """
    operator = must_act(request)
    try:
        done = await run_in_threadpool(function, *args, operator=operator.name, **kwargs)
    except (InvalidRequest, IdempotencyKeyReused, MovementRejected) as error:
        flash(request, str(error), "error")
    except SQLAlchemyError as error:
        raise explain(error) from error
    else:
        flash(request, message(done), "success")
    return RedirectResponse(back, 303)


# ---- selections in URLs ----------------------------------------------------------------------------------------------


def selection_of(query: Mapping[str, str]) -> Selection:
    """The selection in a URL's query or a form. Raises InvalidRequest for invalid values."""
    state = query.get("state") or OPEN
    ids = [it for it in query.get("ids", "").replace(",", " ").split() if it]
    if len(ids) > IN_LIST_MAX:
        raise InvalidRequest(f"ids: at most {IN_LIST_MAX:,} dead letters")
    return Selection(
        ids=tuple(_integer("ids", it) for it in ids),
        states=tuple(LetterState) if state == ALL else Selection().states if state == OPEN else (state,),
        cause=query.get("cause") or None,
        group_id=query.get("group") or None,
        account_id=_integer("account", query["account"]) if query.get("account", "").strip() else None,
        request_key=query.get("key", "").strip() or None,
        newer_than_s=_age("newer", query.get("newer")),
        older_than_s=_age("older", query.get("older")),
    )


def fields_of(query: Mapping[str, str]) -> dict[str, str]:
    """The fields of a query or a form that make its selection."""
    names = ("ids", "state", "cause", "group", "account", "key", "newer", "older")
    return {name: query[name].strip() for name in names if query.get(name, "").strip()}


def url_of(path: str, fields: Mapping[str, Any], **more: Any) -> str:
    """A path with a query; fields that are None are left out."""
    known = {name: value for name, value in {**fields, **more}.items() if value is not None}
    return f"{path}?{urlencode(known)}" if known else path


def integer(query: Mapping[str, str], name: str, *, least: int = 1) -> int | None:
    """The integer in a field; None if the field is empty. Raises InvalidRequest, also below `least`."""
    text = query.get(name, "").strip()
    if not text:
        return None
    number = _integer(name, text)
    if number < least:
        raise InvalidRequest(f"{name}: at least {least}, not {text:.80}")
    return number


def _integer(name: str, text: str) -> int:
    try:
        number = int(text.strip())
    except ValueError:
        number = 2**63
    if abs(number) >= 2**63:
        raise InvalidRequest(f"{name}: a whole number, not {text!r:.80}")
    return number


def _age(name: str, text: str | None) -> float | None:
    if not text:
        return None
    if text not in AGES:
        raise InvalidRequest(f"{name}: one of {', '.join(AGES)}, not {text!r:.80}")
    return AGES[text]
