"""The audit: prove the invariants (ARCHITECTURE, Invariants) from the database.

    I1, I2, I10, I11, I13, I14   worker.audit.sessions          each request beside the ledger rows of its session
    I2                           worker.audit.seeds             the secrets of epochs, and the epoch of each draw
    I14                          worker.audit.holds             each hold beside its ledger rows
    I3, I4, I5                   worker.audit.chains, accounts  the balance of each account beside its chain
    I6                           worker.audit.stored_results    the result store beside the database
    I7                           worker.audit.issued            the stock of each prize beside what draws handed out
    I8                           worker.audit.waiting           the accepted requests beside the clock
    I9                           worker.audit.blocks            sealed blocks beside their ledger rows
    I12                          worker.audit.on_record         what operators did beside the record of their actions

An audit examines everything, or goes on from where the last clean one ended (worker.audit.marks); every account is
looked at in any case. It consists of short transactions (worker.audit.parts, walk), while the workers go on settling.

Each check yields what violates its invariants. A row that cannot be read violates the invariants that needed it, and
the audit goes on with the next row.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Final, NamedTuple

from sqlalchemy import Connection, Engine, func, select
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from tombola.producers.domain.causes import Status
from tombola.producers.domain.draw import Wheels, blind_wheels, seed_of, wheels
from tombola.producers.results import ResultStore
from tombola.producers.settings import Settings
from tombola.producers.storage import clock
from tombola.producers.storage.campaigns import Campaigns
from tombola.producers.storage.faults import explain
from tombola.producers.storage.schema import api_idempotency_requests as requests
from tombola.producers.storage.schema import operator_actions
from tombola.worker.audit import lines, marks, parts
from tombola.worker.audit.blocks import SealedBlocks
from tombola.worker.audit.chains import Chains, begins_at_zero, old_accounts
from tombola.worker.audit.issued import check_issued, check_manifests, check_taken, granted_after, next_taken
from tombola.worker.audit.marks import Mark, Reached
from tombola.worker.audit.on_record import Recharges, check_record
from tombola.worker.audit.parts import Parts
from tombola.worker.audit.report import INVARIANTS, Report, Violation
from tombola.worker.audit.seeds import NotedSeeds, check_rotations, check_seeds
from tombola.worker.audit.sessions import Drawings, Sessions
from tombola.worker.audit.stored_results import StoredResults
from tombola.worker.audit.waiting import check_waiting
from tombola.worker.audit.walk import Walk
from tombola.worker.ledger.old_rows import OldRows
from tombola.worker.seeds.masters import Masters

RECORD_ROWS: Final = 200_000  # ids of ledger rows that one part looks through for recharges on record
LEDGER: Final = ("I1", "I2", "I3", "I4", "I5", "I6", "I10", "I11", "I13", "I14")
# These do not depend on a mark: they look at what is there now, every time.
OF_NOW: Final = frozenset({"I6", "I8"})
RESULT_TIMEOUT_S: Final = 5.0
REQUEST_TIMEOUT_S: Final = 86_400.0  # the default of TOMBOLA_REQUEST_TIMEOUT_S


class Scope(NamedTuple):
    """What an audit looks at; with `goes_on`: what has come since the last clean audit, and every account.

    Without `results` I6 is not looked at. `request_timeout_s` is the time after which the relay gives up a request.
    `seeds` are the master seeds that are known here, by default the one of the wheels; `mark_secret` seals the mark for
    the next audit, by default that seed: without either the next one examines everything.
    """

    goes_on: bool = False
    results: ResultStore | None = None
    request_timeout_s: float = REQUEST_TIMEOUT_S
    seeds: tuple[bytes, ...] = ()
    mark_secret: bytes = b""


EVERYTHING: Final = Scope()


def audit(engine: Engine, wheels: Wheels, scope: Scope = EVERYTHING) -> Report:
    """Check every invariant. `wheels` are the campaigns under the seed, blind ones where no seed is known.

    Nothing is written: worker.audit.audits.record puts the audit on record, with the mark that the next one goes on
    from. Raises ServiceUnavailable or ConfigurationError when the database cannot be read. When a single table cannot
    be read, for example for lack of a privilege, its invariants are "not looked at" in the report.
    """
    try:
        return _Audit(engine, wheels, scope).run()
    except SQLAlchemyError as error:
        raise explain(error) from error


def audit_by(settings: Settings, engine: Engine, *, everything: bool) -> Report:
    """An audit with the seeds, the result store and the times of `settings`; raises as `audit` does."""
    seeds = settings.seeds
    store = ResultStore.from_settings(settings, timeout_s=RESULT_TIMEOUT_S) if settings.has("result_url") else None
    try:
        scope = Scope(not everything, store, settings.request_timeout_s, seeds, _mark_secret(settings))
        return audit(engine, wheels(seeds[0]) if seeds else blind_wheels(), scope)
    finally:
        if store is not None:
            store.close()


def _mark_secret(settings: Settings) -> bytes:
    """What seals marks: a secret that auditors without the seed have as well; empty where there is none."""
    shared = settings.result_secret_bytes
    return hmac.digest(shared, b"tombola-audit-mark", "sha256") if shared else b"".join(settings.seeds[:1])


class _Audit:
    """One audit, from its first part to its last."""

    def __init__(self, engine: Engine, wheels: Wheels, scope: Scope) -> None:
        self._report = report = Report()
        self._scope = scope
        self._wheels = wheels
        seed = seed_of(wheels)
        self._masters = Masters(scope.seeds or (() if seed is None else (seed,)))
        self._mark_secret = scope.mark_secret or seed or b""
        self._versions = Campaigns(engine)
        self._parts = Parts(engine)
        with self._parts.part() as connection:
            self._began_at = clock.now(connection)
            self._old = old = OldRows.of(connection)
            begins_anywhere = begins_at_zero if old is OldRows.NONE else old_accounts(connection)
            kept = _kept(connection, self._mark_secret)
        self._known_block = (0, "") if kept is None else (kept.mark.block, kept.mark.block_hash)
        kept = kept if scope.goes_on else None
        self._mark = kept.mark if kept is not None else None
        self._follows = kept.mac if kept is not None else None
        bands, assets = ({}, []) if kept is None else (kept.bands, kept.mark.assets)
        self._chains = Chains(bands, assets, old=old, begins_anywhere=begins_anywhere)
        results = StoredResults(scope.results, report)
        self._sessions = Sessions(
            report, Drawings(wheels, self._versions, NotedSeeds(engine, self._masters, seed)), old, results
        )
        if self._mark is not None:
            report.after_id, report.since = self._mark.transaction_id, self._mark.at
            self._sessions.granted = self._mark.granted_by_prize()
        self._begins_at = lines.BEFORE_ALL_IDS if self._mark is None else self._mark.transaction_id
        self._walk = Walk(self._parts, report, self._chains, self._sessions, self._begins_at)
        # What transactions that are still open have written may be older by this much.
        self._before = self._began_at - timedelta(seconds=parts.HORIZON_S)
        self._publish_at = self._before
        self._action_id = 0

    def run(self) -> Report:
        report = self._report
        blocks = SealedBlocks(self._parts, 0 if self._mark is None else self._mark.block, self._known_block)
        try:
            error = self._examine(LEDGER, self._ledger())
        finally:
            blocks.finish(report)
        self._examine(("I2",), self._in_one_part(check_manifests))
        self._examine(("I2",), self._in_one_part(lambda connection: check_seeds(connection, self._masters)))
        if error is None:
            self._examine(("I7",), self._issued())
        else:
            report.obstacles["I7"] = report.obstacles["I1"]
        self._examine(("I8",), self._waiting())
        self._examine(("I12",), self._record())
        if error is not None and not report.completed:
            raise error
        report.longest_part_s = self._parts.longest_s
        report.reached = self._reached(blocks)
        return report

    def _examine(self, invariants: tuple[str, ...], found: Iterator[Violation]) -> DBAPIError | None:
        """Report the violations that are `found`; return the error that ended the check, if one did.

        Raises an error that has ended the connection.
        """
        try:
            for violation in found:
                self._report.add(violation)
        except DBAPIError as error:
            if error.connection_invalidated:
                raise
            self._report.obstacles |= dict.fromkeys(invariants, str(explain(error)))
            return error
        self._report.completed.update(invariants)
        return None

    def _ledger(self) -> Iterator[Violation]:
        with self._parts.part() as connection:
            accepted = requests.c.status == Status.ACCEPTED
            waits_since = connection.execute(select(func.min(requests.c.publish_at)).where(accepted)).scalar()
        self._publish_at = self._before if waits_since is None else min(self._before, waits_since)
        mark = self._mark
        changed_since = None if mark is None else mark.at - timedelta(seconds=parts.HORIZON_S)
        yield from self._walk.run(None if mark is None else mark.publish_at, changed_since)

    def _issued(self) -> Iterator[Violation]:
        with self._parts.part() as connection:
            newer = granted_after(connection, self._walk.at_id, self._wheels, self._versions)
            yield from check_issued(connection, self._sessions.granted + newer)
        after = ""
        while self._mark is None:  # those that were handed out since are met with their ledger rows
            with self._parts.part() as connection:
                taken = next_taken(connection, after)
                yield from check_taken(connection, taken)
            if not taken:
                return
            after = taken[-1][0]

    def _waiting(self) -> Iterator[Violation]:
        with self._parts.part() as connection:
            yield from check_waiting(connection, self._scope.request_timeout_s)

    def _record(self) -> Iterator[Violation]:
        with self._parts.part() as connection:
            actions = operator_actions.c
            self._action_id = (
                connection.execute(
                    select(actions.id).where(actions.at < self._before).order_by(actions.id.desc()).limit(1)
                ).scalar()
                or 0
            )
        with self._parts.part() as connection:
            yield from check_record(connection)
            yield from check_rotations(connection)
        recharges = Recharges(0 if self._mark is None else self._mark.action_id, self._old)
        after = self._begins_at
        while after < self._report.up_to_id:
            until = min(max(0, after) + RECORD_ROWS, self._report.up_to_id)
            with self._parts.part() as connection:
                yield from recharges.check_rows(connection, after, until)
            after = until
        with self._parts.part() as connection:
            yield from recharges.check_rest(connection)

    def _in_one_part(self, check: Callable[[Connection], Iterator[Violation]]) -> Iterator[Violation]:
        with self._parts.part() as connection:
            yield from check(connection)

    def _reached(self, blocks: SealedBlocks) -> Reached | None:
        """The mark for the next audit; None where this one leaves something open."""
        report = self._report
        wanted = INVARIANTS.keys() - OF_NOW
        if not self._mark_secret or report.violations or any(report.states[it] == "not looked at" for it in wanted):
            return None
        at_id, chains, granted, action_id = self._walk.at_id, self._chains, self._sessions.granted, self._action_id
        if self._walk.provable is not None:
            at_id, chains, granted = self._walk.provable
            if at_id <= self._begins_at:
                return None
            # Recharges behind the mark are met again, with their actions.
            action_id = 0 if self._mark is None else self._mark.action_id
        mark = Mark(
            at=self._began_at,
            transaction_id=at_id,
            publish_at=self._publish_at,
            action_id=action_id,
            block=blocks.last,
            block_hash=blocks.last_hash,
            granted=[(campaign, prize, units) for (campaign, prize), units in sorted(granted.items())],
            assets=chains.assets,
        )
        return Reached(mark, chains, self._follows, self._mark_secret)


def _kept(connection: Connection, secret: bytes) -> marks.Kept | None:
    """The mark of the last clean audit; None if there is none."""
    if not secret:
        return None
    try:
        return marks.load(connection, secret)
    except DBAPIError as error:
        if error.connection_invalidated:
            raise
        return None  # a database user who may not read marks
