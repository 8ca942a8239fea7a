"""The state of each request, in `api_idempotency_requests`: this package is the only writer of that table.

                  ┌──► completed   the draw is charged
    accepted ─────┼──► rejected    a final outcome without a charge
       ▲          └──► dead        given up, nothing was charged
       └──────────────── │         an operator's replay accepts the request again, under the same key

Accepted is a promise: the row is the outbox as well, and the relay publishes the request until the row has another
status. A request that reaches the worker without having been accepted gets its row when it settles. A settled request
never changes, and has one result for ever. Its text is not stored: it is rebuilt from the ledger, or from the few
columns of a rejection. Archiving drops the texts that older releases stored.
"""

from tombola.producers.storage.requests.accepting import (
    Acceptance,
    Clash,
    Submission,
    accept,
    busy,
    clash_of,
    owners_of_sessions,
)
from tombola.producers.storage.requests.archiving import (
    SessionState,
    archive,
    state_of_request,
    state_of_session,
    states_of_sessions,
)
from tombola.producers.storage.requests.outbox import (
    Lease,
    count_accepted,
    count_accepted_by_caller,
    count_accepted_once,
    is_any_overdue,
    lease,
    oldest_accepted,
    overtaken_before,
    postpone,
    put_off,
    time_out,
)
from tombola.producers.storage.requests.records import DESCRIBED, RequestRecord, look_up, request_of
from tombola.producers.storage.requests.settling import (
    RequestOutcome,
    finish,
    give_up,
    give_up_all,
    revive,
    try_writing,
)

__all__ = [
    "DESCRIBED",
    "Acceptance",
    "Clash",
    "Lease",
    "RequestOutcome",
    "RequestRecord",
    "SessionState",
    "Submission",
    "accept",
    "archive",
    "busy",
    "clash_of",
    "count_accepted",
    "count_accepted_by_caller",
    "count_accepted_once",
    "finish",
    "give_up",
    "give_up_all",
    "is_any_overdue",
    "lease",
    "look_up",
    "oldest_accepted",
    "overtaken_before",
    "owners_of_sessions",
    "postpone",
    "put_off",
    "request_of",
    "revive",
    "state_of_request",
    "state_of_session",
    "states_of_sessions",
    "time_out",
    "try_writing",
]
