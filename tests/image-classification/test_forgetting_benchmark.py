"""benchmarks/forgetting.py on a few digits: subtraction equals retraining, and all ways are in the tables."""

import json

from kd_testing.scripts import run_script


def test_subtraction_equals_retraining(tmp_path):
    run_script("benchmarks/forgetting.py", "--dataset", "digits", "--images", 300, "--codebooks", 4, "--key_dim", 6,
               "--codebook_size", 8, "--seeds", 1, "--cache", tmp_path, "--output", tmp_path / "out.json")  # fmt: skip
    found = json.loads((tmp_path / "out.json").read_text())
    exact = [record for record in found["forgotten"] if record["way"] == "subtract"]
    assert len(exact) == 2 * 3  # counted values and least squares, three scenarios
    for record in exact:
        same = {name: value for name, value in record["found"].items() if record["head"] == "counted values"}
        assert same == {name: record["retrained"][name] for name in same}
        assert record["found"]["agreement"] == 1.0
    ways = {(record["head"], record["way"]) for record in found["forgotten"]}
    assert {way for head, way in ways if head == "linear"} == {"none", "delete row", "gradient ascent", "SCRUB"}
    assert {record["shots"] for record in found["added"]} == {0, 1, 5, 20}
    tables = (tmp_path / "out.md").read_text()
    assert tables.count("\n| ") > 30 and "nan" not in tables


def test_the_part_is_a_class_of_a_domain(tmp_path):
    (tmp_path / "domains.json").write_text(json.dumps({pair: list(pair) for pair in ("01", "23", "45", "67", "89")}))
    run_script("benchmarks/forgetting.py", "--dataset", "digits", "--images", 300, "--codebooks", 4, "--key_dim", 6,
               "--codebook_size", 8, "--seeds", 1, "--domains", tmp_path / "domains.json", "--cache", tmp_path,
               "--output", tmp_path / "out.json")  # fmt: skip
    found = json.loads((tmp_path / "out.json").read_text())["forgotten"]
    parts = {(record["head"], record["way"]): record for record in found if record["scenario"] == "part"}
    deleted, subtracted = parts["linear", "delete row"], parts["counted values", "subtract"]
    assert deleted["found"]["rest"] < deleted["retrained"]["rest"] - 0.05  # the row is that of another class, too
    assert subtracted["found"] == subtracted["retrained"]
