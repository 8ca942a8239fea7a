"""Roles: viewers look, operators act."""

from __future__ import annotations

import logging

from starlette.exceptions import HTTPException
from starlette.requests import Request

from tombola.worker.operators.users import Operator

log = logging.getLogger(__name__)


def operator_of(request: Request) -> Operator:
    """The user who is logged in, viewer or operator; raises 403 without a session."""
    operator: Operator | None = request.state.operator
    if operator is None:
        raise HTTPException(403)
    return operator


def must_act(request: Request) -> Operator:
    """The operator who is logged in; raises 403 for a viewer, and without a session."""
    operator = operator_of(request)
    if not operator.can_act:
        log.warning("%s is a viewer: refused %s", operator.name, request.url.path)
        raise HTTPException(403, f"{operator.name} is a viewer: only operators can do this. Nothing was done.")
    return operator
