"""What a runtime schema and a role may be called."""

from runtime_repo.errors import ConfigurationError, shown

__all__ = ["check_role", "check_schema"]


def check_schema(schema: str) -> None:
    try:
        size = len(schema.encode())
    except (AttributeError, UnicodeEncodeError):
        size = 0
    if not 0 < size <= 63 or "\0" in schema or schema.startswith("pg_"):
        raise ConfigurationError(
            f"the runtime schema's name is {shown(schema)}, {size} bytes: expected 1 to 63 bytes of UTF-8 "
            "(PostgreSQL would cut a longer one silently, and two names would share a schema), without NUL, "
            "not beginning with 'pg_'"
        )


def check_role(role: str) -> None:
    """Refuse what cannot be a role's name; two words PostgreSQL reads as no role's, quoted or not."""
    is_text = isinstance(role, str) and role.isprintable()
    if not is_text or not 0 < len(role.encode()) <= 63 or role in ("public", "none") or role.startswith("pg_"):
        raise ConfigurationError(f"a role is {shown(role)}: expected the name of one, of 1 to 63 bytes of UTF-8")
