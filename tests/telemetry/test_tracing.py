"""A trace goes on behind the broker: beside the body, on both brokers; and nothing changes where nobody traces."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from redis import Redis

from tests import gateways, processes
from tests.processes import House, draws, wait_for
from tombola.producers.brokers.registry import open_broker
from tombola.producers.brokers.streams import QUEUE
from tombola.producers.client import DrawClient
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.telemetry import tracing
from tombola.worker.deliveries import Delivery, open_deliveries
from tombola.worker.settle.consumer import Consumer

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"
WITHIN_S = 40.0
# A process that prints its spans, soon.
PRINTING = {"OTEL_TRACES_EXPORTER": "console", "OTEL_BSP_SCHEDULE_DELAY": "100"}


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Sequence[ReadableSpan]]]:
    """Somebody traces in this process; call it for what was recorded."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    # The API sets it only once, and for ever.
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    yield exporter.get_finished_spans
    provider.shutdown()


@pytest.fixture(params=["redis", "rabbitmq"])
def house(request: pytest.FixtureRequest, tmp_path: Path, redis_url: str) -> Iterator[House]:
    broker_url = redis_url if request.param == "redis" else request.getfixturevalue("rabbitmq_url")
    with House(f"sqlite:///{tmp_path}/ledger.db", broker_url, redis_url) as house:
        yield house


@pytest.fixture
def consumer(house: House) -> Iterator[Consumer]:
    consumer = Consumer.open(house.settings, house.engine, house.wheels)
    yield consumer
    consumer.deliveries.close()


def deliveries_of(house: House, count: int) -> list[Delivery]:
    source = open_deliveries(house.settings.need("broker_url"), claim_after_s=60, prefetch=100)
    found: list[Delivery] = []
    wait_for(
        lambda: len(found.__iadd__(source.fetch(100, wait_s=0.2))) >= count, within_s=20, what=lambda: f"only {found}"
    )
    source.ack(found)
    source.close()
    return found


def named(found: Sequence[ReadableSpan], name: str) -> list[ReadableSpan]:
    return [span for span in found if span.name == name]


def count_of(span: ReadableSpan) -> int:
    count = (span.attributes or {})["messaging.batch.message_count"]
    assert isinstance(count, int)
    return count


def consume(consumer: Consumer, count: int) -> None:
    settled = 0
    for _ in range(50):
        settled += consumer.consume_once(wait_s=0.2).settled
        if settled >= count:
            return
    raise AssertionError(f"only {settled} of {count} came")


# ---- what travels ----------------------------------------------------------------------------------------------------


def test_each_body_has_its_own_headers_beside_it(house: House) -> None:
    bodies = [draw.encode() for draw in draws(house.accounts(1), 3)]
    broker = open_broker(house.settings.need("broker_url"), publish_timeout_s=10)
    broker.publish(bodies, [{"traceparent": PARENT, "tracestate": "a=b"}, {}, {"traceparent": PARENT}])
    broker.publish([b"bare"])
    with pytest.raises(ValueError, match="zip"):
        broker.publish(bodies, [{}])
    broker.publish([b"last"])
    broker.close()
    came = {it.body: {name: it.headers.get(name) for name in tracing.HEADERS} for it in deliveries_of(house, 5)}
    none = {"traceparent": None, "tracestate": None}
    assert came[bodies[0]] == {"traceparent": PARENT, "tracestate": "a=b"}
    assert came[bodies[2]] == {"traceparent": PARENT, "tracestate": None}
    assert came[bodies[1]] == came[b"bare"] == came[b"last"] == none


def test_the_trace_goes_on_in_the_worker(
    house: House, consumer: Consumer, spans: Callable[[], Sequence[ReadableSpan]]
) -> None:
    (account_id,) = house.accounts(1)
    first, *others = draws([account_id], 4)
    with DrawClient.from_settings(house.settings) as client:
        with trace.get_tracer("shop").start_as_current_span("a click") as click:
            client.enqueue(first)
        client.enqueue_many(others)
    consume(consumer, 4)
    published, more = named(spans(), "publish draws")
    assert published.context is not None
    assert more.context is not None
    assert published.parent is not None
    assert published.parent.span_id == click.get_span_context().span_id
    assert (published.kind, more.kind) == (trace.SpanKind.PRODUCER, trace.SpanKind.PRODUCER)
    assert (count_of(published), count_of(more)) == (1, 3)
    settled = named(spans(), "settle draws")
    linked = [link.context.span_id for span in settled for link in span.links]
    assert {published.context.span_id, more.context.span_id} == set(linked)
    assert sum(count_of(span) for span in settled) == 4
    for span in settled:
        assert span.kind is trace.SpanKind.CONSUMER
        assert span.parent is None, "a batch belongs to no single trace"
        assert (span.attributes or {})["messaging.destination.name"] == QUEUE
        assert all(link.context.is_remote for link in span.links)


