"""From what SQLite says about itself to a catalog: pure functions over rows. ``catalog`` compares."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from runtime_repo.catalog import Catalog, Ledger, LedgerRow, Table
from runtime_repo.database import Row

__all__ = ["catalog_from_rows", "fingerprint", "ledger_from_rows"]

_TOKEN = re.compile(
    r"""--[^\n]*|/\*.*?\*/|\s+                                # what means nothing
      |(?P<string>'(?:[^']|'')*')
      |(?P<quoted>"(?:[^"]|"")*"|`(?:[^`]|``)*`|\[[^\]]*\])
      |(?P<word>[\w$]+)
      |(?P<sign>\|\||<<|>>|<=|>=|<>|!=|==|.)""",
    re.VERBOSE | re.DOTALL,
)


def ledger_from_rows(rows: Iterable[Row]) -> Ledger | None:
    """The ledger's rows; None when one of them is not a ledger's."""
    found = [(row["version"], row["name"], row["applied_at_ms"]) for row in rows]
    if not all(isinstance(version, int) and isinstance(name, str) for version, name, _ in found):
        return None
    return tuple(LedgerRow(*row) for row in found)


def fingerprint(rows: Sequence[Row]) -> str | None:
    """Identify the text that SQLite keeps of our tables and indexes; None for an empty ledger, which has none."""
    return hashlib.sha256(rows[0]["text"].encode("utf-8", "surrogatepass")).hexdigest() if rows else None


def catalog_from_rows(
    columns: Iterable[Row], indexes: Iterable[Row], shipped: Catalog, triggers: Iterable[Row] = ()
) -> Catalog:
    """The live catalog; names are SQLite's, which compares them without regard to case."""
    spelling = {name.lower(): name for name in shipped.tables}

    def spelt(name: str) -> str:
        return spelling.get(name.lower(), name.lower())

    lines: dict[str, dict[str, str]] = defaultdict(dict)
    keys: dict[str, list[tuple[int, str]]] = defaultdict(list)
    kinds: dict[str, str] = {}
    texts: dict[str, _Text] = {}
    for row in columns:
        table = spelt(row["table"])
        if table not in kinds:
            words = _tokens(row["sql"] or "")
            texts[table] = _Text(words)
            kinds[table] = "virtual table" if words[1:2] == ["virtual"] else row["kind"]
        if row["name"] is not None:
            lines[table][row["name"].lower()] = _column(row, texts[table])
            if row["pk"]:
                keys[table].append((row["pk"], row["name"].lower()))
    parts: dict[tuple[str, str], list[Row]] = defaultdict(list)
    collated: dict[tuple[str, str], str] = {}
    for row in indexes:
        table = spelt(row["table"])
        if row["origin"] != "pk":
            parts[table, row["name"]].append(row)
        elif row["coll"].lower() != texts[table].collations.get(row["column"].lower(), "binary"):
            collated[table, row["column"].lower()] = f" collate {row['coll'].lower()}"
    definitions: dict[str, dict[str, str]] = defaultdict(dict)
    for (table, index), key in parts.items():
        definitions[table][index] = _index(key)
    attached = {table: dict(text.attached) for table, text in texts.items() if kinds[table] == "table"}
    for table, hanging in attached.items():
        if "rowid" in lines[table]:
            hanging["column instead of the rowid"] = f"rowid {lines[table]['rowid']}"
    for row in triggers:
        attached.get(spelt(row["table"]), {})[f"trigger {row['name']}"] = " ".join(row["sql"].split())
    return Catalog(
        {
            table: Table(
                lines[table],
                tuple(name + collated.get((table, name), "") for _, name in sorted(keys[table])),
                definitions[table],
                kind,
                attached.get(table, {}),
            )
            for table, kind in kinds.items()
        }
    )


