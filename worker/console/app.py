"""The console as an ASGI application: our pages in starlette-admin's layout, and the guard around both."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette_admin.base import BaseAdmin
from starlette_admin.theme import DefaultTheme, TablerSettings

from tombola.producers.brokers.redis_clients import open_redis
from tombola.producers.domain.errors import (
    AccountNotFound,
    CampaignNotFound,
    DeadLetterNotFound,
    DrawError,
    InvalidRequest,
    ReplayNotFound,
    ServiceUnavailable,
    SessionNotFound,
)
from tombola.producers.settings import Settings
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.faults import explain
from tombola.worker.console import shown
from tombola.worker.console.accounts import AccountsPage
from tombola.worker.console.books import BooksPage
from tombola.worker.console.campaign_editor import EditorPage
from tombola.worker.console.campaigns import CampaignsPage
from tombola.worker.console.conformity import ConformityPage
from tombola.worker.console.jobs import ForecastRunner, ReplayRunner
from tombola.worker.console.letters import LettersPage
from tombola.worker.console.overview import OverviewPage
from tombola.worker.console.pages import Services
from tombola.worker.console.records import ActionsPage, StoryPage, UsersPage
from tombola.worker.console.refunds import RefundPage
from tombola.worker.console.replaying import ReplaysPage
from tombola.worker.console.security.guard import Guard
from tombola.worker.console.security.headers import Nonces
from tombola.worker.console.security.login import Login
from tombola.worker.console.simulations import SimulationRunner
from tombola.worker.console.webhooks import FulfilmentsPage, WebhooksPage
from tombola.worker.replays.vouching import Vouching

HERE: Final = Path(__file__).parent
REDIS_TIMEOUT_S: Final = 1.0  # a page waits for Redis
# The HTTP status of an error of ours: the first type that fits, else 500.
STATUSES: Final[dict[type[DrawError], int]] = {
    AccountNotFound: 404,
    CampaignNotFound: 404,
    DeadLetterNotFound: 404,
    ReplayNotFound: 404,
    SessionNotFound: 404,
    InvalidRequest: 400,
    ServiceUnavailable: 503,
}


class Admin(BaseAdmin):
    """starlette-admin without the parts that the console does not use: lists, forms, imports and exports of models."""

    def __init__(self, services: Services) -> None:
        super().__init__(
            title="tombola",
            base_url="/",
            # Absolute: by default, templates in the folder that the process was started in would be used.
            templates_dir=str(HERE / "templates"),
            static_dir=str(HERE / "static"),
            theme=DefaultTheme(TablerSettings(base="slate", primary="blue", radius=0.5)),
            index_view=OverviewPage(services),
            auth_provider=Login(services.engine),
            secret_key=secrets.token_hex(32),  # signs nothing but the messages that are shown once after a form
            timezone_config=None,
        )
        self.templates.env.add_extension(Nonces)
        self.templates.env.filters.update(shown.FILTERS)
        # The editor after the campaigns: a view's routes come before those of the views added before it.
        campaigns = (CampaignsPage, EditorPage, ConformityPage, WebhooksPage, FulfilmentsPage)
        accounts = (AccountsPage, BooksPage, StoryPage, RefundPage)
        for view in (LettersPage, ReplaysPage, *campaigns, *accounts, ActionsPage, UsersPage):
            self.add_view(view(services))

    def _init_csrf(self) -> None:
        """Does nothing: the guard checks forms before they arrive here."""

    def _collect_core_routes(self) -> list[Route]:
        return []

    def _init_routes(self) -> None:
        # Chart.js, from the package chartkick. Before the other routes: /static would match as well.
        charts = StaticFiles(packages=[("chartkick", "django/static/chartkick")])
        self.routes.append(Mount("/static/charts", charts, name="charts"))
        super()._init_routes()

    async def _render_error(self, request: Request, exc: Exception = HTTPException(500)) -> Response:  # noqa: B008
        if isinstance(exc, SQLAlchemyError):
            exc = explain(exc)
        if isinstance(exc, DrawError):
            status = next((status for kind, status in STATUSES.items() if isinstance(exc, kind)), 500)
            exc = HTTPException(status, str(exc))
        return await super()._render_error(request, exc)


def create_app(settings: Settings) -> Guard:
    """The console for `settings`; connects at the first request. Raises ConfigurationError without a database's URL."""
    engine = open_engine(settings.need("database_url"), lock_wait_s=settings.lock_wait_s)
    client = open_redis(settings.need("result_url"), timeout_s=REDIS_TIMEOUT_S) if settings.has("result_url") else None
    forecasts = ForecastRunner(engine, Vouching.of(settings))
    services = Services(settings, engine, client, forecasts, ReplayRunner(settings, engine), SimulationRunner())

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        yield
        services.replays.close()
        services.forecasts.close()
        services.simulations.close()
        engine.dispose()
        if client is not None:
            client.close()

    app = Starlette(lifespan=lifespan)
    admin = Admin(services)
    admin.mount_to(app)
    handlers: Any = {DrawError: admin._render_error, SQLAlchemyError: admin._render_error}
    for kind, handler in handlers.items():
        admin.app.add_exception_handler(kind, handler)
    return Guard(app, engine, settings)
