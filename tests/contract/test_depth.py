"""How deep a queue is: what a metric shows and what workers are scaled by, in one bounded read."""

import re
from datetime import timedelta

import asyncpg

from runtime_repo import NewAttempt, PostgresRuntimeRepository, RuntimeRepository
from runtime_repo.queries import load_queries
from tests.contract.conftest import Clock

MINUTE = timedelta(minutes=1)

KEDA = """
select count(*)
  from (select 1
          from {schema}.runtime_queue
         where queue = 'mail'
           and retry_at_ms is null
         order by priority desc, enqueued_at_ms, attempt_id
         limit 1000) as ready
"""
"""What an autoscaler such as KEDA asks a database by itself."""


async def test_what_could_be_claimed_now_is_counted(repo: RuntimeRepository, clock: Clock) -> None:
    """What is ready and what is due, of one queue; no further than is asked for."""
    assert await repo.attempts.depth("mail") == 0
    later = NewAttempt("run", queue="mail", not_before=clock.now + MINUTE)
    await repo.attempts.enqueue_many([NewAttempt("run", queue="mail") for _ in range(5)], now=clock.now)
    await repo.attempts.enqueue_many([later, later, NewAttempt("run", queue="other")], now=clock.now)
    assert await repo.attempts.depth("mail", now=clock.now) == 5
    assert await repo.attempts.depth("mail", now=clock.now + MINUTE) == 7
    assert await repo.attempts.depth("mail", most=6, now=clock.now + MINUTE) == 6
    assert await repo.attempts.depth("mail", most=3, now=clock.now) == 3
    await repo.leases.claim("worker", queues="mail", limit=4, now=clock.now)
    assert await repo.attempts.depth("mail", now=clock.now) == 1


async def test_an_autoscaler_reads_no_more_than_it_counts(
    postgres_url: str, postgres_schema: str, postgres: asyncpg.Connection
) -> None:
    """Neither by the verb nor by its own query, in whichever way it was planned, however much there is besides."""
    async with PostgresRuntimeRepository(postgres_url, schema=postgres_schema) as repo:
        verb = load_queries("postgres", schema=postgres_schema, now_ms="0::bigint")["attempts.depth"]
        await postgres.execute(f"prepare depth (text, bigint, bigint) as {verb.rstrip().removesuffix(';')}")
        for queue, count in (("other", 10_000), ("mail", 3000), ("other", 10_000)):
            await repo.attempts.enqueue_many([NewAttempt("run", queue=queue)] * count)
        keda = KEDA.format(schema=postgres_schema)
        assert await postgres.fetchval(keda) == 1000
        assert await repo.attempts.depth("mail", most=1000) == 1000
        for analyzed in ("select 1", f"vacuum analyze {postgres_schema}.runtime_queue"):
            await postgres.execute(analyzed)
            for mode in ("force_custom_plan", "force_generic_plan"):
                await postgres.execute(f"set plan_cache_mode = {mode}")
                for statement in (keda, "execute depth ('mail', 1000, 0)"):
                    rows = await postgres.fetch(f"explain (analyze, buffers, timing off) {statement}")
                    plan = "\n".join(row[0] for row in rows)
                    assert "Seq Scan" not in plan, plan
                    assert "idx_runtime_queue_ready" in plan, plan
                    assert max(map(int, re.findall(r"rows=(\d+)(?:\.\d+)? loops", plan))) <= 1000, plan