class _Text:
    """What is only to be read in a table's text: the columns' collations, and what hangs on the table."""

    def __init__(self, words: Sequence[str]) -> None:
        self.collations: dict[str, str] = {}
        self.attached: dict[str, str] = {}
        self.is_automatic = "autoincrement" in words
        definitions, options = _definitions(words)
        for number, definition in enumerate(definitions, 1):
            self._read(definition, number)
        if "strict" in options:
            self.attached["strict types"] = "a value of another type is refused"
        if "rowid" in options:
            self.attached["storage without rowid"] = "the primary key is the table"

    def _read(self, definition: Sequence[str], number: int) -> None:
        is_constraint = definition[0] in ("constraint", "primary", "unique", "check", "foreign")
        owner = f"of {definition[0]}"
        if is_constraint:
            owner = definition[1] if definition[0] == "constraint" else f"in definition {number}"
        depth = 0
        for position, word in enumerate(definition):
            depth += (word == "(") - (word == ")")
            rest = definition[position + 1 :]
            if depth or not rest:
                continue
            if word == "collate" and rest[0] != "binary" and not is_constraint:
                self.collations[definition[0]] = rest[0]
            elif word == "check":
                self.attached[f"check constraint {owner}"] = _expression(rest[: _closes(rest) + 1])
            elif word == "references":
                self.attached[f"foreign key {owner}"] = _expression(definition[position:])
            elif word == "conflict" and rest[0] != "abort":
                self.attached[f"conflict clause {owner}"] = f"on conflict {rest[0]}"


def _definitions(words: Sequence[str]) -> tuple[list[Sequence[str]], Sequence[str]]:
    """The columns and constraints of a table's text, and the words after them."""
    if "(" not in words:
        return [], []
    words = words[words.index("(") :]
    end = min(_closes(words), len(words) - 1)
    definitions, start, depth = [], 1, 0
    for position, word in enumerate(words[: end + 1]):
        depth += (word == "(") - (word == ")")
        if (position == end or (word == "," and depth == 1)) and start < position:
            definitions.append(words[start:position])
            start = position + 1
    return definitions, words[end + 1 :]


def _column(row: Row, table: _Text) -> str:
    """One line for a column. A primary key counts as NOT NULL, although SQLite accepts a NULL in one of text."""
    line = _affinity(row["type"])
    if collation := table.collations.get(row["name"].lower()):
        line += f" collate {collation}"
    if row["notnull"] or row["pk"]:
        line += " not null"
    if row["dflt_value"] is not None:
        line += f" default {_expression(_tokens(row['dflt_value']))}"
    if row["pk"] and table.is_automatic:
        line += " auto"
    return line + (" generated" if row["hidden"] in (2, 3) else "")


def _affinity(declared: str) -> str:
    """SQLite's own rules, in their order (https://sqlite.org/datatype3.html, 3.1)."""
    name = declared.upper()
    if "INT" in name:
        return "integer"
    if any(word in name for word in ("CHAR", "CLOB", "TEXT")):
        return "text"
    if "BLOB" in name or not name:
        return "blob"
    if any(word in name for word in ("REAL", "FLOA", "DOUB")):
        return "real"
    return "numeric"


def _index(key: Sequence[Row]) -> str:
    """One line for an index."""
    words = _tokens(key[0]["sql"] or "")
    unique = "unique " if key[0]["unique"] else ""
    if any(part["column"] is None for part in key):
        start = words.index("(")
        return unique + _expression(words[start:], strip=False)
    columns = []
    for part in key:
        collation = "" if part["coll"] == "BINARY" else f" collate {part['coll'].lower()}"
        columns.append(part["column"].lower() + collation + (" desc" if part["desc"] else ""))
    line = f"{unique}({', '.join(columns)})"
    if not key[0]["partial"]:
        return line
    # The key's own parentheses come first; a partial index ends with its predicate.
    depth = 0
    for position, word in enumerate(words):
        depth += (word == "(") - (word == ")")
        if word == "where" and depth == 0:
            return f"{line} where {_expression(words[position + 1 :])}"
    return line


def _tokens(sql: str) -> list[str]:
    """The words of a piece of SQL, in lower case and unquoted where that changes nothing; literals as they are."""
    words = []
    for match in _TOKEN.finditer(sql):
        if match["quoted"]:
            name = match["quoted"][1:-1]
            words.append(name.lower() if re.fullmatch(r"\w+", name) else match["quoted"])
        elif match["word"]:
            words.append(match["word"].lower())
        elif match["string"] or match["sign"]:
            words.append(match["string"] or match["sign"])
    return words


def _expression(words: Sequence[str], *, strip: bool = True) -> str:
    """One spelling of an expression, without the parentheses around it."""
    while strip and len(words) > 1 and words[0] == "(" and _closes(words) == len(words) - 1:
        words = words[1:-1]
    text = ""
    for before, word in zip(("(", *words), words, strict=False):
        text += word if before == "(" or word in (")", ",") else " " + word
    return text


def _closes(words: Sequence[str]) -> int:
    """Where the parenthesis that opens *words* closes."""
    depth = 0
    for position, word in enumerate(words):
        depth += (word == "(") - (word == ")")
        if depth == 0:
            return position
    return len(words)
