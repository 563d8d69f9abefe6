"""
The versions that the library ships, for tests that must go on when there is one more.

Only tests of a version's own history name its number.
"""

from runtime_repo.schema import load_migrations

HISTORY = [(migration.version, migration.name) for migration in load_migrations("sqlite")]
"""What the ledger of a current database records; the same on both databases, as a test proves."""

NEWEST = HISTORY[-1][0]
"""The supported version."""

RECORDED = [version for version, _ in HISTORY]
"""Every version that a database can be at, unless it is fresh."""

NEXT = (NEWEST + 1, "names")
"""What a later release might ship."""