@pytest.mark.parametrize(
    "evil",
    [
        {"traceparent": "nonsense"},
        {"traceparent": "00-" + "0" * 32 + "-" + "0" * 16 + "-01"},
        {"traceparent": PARENT * 1000},
        {"traceparent": "", "tracestate": "x" * 100_000},
        {"traceparent": "\x00\n\r", "tracestate": "\udcff".encode(errors="replace").decode()},
        {"somebody": "else's"},
    ],
    ids=["nonsense", "zeros", "endless", "long", "control", "other"],
)
def test_what_somebody_else_sent_beside_it_does_no_harm(
    house: House, consumer: Consumer, spans: Callable[[], Sequence[ReadableSpan]], evil: dict[str, str]
) -> None:
    draw, good = draws(house.accounts(1), 2)
    broker = open_broker(house.settings.need("broker_url"), publish_timeout_s=10)
    broker.publish([draw.encode(), good.encode()], [evil, {"traceparent": PARENT}])
    broker.close()
    consume(consumer, 2)
    linked = [trace.format_trace_id(it.context.trace_id) for span in spans() for it in span.links]
    assert linked == [TRACE]


def test_numbers_in_place_of_a_context_do_no_harm(spans: Callable[[], Sequence[ReadableSpan]]) -> None:
    """AMQP headers are of any type."""
    with tracing.settling([{"traceparent": 7}, {"traceparent": None, "tracestate": b"\xff"}, {}], 3, since=0.0):
        pass
    (span,) = named(spans(), "settle draws")
    assert span.links == ()


def test_a_batch_keeps_a_bounded_number_of_links(spans: Callable[[], Sequence[ReadableSpan]]) -> None:
    carriers = [{"traceparent": f"00-{number + 1:032x}-{number + 1:016x}-01"} for number in range(800)]
    with tracing.settling(carriers, 800, since=time.perf_counter()):
        pass
    (span,) = named(spans(), "settle draws")
    assert len(span.links) == tracing.LINKS_MAX
    assert span.dropped_links == 0


# ---- where nobody traces ---------------------------------------------------------------------------------------------


def test_nothing_is_sent_where_nobody_traces(house: House, consumer: Consumer, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[Any, ...]] = []
    with DrawClient.from_settings(house.settings) as client:
        publish = client._broker.publish

        def watch(*arguments: Any) -> None:
            sent.append(arguments)
            publish(*arguments)

        monkeypatch.setattr(client._broker, "publish", watch)
        draw = draws(house.accounts(1), 1)[0]
        client.enqueue(draw)
    assert sent == [([draw.encode()],)], "the contract's body, and nothing beside it"
    assert not tracing.is_on()
    assert (tracing.headers(), tracing.ids()) == (None, {})
    consume(consumer, 1)


def test_a_body_is_the_same_with_and_without_a_trace(house: House, spans: Callable[[], Sequence[ReadableSpan]]) -> None:
    draw = draws(house.accounts(1), 1)[0]
    with DrawClient.from_settings(house.settings) as client:
        client.enqueue(draw)
    assert [it.body for it in deliveries_of(house, 1)] == [draw.encode()]


