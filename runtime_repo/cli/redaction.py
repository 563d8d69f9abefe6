"""What must not be shown: passwords, and what a terminal would take for an order."""

import re
from collections.abc import Iterable
from urllib.parse import unquote_plus

__all__ = ["Redaction", "printable"]

_HIDDEN = "***"


class Redaction:
    """
    The passwords in *texts*, such as this process's arguments, and what to show instead.

    The library shows none. This is for what others repeat of an argument: a parser, or an error that nobody foresaw.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        found = {secret for text in texts for secret in _secrets(text)}
        # The longest first, of which another may be a part.
        self._secrets = sorted(found, key=len, reverse=True)

    def of(self, text: str) -> str:
        """*text*, without them."""
        for secret in self._secrets:
            text = text.replace(secret, _HIDDEN)
        return text


def _secrets(text: str) -> set[str]:
    """The passwords of an address: between its first colon and its last @, and in its query, in either spelling."""
    _, scheme, rest = text.partition("://")
    found = set(re.findall(r"password=([^&\s'\"]+)", text)) if scheme or "password=" in text else set()
    _, colon, password = rest.rpartition("@")[0].partition(":")
    if colon:
        found.add(password)
    return {spelling for secret in found if secret for spelling in (secret, unquote_plus(secret), repr(secret)[1:-1])}


def printable(text: str) -> str:
    """*text* in one line, with whatever is no character to read written out: others may have stored it."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
