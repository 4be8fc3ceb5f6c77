"""The columns that rows of JSON have in common, and the rows that do not fit among them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

_KINDS = {bool: "a boolean", int: "a number", float: "a number", str: "a text", list: "a list"}


EXACT = 2**53
"""The integers that a table's fractions hold exactly end here."""

SHOWN_KEYS = 5


class JsonSchema:
    """Grows with the rows. A column may be missing or null; its kind stays what most of the first
    rows say."""

    def __init__(self) -> None:
        import pyarrow as pa

        self.schema: pa.Schema = pa.schema([])
        self._kinds: dict[str, str] = {}

    def admit(self, records: Sequence[Mapping[str, Any]]) -> list[str | None]:
        """For each row, why it does not fit into one table with the others, or None. Columns and
        fields of rows that fit are taken over."""
        self._note_kinds(records)
        problems = [self._odd_column(record) for record in records]
        fitting = [i for i, problem in enumerate(problems) if problem is None]
        if self._extend([records[i] for i in fitting]) is not None:  # somewhere among them
            for i in fitting:
                problems[i] = self._extend([records[i]])
        return problems

    def table(self, records: Sequence[Mapping[str, Any]]) -> pa.Table:
        """Admitted rows; a column that a row lacks is null there."""
        import pyarrow as pa

        return pa.table(
            [pa.array([r.get(f.name) for r in records], f.type) for f in self.schema],
            schema=self.schema,
        )

    def _note_kinds(self, records: Sequence[Mapping[str, Any]]) -> None:
        names = {name for record in records for name in record} - set(self._kinds)
        for name in sorted(names):
            kinds = Counter(k for r in records if (k := _kind(r.get(name))) is not None)
            if kinds:
                self._kinds[name] = kinds.most_common(1)[0][0]

    def _odd_column(self, record: Mapping[str, Any]) -> str | None:
        for name, value in record.items():
            kind = _kind(value)
            if kind is not None and kind != self._kinds[name]:
                usual = self._kinds[name]
                return (
                    f"column {name!r} is {kind}, in most rows {usual} (--format jsonl takes both)"
                )
        return None

    def _extend(self, records: Sequence[Mapping[str, Any]]) -> str | None:
        """Takes over the rows' columns; says why it cannot, and then changes nothing."""
        import pyarrow as pa

        names = list(dict.fromkeys(name for record in records for name in record))
        column = ""
        fields = []
        try:
            for column in names:
                values = pa.array([record.get(column) for record in records])
                fields.append(pa.field(column, values.type))
            column = ""
            self.schema = pa.unify_schemas(
                [self.schema, pa.schema(fields)], promote_options="permissive"
            )
        except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
            where = f"column {column!r} " if column else ""
            return f"{where}does not fit into one table with the rows before it: {error}"
        return None


class Places:
    """What was found at each place in rows of JSON, a key of an object or the entries of a list,
    as far as one table could not hold it unchanged."""

    def __init__(self) -> None:
        self._keys: dict[str, frozenset[str]] = {}
        self._fractions: set[str] = set()
        self._large: set[str] = set()

    def changed(self, record: Mapping[str, Any]) -> str | None:
        """What a table of this row and those before would change, or None."""
        left = list(record.items())
        while left:  # no recursion: rows may be nested as deep as JSON can be read
            place, value = left.pop()
            if isinstance(value, dict):
                known = self._keys.setdefault(place, frozenset(value))
                if other := known ^ value.keys():
                    return (
                        f"objects in {place!r} have other keys than before ({_some(other)}),"
                        " which one table would add as null where they are missing"
                    )
                left += [(f"{place}.{k}", v) for k, v in value.items() if not isinstance(v, str)]
            elif isinstance(value, list):
                inside = f"{place}[]"
                left += [(inside, inner) for inner in value]
            elif self._would_round(place, value):
                return (
                    f"numbers in {place!r} are both fractions and integers beyond 2**53, which one"
                    " table would round"
                )
        return None

    def _would_round(self, place: str, value: object) -> bool:
        if isinstance(value, float):
            self._fractions.add(place)
        elif isinstance(value, int) and abs(value) > EXACT:
            self._large.add(place)
        return place in self._fractions and place in self._large


def _some(keys: Set[str]) -> str:
    shown = ", ".join(map(repr, sorted(keys)[:SHOWN_KEYS]))
    return shown if len(keys) <= SHOWN_KEYS else f"{shown}, …"


def _kind(value: object) -> str | None:
    return None if value is None else _KINDS.get(type(value), "an object")
