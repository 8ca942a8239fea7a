"""OpenTelemetry: a draw's trace continues behind the broker, where the extra `otel` is installed.

The context travels beside the body, as W3C `traceparent` and `tracestate`: fields of a Stream's entry, headers of an
AMQP message; the body stays as the contract has it. An application that imports tombola configures the SDK itself;
tombola's processes send to a collector where the environment names one (`set_up`). Without a configured SDK no span is
recorded, and the hot paths pay one comparison.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Final

try:
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:
    HAS_API = False
else:
    HAS_API = True

log = logging.getLogger(__name__)

HEADERS: Final = ("traceparent", "tracestate")  # baggage stays with the caller
HEADER_LENGTH_MAX: Final = 512
LINKS_MAX: Final = 128  # the SDK keeps no more
QUEUE: Final = "draws"
LOOK_EVERY_S: Final = 0.25


_off_until = 0.0  # in monotonic time


def is_on() -> bool:
    """Whether spans are recorded in this process; a new provider is noticed within LOOK_EVERY_S."""
    global _off_until
    # Without a provider, each question makes the API search the environment for one.
    if not HAS_API or time.monotonic() < _off_until:
        return False
    # The API returns a substitute where no provider is set.
    if isinstance(trace.get_tracer_provider(), (trace.ProxyTracerProvider, trace.NoOpTracerProvider)):
        _off_until = time.monotonic() + LOOK_EVERY_S
        return False
    return True


def headers() -> dict[str, str] | None:
    """The headers that continue the current trace behind the broker; None without a trace."""
    if not HAS_API or not trace.get_current_span().get_span_context().is_valid:
        return None
    carrier: dict[str, str] = {}
    # Not the propagators that the environment may name: the format in a message is fixed.
    TraceContextTextMapPropagator().inject(carrier)
    return carrier or None


def ids() -> dict[str, str]:
    """The current trace and span, as fields of a log line."""
    if not HAS_API:
        return {}
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return {}
    return {"trace_id": trace.format_trace_id(context.trace_id), "span_id": trace.format_span_id(context.span_id)}


@contextmanager
def serving(name: str, carrier: Iterable[tuple[bytes, bytes]]) -> Iterator[Any]:
    """A server's span around one HTTP request, in the trace of its headers; yields the span, None without a SDK."""
    if not is_on():
        yield None
        return
    parent = _context({key.decode("latin-1"): value.decode("latin-1") for key, value in carrier})
    with _tracer().start_as_current_span(
        name, context=parent, kind=trace.SpanKind.SERVER, attributes={"http.request.method": name.partition(" ")[0]}
    ) as span:
        yield span


@contextmanager
def publishing(count: int) -> Iterator[dict[str, str] | None]:
    """A producer's span around one publish of `count` draws; yields the headers to send with each message."""
    if not is_on():
        yield headers()
        return
    with _tracer().start_as_current_span(
        "publish draws", kind=trace.SpanKind.PRODUCER, attributes=_messaging("publish", "send", count)
    ):
        yield headers()


@contextmanager
def settling(carriers: Iterable[Mapping[str, Any]], count: int, *, since: float) -> Iterator[None]:
    """A consumer's span of one batch, which began at this `perf_counter`, with a link to the trace of each message."""
    if not is_on():
        yield
        return
    links: list[Any] = []
    for traceparent, tracestate in dict.fromkeys(_pair(it) for it in carriers if it):
        context = trace.get_current_span(
            _context({"traceparent": traceparent, "tracestate": tracestate})
        ).get_span_context()
        if context.is_valid and len(links) < LINKS_MAX:
            links.append(trace.Link(context))
    with _tracer().start_as_current_span(
        "settle draws",
        links=links,
        kind=trace.SpanKind.CONSUMER,
        attributes=_messaging("settle", "process", count),
        start_time=time.time_ns() - int((time.perf_counter() - since) * 1e9),
    ):
        yield


def set_up(role: str) -> None:
    """Send this process's spans to a collector, where OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_TRACES_EXPORTER is set.

    `service.name` is `tombola-{role}`, unless OTEL_SERVICE_NAME is set.
    """
    global _off_until
    endpoint = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    wanted = os.environ.get("OTEL_TRACES_EXPORTER") or ("otlp" if endpoint else "none")
    if wanted == "none" or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or is_on():
        return
    try:
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        exporter = _exporter(wanted)
    except ImportError:
        log.warning("traces are wanted (%s), but not installed: `pip install tombola[otel]`", wanted)
        return
    if exporter is None:
        log.warning("OTEL_TRACES_EXPORTER is %r: known are otlp, console and none", wanted)
        return
    # Attributes in the environment win, and so does OTEL_SERVICE_NAME.
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: f"tombola-{role}"}
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    _off_until = 0.0


def _exporter(wanted: str) -> Any:
    if wanted == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter()
    if wanted == "otlp":
        # Imported by name: only the extra installs it.
        return import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter").OTLPSpanExporter()
    return None


def _tracer() -> Any:
    return trace.get_tracer("tombola")


def _context(carrier: Mapping[str, str]) -> Any:
    """The remote context of a carrier; an empty context where that is not valid."""
    return TraceContextTextMapPropagator().extract({name: carrier[name] for name in HEADERS if name in carrier})


def _pair(carrier: Mapping[str, Any]) -> tuple[str, str]:
    """Traceparent and tracestate, each empty where the sender's value is not a short text."""
    found = (carrier.get(name) for name in HEADERS)
    first, second = (it if isinstance(it, str) and len(it) <= HEADER_LENGTH_MAX else "" for it in found)
    return first, second


def _messaging(operation: str, kind: str, count: int) -> dict[str, Any]:
    """Span attributes by the semantic conventions for messaging."""
    return {
        "messaging.destination.name": QUEUE,
        "messaging.operation.name": operation,
        "messaging.operation.type": kind,
        "messaging.batch.message_count": count,
    }
