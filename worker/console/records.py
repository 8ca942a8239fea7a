"""The pages that only show: the story of a draw, the record of actions, the users."""

from __future__ import annotations

from typing import Any, Final

import redis
from starlette.requests import Request
from starlette.responses import Response

from tombola.producers.results import KEY_PREFIX
from tombola.worker.console import shown, story
from tombola.worker.console.pages import Page, integer, page
from tombola.worker.console.security.roles import operator_of
from tombola.worker.console.threads import in_thread
from tombola.worker.operators import actions
from tombola.worker.operators import users as operators

ROWS_MAX: Final = 100
QUERY_LENGTH_MAX: Final = 200


class StoryPage(Page):
    """The story of a draw, or of an account."""

    path = "/story"
    menu_label = "Story of a draw"
    icon = "fa-solid fa-timeline"

    @page("")
    async def index(self, request: Request) -> Response:
        query = request.query_params.get("q", "").strip()[:QUERY_LENGTH_MAX]
        if not query:
            return self.show(request, "story.html", "Story of a draw", story=None, query="", stored="")
        can_act = operator_of(request).can_act
        found = await self.read(story.find, query, letter_as=(lambda it: it) if can_act else shown.as_viewer)
        stored = await in_thread(lambda: self._stored(found.lottery_session_id)) if found.kind == "draw" else ""
        title = {
            "draw": "Story of a movement" if found.is_movement else "Story of a draw",
            "account": f"Account {found.account_id}",
        }.get(found.kind, "Nothing found")
        return self.show(request, "story.html", title, story=found, query=query, stored=stored)

    def _stored(self, lottery_session_id: str | None) -> str:
        """Whether, and for how long, the result store has the result, in words."""
        if self.services.redis is None:
            return "no result store is set"
        try:
            ttl_s: Any = self.services.redis.ttl(f"{KEY_PREFIX}{lottery_session_id}")
        except redis.RedisError as error:
            return f"Redis does not answer: {error}"
        if ttl_s == -2:
            return "not in Redis: rebuilt from the database at the next request for it"
        return "in Redis, without expiry" if ttl_s == -1 else f"in Redis, for another {ttl_s:,} s"


class ActionsPage(Page):
    """The record of operators' actions, with their reasons. Records never change."""

    path = "/actions"
    menu_label = "Actions"
    icon = "fa-solid fa-clipboard-list"

    @page("")
    async def index(self, request: Request) -> Response:
        before = integer(request.query_params, "before")
        found = await self.read(actions.recent, rows_max=ROWS_MAX + 1, before_id=before)
        following = f"{self.path}?before={found[ROWS_MAX - 1].id}" if len(found) > ROWS_MAX else None
        return self.show(
            request, "actions.html", "Actions", actions=found[:ROWS_MAX], next=following, is_first=before is None
        )


class UsersPage(Page):
    """The users of the console."""

    path = "/users"
    menu_label = "Users"
    icon = "fa-solid fa-users"

    @page("")
    async def index(self, request: Request) -> Response:
        users = await in_thread(lambda: operators.list_all(self.services.engine))
        return self.show(request, "users.html", "Users", users=users)
