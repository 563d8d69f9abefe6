"""OpenTelemetry: spans by the messaging conventions, linked from the handler's to the enqueue's, and metrics."""

import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from runtime_repo import Lease, NewAttempt, Worker
from runtime_repo.database import Row, Source
from runtime_repo.observing import ObservedSource, Observer
from runtime_repo.otel import Telemetry
from tests.cli.program import executed
from tests.contract.conftest import eventually
from tests.contract.test_worker import running
from tests.lab import Lab


class Recorded:
    """What was exported."""

    def __init__(self) -> None:
        self._spans = InMemorySpanExporter()
        self._metrics = InMemoryMetricReader()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self._spans))
        self.meters = MeterProvider([self._metrics])
        self.telemetry = Telemetry(tracer_provider=self.tracers, meter_provider=self.meters)

    def all(self) -> Sequence[ReadableSpan]:
        return self._spans.get_finished_spans()

    def spans(self, operation: str) -> list[ReadableSpan]:
        return [span for span in self.all() if (span.attributes or {}).get("messaging.operation.type") == operation]

    def by(self, attribute: str, metric: str, what: str = "value") -> dict[str, Any]:
        """What was measured, by one of its attributes."""
        return {point.attributes[attribute]: getattr(point, what) for point in self.points(metric)}

    def points(self, metric: str) -> list[Any]:
        data = self._metrics.get_metrics_data()
        return [
            point
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for found in scope.metrics
            if found.name == metric
            for point in found.data.data_points
        ]


def ids(spans: Sequence[ReadableSpan]) -> set[int]:
    return {span.context.span_id for span in spans if span.context is not None}


def parents(spans: Sequence[ReadableSpan]) -> set[int]:
    return {span.parent.span_id for span in spans if span.parent is not None}


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


async def test_a_handlers_span_is_linked_to_its_enqueues(lab: Lab, recorded: Recorded) -> None:
    """Through the attempt's headers, in a trace of its own; so is what settles it. The handler's own are children."""
    telemetry = recorded.telemetry
    tracer = recorded.tracers.get_tracer("the application's")

    async def work(lease: Lease) -> None:
        with tracer.start_as_current_span("its own"):
            if lease.attempt.payload == "bad":
                raise ZeroDivisionError

    async with lab.repository(observe=telemetry) as repo:
        with tracer.start_as_current_span("a request") as request:
            for payload in ("good", "bad"):
                with telemetry.send("mail", headers={"tenant": 7}) as headers:
                    await repo.attempts.enqueue("run", queue="mail", payload=payload, headers=headers)
        worker = Worker(repo, telemetry.process(work), worker_id="w", queues="mail", retry=None)
        async with running(worker):
            await eventually(lambda: len(recorded.spans("settle")) == 2)
        assert [attempt.headers["tenant"] for attempt in await repo.attempts.list()] == [7, 7]
    sent, processed, settled = (recorded.spans(operation) for operation in ("send", "process", "settle"))
    assert {span.name for span in sent} == {"send mail"}
    assert parents(sent) == {request.get_span_context().span_id}
    assert {span.name for span in (*processed, *settled)} == {"process mail", "settle mail"}
    for spans in (processed, settled):
        assert {link.context.span_id for span in spans for link in span.links} == ids(sent)
    assert all(span.parent is None for span in processed)
    assert sorted(str((span.attributes or {})["runtime_repo.outcome"]) for span in settled) == ["completed", "failed"]
    assert [span.status.is_ok for span in processed].count(False) == 1
    [bad] = [span for span in processed if not span.status.is_ok]
    assert bad.events[0].name == "exception"
    assert parents([span for span in recorded.all() if span.name == "its own"]) == ids(processed)
    received = recorded.spans("receive")
    assert sum(int(str((span.attributes or {})["messaging.batch.message_count"])) for span in received) == 2
    for span in (*sent, *processed, *settled, *received):
        attributes = dict(span.attributes or {})
        assert attributes["messaging.system"] == "runtime_repo"
        assert attributes["messaging.destination.name"] == "mail"
        assert attributes["messaging.operation.name"] == attributes["messaging.operation.type"]
        assert (span.start_time or 0) <= (span.end_time or 0)


