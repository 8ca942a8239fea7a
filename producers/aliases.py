"""The names under which requests are accepted: an alias in place of each name that another caller holds.

Keys and sessions belong to a caller. An alias (producers.domain.keys.alias) is the same in every repeat: no caller can
block another caller's requests by using their names first.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final, NamedTuple

import msgspec

from tombola.producers.domain import keys
from tombola.producers.storage import requests
from tombola.producers.storage.requests import Acceptance, Clash, Submission
from tombola.producers.storage.transactions import Transaction

RENAMES_MAX: Final = 4  # key and session, and each once more where two callers submit one name at the same time


class Name(NamedTuple):
    """A submission, and which of its names are replaced by an alias."""

    submission: Submission
    has_other_key: bool = False
    has_other_session: bool = False

    def named(self) -> Submission:
        """The submission with the aliases in place."""
        request, caller, _ = self.submission
        key, session = request.request_key, request.lottery_session_id
        is_one_name = key == session
        if self.has_other_key:
            key = keys.alias(caller, key)
        if self.has_other_session or (self.has_other_key and is_one_name):
            session = keys.alias(caller, session)
        renamed = msgspec.structs.replace(request, request_key=key, lottery_session_id=session)
        return self.submission._replace(request=renamed)

    def after(self, clash: Clash) -> Name | None:
        """The next names to try after `clash`; None where the clash is the answer."""
        if clash is Clash.KEY_IS_ANOTHERS and not self.has_other_key:
            return Name(self.submission, has_other_key=True)
        # Also for a caller's own key: when it was accepted, another caller may have held the session.
        is_final = clash is Clash.SESSION_IS_MINE or self.has_other_session
        return None if is_final else self._replace(has_other_session=True)


def accept_under_own_names(
    transaction: Transaction,
    submissions: Sequence[Submission],
    now: datetime,
    *,
    publish_at: datetime,
    is_published: bool,
    seed_epoch: int | None = None,
) -> list[Acceptance]:
    """`requests.accept`, with an alias for every name that another caller holds."""

    def accept(some: Sequence[Submission]) -> list[Acceptance]:
        return requests.accept(
            transaction, some, now, publish_at=publish_at, is_published=is_published, seed_epoch=seed_epoch
        )

    answers = accept(submissions)
    names: dict[int, Name] = {}
    for _ in range(RENAMES_MAX):
        again = {
            number: name
            for number, (it, answer) in enumerate(zip(submissions, answers, strict=True))
            if answer.clash is not None and (name := names.get(number, Name(it)).after(answer.clash)) is not None
        }
        if not again:
            break
        names |= again
        for number, answer in zip(again, accept([name.named() for name in again.values()]), strict=True):
            answers[number] = answer
    return [
        Acceptance(it.request, None) if answer.is_conflict else answer
        for it, answer in zip(submissions, answers, strict=True)
    ]


def spellings(submission: Submission) -> list[Name]:
    """The names under which a row of this submission may stand."""
    return [
        Name(submission, has_other_key, has_other_session)
        for has_other_key in (False, True)
        for has_other_session in (False, True)
    ]
