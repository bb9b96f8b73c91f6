"""Reads a parquet, CSV, JSON or CoNLL file as a dataset. A damaged file causes a one-line error."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet

from kd.common.data.conll import parse_conll
from kd.common.data.csv_files import check_unique, decode, read_csv
from kd.common.utils.errors import UserError, reason_of

VALUES = "use as many values in each row as column names, and quote texts that contain the delimiter"
TXT = ".txt"  # of CoNLL-2003; any other text file next to files of data is not read
SCALARS = str | int | float | bool | None


def read_rows(path: Path, notes: list[str] | None = None) -> datasets.Dataset:
    """Reads a file whose suffix is in READERS, and notes what was inferred. Raises UserError if it cannot be read."""
    try:
        table = READERS[path.suffix.lower()](path, [] if notes is None else notes)
        table.validate(full=True)  # strings of a damaged parquet file may not be UTF-8
        return datasets.Dataset(_decode_dictionaries(table))
    except UserError:
        raise
    except Exception as error:  # a damaged file: OSError, ArrowException, KeyError, depending on the parser
        advice = "" if getattr(error, "errno", None) else f": {_advice(path)}"  # errno: an error of the system
        raise UserError(f"cannot read {path} ({reason_of(error)}){advice}") from None


def read_text(path: Path) -> str:
    """Reads a UTF-8 text file, with or without a byte order mark. Raises UserError if it cannot be read."""
    try:
        return decode(path)
    except OSError as error:
        raise UserError(f"cannot read {path} ({reason_of(error)})") from None


def _read_parquet(path: Path, notes: list[str]) -> pa.Table:
    with pyarrow.parquet.ParquetFile(path) as file:
        check_unique(path, file.schema_arrow.names)
        return file.read()


def _read_conll(path: Path, notes: list[str]) -> pa.Table:
    return parse_conll(path, decode(path, notes), notes)


def _read_json(path: Path, notes: list[str]) -> pa.Table:
    """Reads one list of objects, or one object per line."""
    text = decode(path, notes)
    listed = text.lstrip().startswith("[")
    try:
        rows = json.loads(text, object_pairs_hook=_object) if listed else _json_lines(text)
    except json.JSONDecodeError:
        if not listed and _is_one_value(text):
            raise UserError(f"{path} is one JSON object: {_advice(path)}") from None
        raise
    if not rows:
        raise UserError(f"{path} is empty: {_advice(path)}")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"row {number} of {path} is not a JSON object but a {type(row).__name__}: {_advice(path)}")
    if len(rows) == 1 and any(_holds_rows(value) for value in rows[0].values()):
        raise UserError(f"{path} is one JSON object of {', '.join(rows[0])}: {_advice(path)}")
    names = dict.fromkeys(name for row in rows for name in row)  # the first row may lack columns
    return pa.table({name: _array([row.get(name) for row in rows]) for name in names})


def _json_lines(text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line, object_pairs_hook=_object))
            except json.JSONDecodeError as error:
                raise json.JSONDecodeError(f"line {number}: {error.msg}", line, error.pos) from None
    return rows


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"an object has two values of the same name; its names are {', '.join(n for n, _ in pairs)}")
    return found


def _is_one_value(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _holds_rows(value: Any) -> bool:
    """Whether a value is a nested table, as in {"data": [{...}]}, or a column of pandas, {"0": ..., "1": ...}."""
    if isinstance(value, list):
        return bool(value) and isinstance(value[0], dict)
    return isinstance(value, dict) and bool(value) and all(key.isdecimal() for key in value)


def _array(values: list[Any]) -> pa.Array:
    """An Arrow array. Mixed types, such as 1 and "1", become strings."""
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):
        if not all(isinstance(value, SCALARS) for value in values):
            raise
        return pa.array([None if value is None else str(value) for value in values], pa.string())


def _decode_dictionaries(table: pa.Table) -> pa.Table:
    """Decodes pandas' categories, which datasets does not read."""
    for place, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(place, field.name, table.column(place).cast(field.type.value_type))
    return table


def _advice(path: Path) -> str:
    return {
        ".parquet": "write it again",
        ".csv": VALUES,
        ".tsv": VALUES,
    }.get(path.suffix.lower(), "use one list of objects, or one object per line")


# These do not use the cache of datasets, which would copy each file to disk.
READERS: dict[str, Callable[[Path, list[str]], pa.Table]] = {
    ".parquet": _read_parquet,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".json": _read_json,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    **dict.fromkeys((".conll", ".bio", ".iob", ".iob2", TXT), _read_conll),
}