async def test_what_happens_is_counted_and_timed(lab: Lab, recorded: Recorded) -> None:
    """Statements by name and error, attempts by outcome, lost leases, and how deep a queue is."""
    async with lab.repository(observe=recorded.telemetry) as repo:
        await repo.attempts.enqueue_many([NewAttempt("run", queue="mail") for _ in range(5)])
        one, two = await repo.leases.claim("w", queues="mail", limit=2, ttl=timedelta(minutes=1))
        await repo.attempts.complete(one)
        await repo.attempts.fail(two, "boom", retry_in=timedelta(hours=1))
        with pytest.raises(Exception, match="lost"):
            await repo.attempts.complete(two)
        await recorded.telemetry.measure(repo, ["mail", "none"])
    assert recorded.by("messaging.destination.name", "runtime_repo.queue.depth") == {"mail": 3, "none": 0}
    assert recorded.by("messaging.destination.name", "messaging.client.consumed.messages") == {"mail": 2}
    assert [point.value for point in recorded.points("runtime_repo.leases.lost")] == [1]
    ended = recorded.by("runtime_repo.outcome", "runtime_repo.tries.ended")
    assert ended == {"completed": 1, "to be retried": 1}
    timed = recorded.by("db.operation.name", "db.client.operation.duration", "count")
    assert timed["leases.claim"] == 1
    assert timed["attempts.complete"] == 2


async def test_what_is_sent_without_a_provider_has_no_headers(lab: Lab) -> None:
    """But those that are given; and a handler is called as it is."""
    telemetry = Telemetry()
    with telemetry.send("mail") as headers:
        assert headers is None
    with telemetry.send("mail", headers={"tenant": 7}) as headers:
        assert headers == {"tenant": 7}
    assert not telemetry.is_active()

    async def work(lease: Lease) -> str:
        return lease.attempt_id

    async with lab.repository(observe=telemetry) as repo:
        await repo.attempts.enqueue("run", attempt_id="a")
        [lease] = await repo.leases.claim("w")
        assert await telemetry.process(work)(lease) == "a"


async def test_headers_that_are_no_context_are_no_link(lab: Lab, recorded: Recorded) -> None:
    """Whatever an application sends along."""
    done = []

    async def work(lease: Lease) -> None:
        done.append(lease.attempt_id)

    async with lab.repository() as repo:
        others: list[Any] = [None, [], "traceparent", {"traceparent": 7}, {"traceparent": "nonsense"}]
        for headers in others:
            await repo.attempts.enqueue("run", headers=headers)
        for lease in await repo.leases.claim("w", limit=5):
            await recorded.telemetry.process(work)(lease)
    assert len(done) == 5
    assert [span.links for span in recorded.spans("process")] == [()] * 5


class _Nothing:
    """Answers at once."""

    async def fetch(self, query: str, *args: object) -> Sequence[Row]:  # noqa: ARG002
        return ()


async def cost(call: Callable[[], Awaitable[object]], repeat: int = 7, number: int = 5000) -> float:
    """Seconds a call, the best of several."""
    best = float("inf")
    for _ in range(repeat):
        began = time.perf_counter()
        for _ in range(number):
            await call()
        best = min(best, (time.perf_counter() - began) / number)
    return best


async def test_without_a_provider_a_verb_costs_no_more() -> None:
    """Under a microsecond on an idle machine; a busy one is given three."""
    bare: Any = _Nothing()
    source: Source = bare
    watched = ObservedSource(source, Observer(Telemetry()))
    more = await cost(lambda: watched.fetch("x", 1)) - await cost(lambda: source.fetch("x", 1))
    assert more < 3e-6, more


def test_without_the_package_it_says_which_extra_to_install() -> None:
    """The rest of the library does not need it."""
    program = (
        "import sys\nsys.modules['opentelemetry'] = None\nimport runtime_repo\nruntime_repo.Worker\n"
        "try: import runtime_repo.otel\nexcept ImportError as error: print(error)"
    )
    done = executed("-c", program)
    assert (done.code, done.errors) == (0, "")
    assert "pip install 'runtime-repo[otel]'" in done.output
