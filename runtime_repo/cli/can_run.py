"""``runtime-repo can-run``: whether this release can run on a database as it is."""

from runtime_repo.cli.shared import NO, YES, Call, on_database
from runtime_repo.cli.text import said

__all__ = ["command"]


@on_database(
    "can-run", "runtime-repo can-run runtime.db", "runtime-repo can-run postgresql://app@db.example/app --json"
)
async def command(call: Call) -> int:
    """
    Tell, before it is deployed, whether this release can run on the database as it is now, and which workers of older
    releases go on beside it.

    Exit codes: 0 it can, a boot of it serves; 1 it cannot; 2 it could not be told.
    """
    repository = call.place.repository()
    try:
        found = await repository.can_run()
    finally:
        await repository.close()
    words = f"{'Yes' if found.answer else 'No'}: {found.why}."
    call.answer(found.as_dict(), lambda console: console.print(said(words, style="green" if found.answer else "red")))
    return YES if found.answer else NO
