"""Parquet, CSV and JSON files and folders are read; errors have one line and name the file."""

import json
import re
from pathlib import Path

import datasets
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet
import pytest

from kd.common.data.sources import read_splits, short_name
from kd.common.utils.errors import UserError

UMLAUT = "text,label\ncaf\u00e9,a\n"


def splits(dataset: object, needs_train: bool = True) -> dict[str, datasets.Dataset]:
    return read_splits(str(dataset), {}, needs_train=needs_train)[0]


def folder_of(folder: Path, **files: str | bytes) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def error_of(dataset: object) -> str:
    with pytest.raises(UserError) as caught:
        splits(dataset)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value)


def test_csv_columns_are_strings_and_keep_their_contents(tmp_path: Path) -> None:
    content = '\ufefftext,code,empty\n007,010,\n"two, with\na break",true,NA\n'
    train = splits(folder_of(tmp_path, train__csv=content))["train"]
    assert train[:] == {"text": ["007", "two, with\na break"], "code": ["010", "true"], "empty": ["", "NA"]}


@pytest.mark.parametrize("lines", [False, True])
def test_json_rows_keep_every_column_and_mixed_values_become_strings(tmp_path: Path, lines: bool) -> None:
    rows = [{"text": "a"}, {"text": "b", "label": 1}, {"text": "c", "label": "2"}]
    content = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    train = splits(folder_of(tmp_path, train__json="\ufeff" + content))["train"]
    assert train[:] == {"text": ["a", "b", "c"], "label": [None, "1", "2"]}


def test_categories_of_pandas_are_read(tmp_path: Path) -> None:
    frame = pandas.DataFrame({"label": pandas.Categorical(["b", "a", "b"])})
    frame.to_parquet(tmp_path / "train.parquet")
    assert splits(tmp_path)["train"]["label"][:] == ["b", "a", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\nnaïve é,1\n".encode() + b"\xe9,2\n", "is not UTF-8 (byte 0xe9 in line 3): convert it"),
        (b"text,label\n\x81,1\n", "is neither UTF-8 nor Windows-1252 (byte 0x81 in line 2)"),
        (UMLAUT.encode("utf-16-le"), "a NUL byte (line 1)"),
        (b"text,label\na\0b,1\n", "a NUL byte (line 2)"),
        ("text,label\na, b,1\n", "Row #2: Expected 2 columns, got 3"),
        ("text,label,label\na,1,2\n", "two columns 'label'"),
        ("", "is empty"),
    ],
)
def test_errors_of_csv_files(tmp_path: Path, content: str | bytes, message: str) -> None:
    found = error_of(folder_of(tmp_path, train__csv=content))
    assert message in found and "train.csv" in found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pandas.DataFrame({"text": ["a"], "label": [1]}).to_json(), "is one JSON object of text, label"),
        (json.dumps({"version": 1, "data": [{"text": "a"}]}, indent=1), "is one JSON object"),
        (json.dumps({"version": 1, "data": [{"text": "a"}]}), "is one JSON object of version, data"),
        ('[["a", 1]]', "row 0 of"),
        ("5", "not a JSON object but a int"),
        ('{"text": "a"}\n{"text": ', "line 2"),
        ("[" * 100_000, "recursion"),
        ('[{"text": "\\ud800"}]', "surrogates"),
        ('[{"text": "a", "text": "b"}]', "two values of the same name"),
        ("[]", "is empty"),
        (b"\x81", "neither UTF-8 nor"),
    ],
)
def test_errors_of_json_files(tmp_path: Path, content: str | bytes, message: str) -> None:
    found = error_of(folder_of(tmp_path, train__json=content))
    assert message in found and "train.json" in found and "one object per line" in found or "UTF-8" in found


