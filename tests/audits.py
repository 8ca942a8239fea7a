"""Audits in tests."""

import fakeredis
from sqlalchemy import Engine

from tombola.producers.domain.draw import Wheels
from tombola.producers.results import ResultStore
from tombola.worker.audit.audit import Scope, audit
from tombola.worker.audit.report import Report

EMPTY_STORE = ResultStore(fakeredis.FakeRedis(), ttl_s=3600)


def audited(engine: Engine, wheels: Wheels) -> Report:
    """Everything, beside a result store that answers and has no result: so nothing is left out."""
    return audit(engine, wheels, Scope(results=EMPTY_STORE))
