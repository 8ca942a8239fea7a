"""What is only looked at: the story of a draw, the record of actions, the users."""

from __future__ import annotations

from typing import Any, Final

import redis
from starlette.requests import Request
from starlette.responses import Response

from tombola.producers.results import KEY_PREFIX
from tombola.worker.console import shown, story
from tombola.worker.console.pages import Page, page, whole
from tombola.worker.console.security.roles import operator_of
from tombola.worker.console.threads import in_thread
from tombola.worker.operators import actions
from tombola.worker.operators import users as operators

ROWS: Final = 100
QUERY_LENGTH_MAX: Final = 200


class Stories(Page):
    """The story of a draw, or of an account."""

    path = "/story"
    menu_label = "Story of a draw"
    icon = "fa-solid fa-timeline"

    @page("")
    async def index(self, request: Request) -> Response:
        query = request.query_params.get("q", "").strip()[:QUERY_LENGTH_MAX]
        if not query:
            return self.show(request, "story.html", "Story of a draw", story=None, query="", held="")
        may_act = operator_of(request).may_act
        told = await self.read(story.tell, query, letter_as=(lambda it: it) if may_act else shown.to_viewers)
        held = await in_thread(lambda: self._held(told.lottery_session_id)) if told.kind == "draw" else ""
        title = {"draw": "Story of a draw", "account": f"Account {told.account_id}"}.get(told.kind, "Nothing found")
        return self.show(request, "story.html", title, story=told, query=query, held=held)

    def _held(self, lottery_session_id: str | None) -> str:
        """Whether the result store holds the result, in words."""
        if self.desk.redis is None:
            return "there is no result store"
        try:
            ttl_s: Any = self.desk.redis.ttl(f"{KEY_PREFIX}{lottery_session_id}")
        except redis.RedisError as error:
            return f"Redis does not answer: {error}"
        if ttl_s == -2:
            return "Redis holds none: it is rebuilt from the database when somebody asks"
        return "in Redis, for ever" if ttl_s == -1 else f"in Redis, for another {ttl_s:,} s"


class Actions(Page):
    """Who did what, when and why. Nothing of it is ever changed."""

    path = "/actions"
    menu_label = "Actions"
    icon = "fa-solid fa-clipboard-list"

    @page("")
    async def index(self, request: Request) -> Response:
        before = whole(request.query_params, "before")
        found = await self.read(actions.recent, rows_max=ROWS + 1, before_id=before)
        following = f"{self.path}?before={found[ROWS - 1].id}" if len(found) > ROWS else None
        return self.show(
            request, "actions.html", "Actions", actions=found[:ROWS], next=following, is_first=before is None
        )


class Users(Page):
    """Who may come in."""

    path = "/users"
    menu_label = "Users"
    icon = "fa-solid fa-users"

    @page("")
    async def index(self, request: Request) -> Response:
        users = await in_thread(lambda: operators.list_all(self.desk.engine))
        return self.show(request, "users.html", "Users", users=users)