def test_a_damaged_parquet_file_is_one_line_for_damage_anywhere(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": [f"text {i}" * 9 for i in range(500)], "label": list(range(500))})
    rows.to_parquet(tmp_path / "train.parquet")
    whole = (tmp_path / "train.parquet").read_bytes()
    generator = np.random.default_rng(0)
    outcomes: list[object] = []
    for trial in range(40):
        damaged = bytearray(whole[: len(whole) // 2] if trial % 4 == 0 else whole)
        for place in generator.integers(0, len(damaged), 30):
            damaged[place] = generator.integers(256)
        (tmp_path / "train.parquet").write_bytes(bytes(damaged))
        try:
            outcomes.append(len(splits(tmp_path)["train"][:]["text"]))
        except UserError as error:
            outcomes.append(str(error))
    assert sum("cannot read" in str(outcome) for outcome in outcomes) > 30


def test_parquet_strings_that_are_not_utf8_are_rejected(tmp_path: Path) -> None:
    column = pa.array([b"na\xefve"], pa.binary()).view(pa.string())
    pyarrow.parquet.write_table(pa.table({"text": column}), tmp_path / "train.parquet")
    assert "UTF8" in error_of(tmp_path)


def test_two_parquet_columns_with_the_same_name_are_rejected(tmp_path: Path) -> None:
    table = pa.table([pa.array(["a"]), pa.array([1]), pa.array([2])], names=["text", "label", "label"])
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    assert "two columns 'label'" in error_of(tmp_path)


# Files as they come

ROWS = {"text": ["café, closed", 'she "said" so', "no; never"], "label": ["a", "b", "a"]}
PLAIN = 'text,label\n"café, closed",a\n"she ""said"" so",b\nno; never,a\n'
LINES = "".join(json.dumps(row) + "\n" for row in datasets.Dataset.from_dict(ROWS))
SEMICOLONS = 'text;label\ncafé, closed;a\n"she ""said"" so";b\n"no; never";a\n'
TABS = 'text\tlabel\ncafé, closed\ta\nshe "said" so\tb\nno; never\ta\n'


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("train.csv", PLAIN.encode(), None),
        ("train.csv", b"\xef\xbb\xbf" + PLAIN.replace("\n", "\r\n").encode(), None),
        ("train.csv", PLAIN.encode("cp1252"), "is not UTF-8 (byte 0xe9 in line 2): it is read as Windows-1252"),
        ("train.csv", PLAIN.encode("utf-16"), "train.csv is read as UTF-16"),
        ("train.csv", SEMICOLONS.replace("\n", "\r\n").encode(), "train.csv: the columns are separated by semicolons"),
        ("train.csv", SEMICOLONS.replace(";", "|").replace("no|", "no;").encode(), "separated by vertical bars"),
        ("train.tsv", TABS.encode(), "train.tsv: the columns are separated by tabs"),
        ("train.tsv", SEMICOLONS.replace(";", "\t").replace("no\t", "no;").encode(), "separated by tabs"),
        ("train.csv", PLAIN.replace("text,label", " text , label").encode(), None),
        ("my_train-v2.csv", PLAIN.encode(), "my_train-v2.csv is read as the train split"),
        ("Train.csv", PLAIN.encode(), "Train.csv is read as the train split"),
        (
            "train.ndjson",
            LINES.encode(),
            None,
        ),
    ],
)
def test_every_usual_file_gives_the_same_rows(tmp_path: Path, name: str, content: bytes, note: str | None) -> None:
    (tmp_path / name).write_bytes(content)
    found, notes = read_splits(str(tmp_path), {})
    assert found["train"][:] == ROWS
    assert [note in one for one in notes] == [True] if note else not notes
    if name.startswith("train."):
        single, notes = read_splits(str(tmp_path / name), {})
        assert single["train"][:] == ROWS and len(notes) == (note is not None)


def test_quotes_that_no_quote_closes_are_part_of_a_tab_separated_text(tmp_path: Path) -> None:
    found, notes = read_splits(str(folder_of(tmp_path, train__tsv='text\tlabel\n"hello\ta\nbye\tb\n')), {})
    assert found["train"]["text"][:] == ['"hello', "bye"] and "train.tsv: quotes are part of the texts" in notes


def test_decimal_commas_become_points_in_columns_of_numbers_only(tmp_path: Path) -> None:
    content = "text;score;code\na;0,5;1,x\nb;2;2,5\nc;;3\n"
    found, notes = read_splits(str(folder_of(tmp_path, train__csv=content)), {})
    assert found["train"]["score"][:] == ["0.5", "2", ""] and found["train"]["code"][:] == ["1,x", "2,5", "3"]
    assert "train.csv: the numbers of 'score' have decimal commas" in notes


def test_a_file_with_one_column_needs_no_delimiter(tmp_path: Path) -> None:
    found, _ = read_splits(str(folder_of(tmp_path, train__csv='text\nyes, it is; so\n"quoted, too"\n')), {})
    assert found["train"][:] == {"text": ["yes, it is; so", "quoted, too"]}


# Folders and names


def test_files_without_the_name_of_a_split_are_not_read(tmp_path: Path) -> None:
    folder_of(tmp_path, train__csv="text\na\n", notes__json="{", extra__csv=b"\xff")
    found, notes = read_splits(str(tmp_path), {})
    assert list(found) == ["train"] and notes == ["split extra is not used", "split notes is not used"]


def test_errors_of_the_operating_system_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "directory" / "train.csv").mkdir(parents=True)
    assert "train.csv (Is a directory)" in error_of(tmp_path / "directory")
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling" / "train.csv").symlink_to(tmp_path / "gone.csv")
    assert "train.csv (No such file or directory)" in error_of(tmp_path / "dangling")
    assert "File name too long" in error_of("x" * 5000)
    assert "unknown dataset" in error_of("a\0b")


def test_errors_list_the_contents_of_a_folder_without_data_files(tmp_path: Path) -> None:
    assert "holds nothing" in error_of(tmp_path)
    rows = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path / "saved")
    assert "save_to_disk" in error_of(tmp_path / "saved")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    rows.to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    assert f"but in {tmp_path / 'hub' / 'data'}" in error_of(tmp_path / "hub")
    assert list(splits(tmp_path / "hub" / "data")) == ["train"]
    (tmp_path / "sheets").mkdir()
    assert "holds train.xlsx" in error_of(folder_of(tmp_path / "sheets", train__xlsx="a"))


def test_a_missing_shard_or_different_columns_are_rejected(tmp_path: Path) -> None:
    for i in (0, 2):
        datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / f"train-0000{i}-of-00003.parquet")
    assert "has 2 of the 3 files of split train" in error_of(tmp_path)
    datasets.Dataset.from_dict({"body": ["a"]}).to_parquet(tmp_path / "train-00001-of-00003.parquet")
    message = error_of(tmp_path)
    assert "train-00001-of-00003.parquet and train-00000-of-00003.parquet differ" in message


def test_a_file_is_the_split_in_its_name(tmp_path: Path) -> None:
    folder_of(tmp_path, new__csv="text\na\n", test__csv="text\nb\n", new__xlsx="x")
    assert splits(tmp_path / "new.csv")["train"]["text"][:] == ["a"]
    assert splits(tmp_path / "new.csv", needs_train=False)["test"]["text"][:] == ["a"]
    assert splits(tmp_path / "test.csv", needs_train=False)["test"]["text"][:] == ["b"]
    assert "no train split" in error_of(tmp_path / "test.csv")
    assert re.search(r"new.xlsx is not a parquet, CSV, JSON or CoNLL file", error_of(tmp_path / "new.xlsx"))
    assert short_name(str(tmp_path / "new.csv")) == "new.csv"
