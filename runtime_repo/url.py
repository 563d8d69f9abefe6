"""One address for either database, as services keep it in their environment."""

from typing import Any

from runtime_repo.errors import ConfigurationError
from runtime_repo.postgres import PostgresRuntimeRepository
from runtime_repo.repository import RuntimeRepository
from runtime_repo.sqlite import SqliteRuntimeRepository

__all__ = ["repository_from_url"]


def repository_from_url(url: str, **options: Any) -> RuntimeRepository:
    """
    The repository that *url* names, to be awaited or entered like any other; *options* go to its class.

    ``sqlite:///runtime.db`` is relative to the working directory, ``sqlite:////var/lib/runtime.db`` is absolute (the
    convention of SQLAlchemy), and ``postgresql://…`` is a DSN as asyncpg reads it. A path is taken as it is, without
    percent-decoding, and has no options.

    Raises:
        ConfigurationError: The URL is neither.
    """
    problem = "neither sqlite:///PATH nor postgresql://USER@HOST/DATABASE"
    try:
        scheme, separator, rest = url.partition("://") if isinstance(url, str) else ("", "", "")
        if separator and scheme == "sqlite" and {"?", "#"} & set(rest):
            problem = (
                "a SQLite path with '?' or '#' in it, and a path has no options: give them as arguments, such as "
                "migrate=False; SqliteRuntimeRepository(path) opens a file that is really called so"
            )
        elif separator and scheme == "sqlite" and rest.startswith("/"):
            return SqliteRuntimeRepository(rest[1:], **options)
        if separator and scheme in ("postgresql", "postgres"):
            return PostgresRuntimeRepository(url, **options)
    finally:
        # No frame of ours holds a password that a traceback with locals could show.
        url, rest, options = "", "", {}
    # The URL may hold a password, so it is not shown.
    scheme = ""
    raise ConfigurationError(f"the database URL is {problem}")
