"""
OpenTelemetry on top of ``observe=``: spans and metrics by its messaging conventions. It needs the extra ``otel``.

Nothing is recorded, and next to nothing done, as long as the application has set no provider.
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from runtime_repo.observing import (
    Claimed,
    Completed,
    Event,
    Failed,
    LeaseLost,
    Migrated,
    OutageBegan,
    Statement,
    Swept,
)
from runtime_repo.records import DEFAULT_QUEUE, Lease
from runtime_repo.values import check_id, queue_names

try:
    from opentelemetry import metrics, propagate, trace
    from opentelemetry.context import Context
except ImportError as error:
    raise ImportError(
        "runtime_repo.otel needs opentelemetry-api: install the extra otel, as in pip install 'runtime-repo[otel]'"
    ) from error

if TYPE_CHECKING:
    from runtime_repo.repository import RuntimeRepository
    from runtime_repo.worker import Handler

__all__ = ["Telemetry"]

_SYSTEM = {"messaging.system": "runtime_repo"}
_QUEUE = "messaging.destination.name"

_ASKED_EVERY = 1.0
"""Seconds between two looks whether there is a provider."""


class Telemetry:
    """
    What is given to a repository as ``observe=``, and what spans are made with that the application's own belong to.

    - ``send`` is a span around an enqueue, whose context travels in the attempt's headers.
    - ``process`` is a span around a handler, linked to that of the enqueue, whichever process that was in.
    - ``receive`` (a claim that took something) and ``settle`` (a completion or a failure, linked as well) are made by
      being told of them; so is ``migrate``.

    Metrics are how long statements took (``db.client.operation.duration``), how many attempts were claimed
    (``messaging.client.consumed.messages``), how many ended in which way, leases lost, sweeps and outages
    (``runtime_repo.*``), how long handlers took (``messaging.process.duration``) and, where the application calls
    ``measure``, how deep queues are.

    Args:
        tracer_provider: Another than the global one.
        meter_provider: Another than the global one.
    """

    def __init__(
        self,
        *,
        tracer_provider: trace.TracerProvider | None = None,
        meter_provider: metrics.MeterProvider | None = None,
    ) -> None:
        self._providers = tracer_provider, meter_provider
        self._ask_at = 0.0
        self._is_on = False
        self._tracer = trace.get_tracer("runtime_repo", tracer_provider=tracer_provider)
        meter = metrics.get_meter("runtime_repo", meter_provider=meter_provider)
        self._statements = meter.create_histogram("db.client.operation.duration", "s", "how long statements took")
        self._handlers = meter.create_histogram("messaging.process.duration", "s", "how long handlers took")
        self._claimed = meter.create_counter("messaging.client.consumed.messages", "{message}", "attempts claimed")
        self._ended = meter.create_counter("runtime_repo.tries.ended", "{try}", "tries that ended, by outcome")
        self._lost = meter.create_counter("runtime_repo.leases.lost", "{lease}", "writes refused for a lost lease")
        self._swept = meter.create_counter("runtime_repo.leases.swept", "{lease}", "leases that had run out")
        self._outages = meter.create_counter("runtime_repo.outages", "{outage}", "outages that workers went through")
        self._depth = meter.create_gauge("runtime_repo.queue.depth", "{attempt}", "what could be claimed now")
        self._tell: Mapping[type[Any], Callable[[Any], None]] = {
            Statement: self._statement,
            Claimed: self._receive,
            Completed: self._complete,
            Failed: self._fail,
            LeaseLost: lambda _: self._lost.add(1, _SYSTEM),
            Swept: lambda event: self._swept.add(len(event.attempt_ids), _SYSTEM),
            OutageBegan: lambda _: self._outages.add(1, _SYSTEM),
            Migrated: self._migrate,
        }

    def __call__(self, event: Event) -> None:
        """Record an event."""
        if (record := self._tell.get(type(event))) is not None:
            record(event)

    def is_active(self) -> bool:
        """Whether there is anybody to record it: what the API has by itself records nothing."""
        if (now := time.monotonic()) >= self._ask_at:
            self._ask_at = now + _ASKED_EVERY
            tracers, meters = self._providers
            providers = tracers or trace.get_tracer_provider(), meters or metrics.get_meter_provider()
            own = ("opentelemetry.trace", "opentelemetry.metrics")
            self._is_on = not all(type(provider).__module__.startswith(own) for provider in providers)
        return self._is_on

    @contextmanager
    def send(
        self, queue: str = DEFAULT_QUEUE, *, headers: Mapping[str, Any] | None = None, count: int = 1
    ) -> Iterator[dict[str, Any] | None]:
        """
        A span around an enqueue; pass what it yields as the attempt's *headers*, to which it adds its own.

        ``with telemetry.send("mail") as headers: await repo.attempts.enqueue("run", queue="mail", headers=headers)``

        Args:
            headers: What else is to travel.
            count: How many are enqueued, each with these headers.
        """
        carried = None if headers is None else dict(headers)
        if not self.is_active():
            yield carried
            return
        attributes = self._attributes("send", check_id("queue", queue))
        if count != 1:
            attributes["messaging.batch.message_count"] = count
        with self._tracer.start_as_current_span(f"send {queue}", kind=trace.SpanKind.PRODUCER, attributes=attributes):
            carried = carried or {}
            propagate.inject(carried)
            yield carried

    def process(self, handler: "Handler") -> "Handler":
        """
        *handler* within a span of its own, the first of its trace, which is linked to that of the enqueue.

        ``Worker(repo, telemetry.process(handler))``
        """

        @functools.wraps(handler)
        async def traced(lease: Lease) -> Any:
            if not self.is_active():
                return await handler(lease)
            attempt = lease.attempt
            attributes = self._attributes("process", attempt.queue, attempt.attempt_id)
            attributes |= {"messaging.client.id": lease.worker_id, "runtime_repo.attempt_no": attempt.attempt_no}
            began = time.perf_counter()
            failure: dict[str, str] = {}
            try:
                with self._tracer.start_as_current_span(
                    f"process {attempt.queue}",
                    context=Context(),
                    kind=trace.SpanKind.CONSUMER,
                    links=_links(attempt.headers),
                    attributes=attributes,
                ):
                    return await handler(lease)
            except BaseException as error:
                failure = {"error.type": type(error).__qualname__}
                raise
            finally:
                taken = _SYSTEM | {_QUEUE: attempt.queue} | failure
                self._handlers.record(time.perf_counter() - began, taken)

        return traced

    async def measure(self, repo: "RuntimeRepository", queues: str | Sequence[str] = DEFAULT_QUEUE) -> None:
        """Record how deep *queues* are: one bounded read each. Call it as often as the metric is wanted."""
        for queue in queue_names(queues):
            self._depth.set(await repo.attempts.depth(queue), _SYSTEM | {_QUEUE: queue})

    def _statement(self, event: Statement) -> None:
        name, _, _ = event.name.partition(" ")
        attributes = {"db.operation.name": name}
        if event.error is not None:
            attributes["error.type"] = type(event.error).__qualname__
        self._statements.record(event.seconds, attributes)

    def _receive(self, event: Claimed) -> None:
        # Of several queues nobody says how many were of which.
        queue = event.queues[0] if len(event.queues) == 1 else None
        self._claimed.add(len(event.attempt_ids), _SYSTEM if queue is None else _SYSTEM | {_QUEUE: queue})
        attributes = self._attributes("receive", queue)
        attributes["messaging.batch.message_count"] = len(event.attempt_ids)
        attributes["messaging.client.id"] = event.worker_id
        self._past("receive", queue, event.seconds, attributes)

    def _complete(self, event: Completed) -> None:
        self._settle(event, "completed")

    def _fail(self, event: Failed) -> None:
        self._settle(event, "failed" if event.is_final else "to be retried", event.error)

    def _settle(self, event: Completed | Failed, outcome: str, words: str | None = None) -> None:
        attributes = self._attributes("settle", event.queue, event.attempt_id)
        attributes["runtime_repo.outcome"] = outcome
        if words is not None:
            attributes["runtime_repo.error"] = words[:1000]
        self._past("settle", event.queue, event.seconds, attributes, event.headers)
        ended = _SYSTEM | {"runtime_repo.outcome": outcome}
        self._ended.add(1, ended if event.queue is None else ended | {_QUEUE: event.queue})

    def _migrate(self, event: Migrated) -> None:
        attributes = {"runtime_repo.migration.version": event.version, "runtime_repo.migration.name": event.name}
        self._past("migrate", None, event.seconds, attributes)

    def _past(
        self, operation: str, queue: str | None, seconds: float, attributes: dict[str, Any], headers: Any = None
    ) -> None:
        """A span of what has just ended."""
        now = time.time_ns()
        self._tracer.start_span(
            operation if queue is None else f"{operation} {queue}",
            kind=trace.SpanKind.INTERNAL if operation == "migrate" else trace.SpanKind.CLIENT,
            attributes=attributes,
            links=_links(headers),
            start_time=now - int(seconds * 1e9),
        ).end(now)

    @staticmethod
    def _attributes(operation: str, queue: str | None, attempt_id: str | None = None) -> dict[str, Any]:
        attributes: dict[str, Any] = _SYSTEM | {
            "messaging.operation.name": operation,
            "messaging.operation.type": operation,
        }
        if queue is not None:
            attributes[_QUEUE] = queue
        if attempt_id is not None:
            attributes["messaging.message.id"] = attempt_id
        return attributes


def _links(headers: Any) -> Sequence[trace.Link]:
    """The span that an attempt's headers tell of, if they do."""
    if not isinstance(headers, dict):
        return ()
    carrier = {name: value for name, value in headers.items() if isinstance(value, str)}
    context = trace.get_current_span(propagate.extract(carrier, Context())).get_span_context()
    return (trace.Link(context),) if context.is_valid else ()
