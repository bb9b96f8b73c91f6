"""Reads CSV files as programs write them: four delimiters, quotes or none, decimal commas, encodings of Windows.

The columns stay strings, because types are inferred over all splits. Inferred from one file, `007` would become the
number 7, and `true` a boolean in one split and a string in another.
"""

import codecs
import csv
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from kd.common.utils.errors import UserError

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
NO_DELIMITER = "\x1f"  # of a file with one column
SAMPLED_ROWS = 50  # rows that a delimiter has to fit
WIDE = {  # UTF-32 first, because its mark in little-endian order starts with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
QUOTED = re.compile(r'"(?:[^"]|"")*"')  # a field in quotes
DECIMAL_COMMA = r"^\s*[+-]?\d+,\d+\s*$"
INTEGER = r"^\s*([+-]?\d+)?\s*$"


def decode(path: Path, notes: list[str] | None = None) -> str:
    """The text of a UTF-8 file, with or without a byte order mark. With `notes`, also of a UTF-16, UTF-32 or
    Windows-1252 file, which is then noted.

    Raises UserError for another encoding, and for a file of UTF-8 with single wrong bytes.
    """
    raw = path.read_bytes()
    encoding = next((name for mark, name in WIDE.items() if raw.startswith(mark)), None)
    if encoding and notes is None:
        raise UserError(f"{path} is UTF-16 or UTF-32, not UTF-8: convert it")
    try:
        if encoding and notes is not None:
            text = raw.decode(encoding)
            notes.append(f"{path.name} is read as {encoding.upper()}")
            return text
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged {str(encoding).upper()}: write it again, as UTF-8") from None
    raw = raw.removeprefix(codecs.BOM_UTF8)
    if (place := raw.find(b"\0")) >= 0:
        line = line_number(raw, place)
        raise UserError(f"{path} holds a NUL byte (line {line}): convert it from UTF-16, or remove the byte")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte 0x{raw[error.start]:02x} in line {line_number(raw, error.start)}"
    valid = raw.decode("utf-8", errors="ignore")
    if notes is None or not valid.isascii():  # other letters are UTF-8, so this byte is damage
        raise UserError(f"{path} is not UTF-8 ({where}): convert it, for example from Windows-1252") from None
    try:
        text = raw.decode("cp1252")
    except UnicodeDecodeError:
        raise UserError(f"{path} is neither UTF-8 nor Windows-1252 ({where}): convert it to UTF-8") from None
    notes.append(f"{path.name} is not UTF-8 ({where}): it is read as Windows-1252")
    return text


def line_number(raw: bytes, place: int) -> int:
    return raw.count(b"\n", 0, place) + 1


def read_csv(path: Path, notes: list[str]) -> pa.Table:
    """Reads a file with a line of column names. Notes report a delimiter other than a comma, fields whose quotes are
    part of the text, and decimal commas.
    """
    text = decode(path, notes)
    if not text.strip():
        raise UserError(f"{path} is empty: add a line of column names, and rows")
    delimiter = _delimiter(text)
    if delimiter not in (",", NO_DELIMITER):
        notes.append(f"{path.name}: the columns are separated by {DELIMITERS[delimiter]}")
    quotes = delimiter != "\t" or _is_quoted(text)
    if not quotes:
        notes.append(f"{path.name}: quotes are part of the texts")
    # One thread, so that a parsing error reports its row.
    read = pyarrow.csv.ReadOptions(use_threads=False)
    parse = pyarrow.csv.ParseOptions(
        delimiter=delimiter, quote_char='"' if quotes else False, newlines_in_values=quotes
    )
    content = pa.py_buffer(text.encode())
    names = pyarrow.csv.open_csv(content, read, parse).schema.names
    check_unique(path, [name.strip() for name in names])
    convert = pyarrow.csv.ConvertOptions(column_types={name: pa.string() for name in names})
    table = pyarrow.csv.read_csv(content, read, parse, convert)
    table = table.rename_columns([name.strip() for name in names])
    return table if delimiter == "," else _with_decimal_points(path, table, notes)


def check_unique(path: Path, names: list[str]) -> None:
    """Raises UserError if two columns have the same name."""
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"{path} has two columns {repeated[0]!r}: rename or remove one")


def _delimiter(text: str) -> str:
    """The delimiter of the column names that also splits the first rows into as many columns."""
    lines = [line for line in text.splitlines() if line.strip()][:SAMPLED_ROWS]
    fitting: dict[str, float] = {}
    for mark in (mark for mark in DELIMITERS if mark in lines[0]):
        widths = [len(row) for row in csv.reader(lines, delimiter=mark)]
        fitting[mark] = sum(width == widths[0] for width in widths) / len(widths)
    return max(fitting, key=lambda mark: fitting[mark], default=NO_DELIMITER)


def _is_quoted(text: str) -> bool:
    """Whether quotes enclose the fields of a tab-separated file. Otherwise every line is a row, and a field may begin
    with a quote that no other quote closes.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    if len({line.count("\t") for line in lines}) > 1:
        return True
    fields = (field for line in lines for field in line.split("\t") if field.startswith('"'))
    return all(QUOTED.fullmatch(field) for field in fields)


def _with_decimal_points(path: Path, table: pa.Table, notes: list[str]) -> pa.Table:
    """Replaces the commas of columns whose values are all numbers, some of them with a decimal comma."""
    changed = []
    for place, name in enumerate(table.column_names):
        values = pc.fill_null(table.column(place), "")
        fractions = pc.match_substring_regex(values, DECIMAL_COMMA)
        if pc.any(fractions).as_py() and pc.all(pc.or_(fractions, pc.match_substring_regex(values, INTEGER))).as_py():
            table = table.set_column(place, name, pc.replace_substring(table.column(place), ",", "."))
            changed.append(repr(name))
    if changed:
        notes.append(f"{path.name}: the numbers of {', '.join(changed)} have decimal commas")
    return table
