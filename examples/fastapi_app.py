"""
A web service with work in the background: it boots the repository before it serves, and reports the schema's state.

    pip install 'runtime-repo[examples]'
    python examples/fastapi_app.py --port 8000

    curl localhost:8000/reports -H 'Idempotency-Key: 1' -H 'Content-Type: application/json' -d '{"month": "2026-01"}'
    curl localhost:8000/reports/1
    curl -i localhost:8000/health

RUNTIME_REPO_URL names the database (sqlite:///reports.db if unset), RUNTIME_REPO_SCHEMA the runtime schema on
PostgreSQL. The same code serves with many processes: each has a worker, and they share what there is to do.
"""

import asyncio
import calendar
import os
from argparse import ArgumentParser
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Header, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from runtime_repo import (
    Attempt,
    ConfigurationError,
    ConflictError,
    DatabaseUnavailableError,
    Lease,
    NotFoundError,
    RuntimeRepoError,
    RuntimeRepository,
    Worker,
    repository_from_url,
)

QUEUE = "reports"


class Report(BaseModel):
    """What is asked for."""

    month: Annotated[str, Field(pattern=r"^\d{4}-(0[1-9]|1[0-2])$", examples=["2026-01"])]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Boot before the first request: a boot that is refused ends the process, and says why."""
    schema = os.environ.get("RUNTIME_REPO_SCHEMA")
    options = {"schema": schema} if schema else {}
    async with repository_from_url(os.environ.get("RUNTIME_REPO_URL", "sqlite:///reports.db"), **options) as repo:
        app.state.repo = repo
        worker = Worker(repo, write_report, queues=QUEUE, signals=())  # the server sees to signals
        working = asyncio.create_task(worker.run())
        try:
            yield
        finally:
            worker.stop()
            await working


async def write_report(lease: Lease) -> dict[str, Any]:
    """The work: how many days of each kind a month has."""
    year, month = map(int, lease.attempt.payload["month"].split("-"))
    days = [day for week in calendar.monthcalendar(year, month) for day in week[:5] if day]
    return {"month": lease.attempt.payload["month"], "working_days": len(days)}


app = FastAPI(lifespan=lifespan)


@app.post("/reports", status_code=202)
async def ask_for_report(report: Report, request: Request, idempotency_key: Annotated[str, Header()]) -> dict[str, Any]:
    """Enqueue, once for each key: a client that got no answer asks again with the same one."""
    repo: RuntimeRepository = request.app.state.repo
    attempt = await repo.attempts.enqueue(
        f"report-{report.month}", attempt_id=idempotency_key, queue=QUEUE, payload=report.model_dump()
    )
    return shown(attempt)


@app.get("/reports/{attempt_id}")
async def get_report(attempt_id: str, request: Request) -> dict[str, Any]:
    """How far it is."""
    repo: RuntimeRepository = request.app.state.repo
    return shown(await repo.attempts.get(attempt_id))


@app.get("/health")
async def health(request: Request) -> JSONResponse:
    """
    Look at the schema as it is now, without changing anything.

    A newer release that migrates under our feet, a table that is gone or a database that is away make it unhealthy.
    What is pending is not migrated here: to lay an empty store in the place of one that is lost would hide the loss.
    """
    repo: RuntimeRepository = request.app.state.repo
    try:
        # A probe does not wait for a table that somebody has locked.
        async with asyncio.timeout(5):
            status = await repo.inspect()
            stats = [] if status.refusal or status.pending else await repo.attempts.stats()
    except TimeoutError:
        return JSONResponse({"status": "unhealthy", "reason": "the database did not answer in time"}, status_code=503)
    except RuntimeRepoError as error:
        return JSONResponse({"status": "unhealthy", "reason": str(error)}, status_code=503)
    if status.refusal or status.pending:
        reason = status.refusal or f"the schema is at version {status.found}, not {status.supported}"
        return JSONResponse({"status": "unhealthy", "reason": reason}, status_code=503)
    queues = {queue.queue: {"ready": queue.ready, "leased": queue.leased} for queue in stats}
    return JSONResponse({"status": "healthy", "schema_version": status.found, "queues": queues})


@app.exception_handler(NotFoundError)
@app.exception_handler(ConflictError)
@app.exception_handler(ConfigurationError)
@app.exception_handler(DatabaseUnavailableError)
async def refuse(_request: Request, error: Exception) -> JSONResponse:
    """Each error of the store has its status; what cannot be meant, such as an empty key, is the client's."""
    codes = {NotFoundError: 404, ConflictError: 409, ConfigurationError: 422, DatabaseUnavailableError: 503}
    code = next(code for kind, code in codes.items() if isinstance(error, kind))
    return JSONResponse({"detail": str(error)}, status_code=code)


def shown(attempt: Attempt) -> dict[str, Any]:
    return {"id": attempt.attempt_id, "status": attempt.status, "result": attempt.result, "error": attempt.error}


if __name__ == "__main__":
    parser = ArgumentParser(description="Serve reports that are written in the background.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    uvicorn.run(app, host=args.host, port=args.port)