@pytest.mark.process
def test_without_the_extra_all_of_it_does_nothing() -> None:
    script = """
import sys
sys.modules["opentelemetry"] = None
import logging
from tombola.producers import client
from tombola.producers.telemetry import tracing
from tombola.producers.gateway import intake
from tombola.worker.settle import consumer
assert not tracing.HAS_API and not tracing.is_on()
assert tracing.headers() is None and tracing.ids() == {}
with tracing.serving("POST /v1/draws", [(b"traceparent", b"x")]) as span, tracing.publishing(1) as beside:
    assert span is None and beside is None
with tracing.settling([{"traceparent": "x"}], 1, since=0.0):
    pass
logging.basicConfig()
tracing.set_up("worker")
print("well")
"""
    run = [sys.executable, "-c", script]
    quiet = processes.environment({"TOMBOLA_X": ""})
    del quiet["TOMBOLA_X"]
    done = subprocess.run(run, env=quiet, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("well\n", "")
    wanted = quiet | {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}
    done = subprocess.run(run, env=wanted, capture_output=True, text=True, timeout=60)
    assert done.stdout == "well\n"
    assert "pip install tombola[otel]" in done.stderr


# ---- processes -------------------------------------------------------------------------------------------------------


def printed(log: str) -> list[dict[str, Any]]:
    """The spans among what a process wrote."""
    found, decoder = [], json.JSONDecoder()
    place = log.find("{")
    while place >= 0:
        try:
            it, end = decoder.raw_decode(log, place)
        except json.JSONDecodeError:
            end = place + 1
        else:
            if "context" in it:
                found.append(it)
        place = log.find("{", end)
    return found


def test_from_a_browsers_trace_through_gateway_and_worker(tmp_path: Path, redis_url: str) -> None:
    with House(f"sqlite:///{tmp_path}/ledger.db", redis_url, redis_url) as house:
        (account_id,) = house.accounts(1)
        with gateways.gateway(house, **gateways.OPEN_TO_ALL, **PRINTING) as gateway:
            body = {"account_id": account_id}
            assert gateway.draw(body, "traced", traceparent=PARENT, tracestate="shop=1").status_code == 202
            assert gateway.draw(body, "new", traceparent="nonsense").status_code == 202
            many = {"draws": [{"account_id": account_id, "request_key": f"many{number}"} for number in range(2)]}
            assert gateway.client.post("/v1/draws/batch", json=many, headers={"traceparent": PARENT}).status_code == 207
            wait_for(
                lambda: len(printed(gateway.process.log())) >= 3, within_s=WITHIN_S, what=lambda: gateway.process.log()
            )
            served = printed(gateway.process.log())
        ours = [span for span in served if span["context"]["trace_id"] == f"0x{TRACE}"]
        assert [(span["name"], span["parent_id"]) for span in ours] == [
            ("POST /v1/draws", f"0x{SPAN}"),
            ("POST /v1/draws/batch", f"0x{SPAN}"),
        ]
        assert {span["kind"] for span in served} == {"SpanKind.SERVER"}
        assert {span["resource"]["attributes"]["service.name"] for span in served} == {"tombola-gateway"}
        with Redis.from_url(redis_url) as client:
            entries: Any = client.xrange(QUEUE)
        beside = {DrawRequest(**key_of(fields)).request_key: fields for _, fields in entries}
        assert beside["traced"][b"traceparent"].decode().split("-")[1:3] == [
            TRACE,
            ours[0]["context"]["span_id"].removeprefix("0x"),
        ]
        assert beside["traced"][b"tracestate"] == b"shop=1"
        assert beside["many1"][b"traceparent"].decode().split("-")[1] == TRACE
        assert beside["new"][b"traceparent"].decode().split("-")[1] != TRACE
        with processes.worker(house.env | PRINTING | {"OTEL_SERVICE_NAME": "our-worker"}) as worker:
            house.wait_settled(4, within_s=WITHIN_S, log=worker.log)
            wait_for(lambda: bool(printed(worker.log())), within_s=WITHIN_S, what=worker.log)
            settled = printed(worker.log())
            assert worker.stop() == 0
    links = {link["context"]["trace_id"] for span in settled for link in span["links"]}
    assert f"0x{TRACE}" in links
    assert len(links) == 2
    assert {span["resource"]["attributes"]["service.name"] for span in settled} == {"our-worker"}


def key_of(fields: dict[bytes, bytes]) -> dict[str, Any]:
    return {name: value for name, value in json.loads(fields[b"body"]).items() if name != "v"}


def test_a_log_line_names_its_trace(spans: Callable[[], Sequence[ReadableSpan]]) -> None:
    with trace.get_tracer("shop").start_as_current_span("a click") as click:
        context = click.get_span_context()
        assert tracing.ids() == {
            "trace_id": trace.format_trace_id(context.trace_id),
            "span_id": trace.format_span_id(context.span_id),
        }
    assert tracing.ids() == {}


def test_without_a_wish_no_sdk_is_set_up(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    tracing.set_up("worker")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    tracing.set_up("worker")
    assert not tracing.is_on()
    assert caplog.text == ""
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "carrier-pigeon")
    tracing.set_up("worker")
    assert not tracing.is_on()
    assert "carrier-pigeon" in caplog.text
