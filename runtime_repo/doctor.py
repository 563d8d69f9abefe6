"""
What is wrong with a store, and what mends it: drift with its SQL, and what around the tables makes them slow or unsafe.

It reads and writes nothing. What both databases find out is told here; what each asks for is in its own folder.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from runtime_repo.catalog import Catalog
from runtime_repo.database import Database
from runtime_repo.errors import Difference, RuntimeRepoError
from runtime_repo.repairs import Repair
from runtime_repo.schema import Migration, Policy, inspected, status_of

__all__ = ["Diagnosis", "Examined", "Finding", "State", "clock", "could_not_tell", "diagnose"]

State = Literal["well", "note", "ill", "unknown"]
"""*note* is what may be meant; *ill* is what loses work, or will."""

_SKEW = 2.0
"""Seconds by which two clocks differ that are kept in time by nobody."""


@dataclass(frozen=True, slots=True)
class Finding:
    """
    The answer to one question.

    Attributes:
        check: What was asked, such as ``long transactions``.
        state: Whether all is well.
        told: What was found, in a sentence.
        advice: What to do about it; None where there is nothing to do.
    """

    check: str
    state: State
    told: str
    advice: str | None = None


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """
    What was found.

    Attributes:
        found: The schema's version; 0 is none.
        refusal: Why a verify-only boot would be refused; None where it would serve.
        findings: The answers, in the order asked.
        repairs: What mends the drift, table by table; run it in one transaction, as ``script`` has it.
        script: All of it as one script; on SQLite for a shell that stops at the first error (``sqlite3 -bail``).
    """

    found: int
    refusal: str | None
    findings: tuple[Finding, ...]
    repairs: tuple[Repair, ...]
    script: str

    @property
    def is_well(self) -> bool:
        """Whether a verify-only boot would serve and nothing is ill; what could not be told does not count."""
        return self.refusal is None and not any(finding.state == "ill" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return {"is_well": self.is_well} | asdict(self)


@dataclass(frozen=True, slots=True)
class Examined:
    """What a database is asked to say more about: how it is, and how it should be."""

    migrations: Sequence[Migration]
    expected: Catalog
    live: Catalog
    drift: Sequence[Difference]

    @property
    def tables(self) -> list[str]:
        """Those of ours that are there."""
        return sorted(name for name, table in self.live.tables.items() if table.kind == "table")


async def diagnose(database: Database, migrations: Sequence[Migration], policy: Policy) -> Diagnosis:
    """
    Find out what is wrong with the store in *database*.

    Raises:
        DatabaseUnavailableError: The database cannot be read.
        SchemaLockTimeoutError: It was locked for longer than ``lock_timeout``.
    """
    verify = Policy(migrate=False, lock_timeout=policy.lock_timeout)
    look = await inspected(database, migrations, verify)
    status = status_of(look, migrations, verify)
    known = [migration for migration in migrations if migration.version <= status.found]
    drift: Sequence[Difference] = ()
    if known and known[-1].version == status.found:
        drift = [difference for difference in status.differences if difference.expected is not None]
        ours = known[-1].catalog.tables
        # Who owns what is no drift, and no statement of ours.
        drift = [difference for difference in drift if not difference.object.startswith("schema ")]
        drift = [each for each in drift if not (each.object.startswith("table ") and each.found is not None)]
    else:
        ours = {}
    expected = Catalog(ours)
    findings = [_schema(status.found, status.refusal, drift)]
    if look.ledger is None and not look.catalog.tables:
        return Diagnosis(status.found, status.refusal, tuple(findings), (), "")
    more, repairs = await database.examine(Examined(known, expected, look.catalog, drift))
    script = database.script([statement for repair in repairs for statement in repair.statements])
    return Diagnosis(status.found, status.refusal, (*findings, *more), tuple(repairs), script if repairs else "")


def _schema(found: int, refusal: str | None, drift: Sequence[Difference]) -> Finding:
    if refusal is None:
        return Finding("schema", "well", f"version {found} is as this release knows it")
    return Finding("schema", "ill", refusal, "run the SQL below, then verify" if drift else None)


def clock(ours_before_ms: float, theirs_ms: int, ours_after_ms: float) -> Finding:
    """How far the database's clock is from this machine's, which was read before and after."""
    doubt = (ours_after_ms - ours_before_ms) / 2000
    differs = (theirs_ms - (ours_before_ms + ours_after_ms) / 2) / 1000
    told = f"the database's clock is {abs(differs):.3f} s {'ahead of' if differs > 0 else 'behind'} this machine's"
    if abs(differs) - doubt < _SKEW:
        return Finding("clock", "well", told)
    return Finding(
        "clock",
        "note",
        told,
        "leases are judged by the database's clock alone; what is compared with this machine's, such as a log or "
        "not_before, is off by as much: let both be kept in time by NTP",
    )


def could_not_tell(check: str, error: RuntimeRepoError) -> Finding:
    """A question without an answer."""
    return Finding(check, "unknown", f"it could not be told: {error}")
