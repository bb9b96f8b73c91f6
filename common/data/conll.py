"""Reads CoNLL files: one word per line with its tag in the last column, and an empty line after each sentence."""

from pathlib import Path

import pyarrow as pa

from kd.common.utils.errors import UserError

DOCUMENT = "-DOCSTART-"  # begins a document in CoNLL-2003
WORD_AND_TAG = "a word, spaces or tabs, and its tag in the last column"


def parse_conll(path: Path, text: str, notes: list[str]) -> pa.Table:
    """The sentences of a file as the columns tokens and tags, lists of strings.

    Leaves out comments (`# ...` in a line without tabs between sentences) and -DOCSTART- lines. Notes how columns
    between word and tag were read. Raises UserError for a line with another number of columns.
    """
    sentences: list[tuple[list[str], list[str]]] = [([], [])]
    columns = 0
    for number, line in enumerate(text.split("\n"), start=1):
        cells = [cell.strip() for cell in line.split("\t")] if "\t" in line.strip() else line.split()
        words, tags = sentences[-1]
        is_comment = line.startswith("# ") and not words and "\t" not in line and len(cells) != columns
        if not cells or cells[0] == DOCUMENT or is_comment:
            if words:
                sentences.append(([], []))
            continue
        columns = columns or len(cells)
        if len(cells) < 2 or len(cells) != columns:
            raise UserError(
                f"line {number} of {path} has {len(cells)} columns instead of {max(columns, 2)}: a CoNLL file has "
                f"{WORD_AND_TAG}, and an empty line after each sentence"
            )
        words.append(cells[0])
        tags.append(cells[-1])
    sentences = [sentence for sentence in sentences if sentence[0]]
    if not sentences:
        raise UserError(f"{path} is empty: add lines of {WORD_AND_TAG}")
    if columns > 2:
        notes.append(f"{path.name}: of {columns} columns the first is the word and the last its tag")
    lists = pa.list_(pa.string())
    columns_of = {"tokens": [words for words, _ in sentences], "tags": [tags for _, tags in sentences]}
    return pa.table({name: pa.array(rows, lists) for name, rows in columns_of.items()})
