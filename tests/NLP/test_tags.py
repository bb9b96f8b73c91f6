"""Token classification: words and tags in every layout, word pieces, models with other tokens, a run, the pipeline."""

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import AutoTokenizer, BertConfig, BertForTokenClassification, BertTokenizer, pipeline

from kd.common.objective import soft_targets
from kd.common.outputs import Outputs
from kd.common.training.teacher_outputs import TeacherOutputs
from kd.common.utils.errors import UserError
from kd.common.utils.tasks import IGNORED
from kd.nlp.data.columns import TASKS
from kd.nlp.data.entities import load_synthetic_entities
from kd.nlp.data.loading import Texts, load_text_data, with_label_order
from kd.nlp.student_model.alignment import AlignedOutputs
from kd.nlp.student_model.evaluation import evaluate
from kd.nlp.student_model.words import word_logits
from kd.nlp.teacher_model.teacher import load_classifier, load_trained, vocabulary
from kd_testing.readmes import run_readme
from kd_testing.scripts import run_script

WORDS = [["Ann", "flew", "to", "New", "York"], ["Bob", "slept"], ["rain"]] * 4
TAGS = [["B-PER", "O", "O", "B-LOC", "I-LOC"], ["B-PER", "O"], ["O"]] * 4
NAMES = ["O", "B-LOC", "I-LOC", "B-PER"]
IDS = [[NAMES.index(tag) for tag in row] for row in TAGS]


def write(folder: Path, features: Features | None = None, **columns: list[Any]) -> str:
    for split in ("train", "validation"):
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
    return str(folder)


def conll(rows: list[list[str]], tags: list[list[str]], line: str = "{} {}\n") -> str:
    sentences = ["".join(map(line.format, *pair)) for pair in zip(rows, tags, strict=True)]
    return "\n".join(sentences)


# ---- reading ----


def of_strings(folder: Path) -> str:
    return write(folder, words=WORDS, tags=TAGS)


def of_conll2003(folder: Path) -> str:
    """The columns of conll2003 on the Hub: id, tokens, pos_tags, chunk_tags, ner_tags."""
    ner, pos = List(ClassLabel(names=NAMES)), List(ClassLabel(names=["NN", "VB"]))
    kinds = {
        "id": Value("string"),
        "tokens": List(Value("string")),
        "pos_tags": pos,
        "chunk_tags": pos,
        "ner_tags": ner,
    }
    zeros = [[0] * len(row) for row in WORDS]
    columns: dict[str, Any] = {"id": list(map(str, range(12))), "tokens": WORDS, "pos_tags": zeros}
    return write(folder, Features(kinds), **columns, chunk_tags=zeros, ner_tags=IDS)


def of_files(folder: Path) -> str:
    """Those of CoNLL-2003, with four columns, document lines and the suffix .txt."""
    folder.mkdir(exist_ok=True)
    for name in ("train", "valid"):
        text = "-DOCSTART- -X- -X- O\n\n" + conll(WORDS, TAGS, "{} NN B-NP {}\n")
        (folder / f"{name}.txt").write_text(text)
    return str(folder)


def of_tabs(folder: Path) -> str:
    for name in ("train", "dev"):
        (folder / f"{name}.conll").write_text("# id = 1\n" + conll(WORDS, TAGS, "{}\t{}\n").replace("\n\n", "\n\t\n"))
    return str(folder)


@pytest.mark.parametrize("layout", [of_strings, of_conll2003, of_files, of_tabs])
def test_every_layout_has_the_same_tags(tmp_path: Path, layout: Any) -> None:
    data = load_text_data(layout(tmp_path))
    assert (data.task, data.primary_metric, data.label_names) == ("token_classification", "f1", NAMES)
    assert data.splits["train"]["text"][:] == WORDS and data.splits["validation"]["label"][:] == IDS
    assert "tags: 4 (O, B-LOC, I-LOC, B-PER), IOB2" in data.notes
    if layout is of_files:
        assert "train.txt: of 4 columns the first is the word and the last its tag" in data.notes
    assert {TASKS[name].task for name in ("conll2003", "wnut_17")} == {"token_classification"}


def test_iob1_is_read_as_iob2(tmp_path: Path) -> None:
    tags = [["I-PER", "O", "O", "I-LOC", "I-LOC"], ["I-PER", "O"], ["O"]] * 4
    data = load_text_data(write(tmp_path, tokens=WORDS, tags=tags))
    assert data.label_names == NAMES and data.splits["train"]["label"][:] == IDS
    assert "24 tags I- that begin an entity were read as B- (IOB1 to IOB2)" in data.notes


def test_tags_without_entities_have_an_accuracy(tmp_path: Path) -> None:
    tags = [["NOUN", "VERB", "PART", "NOUN", "NOUN"], ["NOUN", "VERB"], ["NOUN"]] * 4
    data = load_text_data(write(tmp_path, tokens=WORDS, pos=tags))
    assert data.primary_metric == "accuracy" and any("no IOB2" in note for note in data.notes)


def test_rows_without_tags_are_left_out_and_some_set_aside_for_validation(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"tokens": [*WORDS, ["no", "tags"], []], "tags": [*TAGS, None, []]})
    rows.to_parquet(tmp_path / "train.parquet")
    data = load_text_data(str(tmp_path))
    assert "2 of 14 rows of train have no words or no tags and are left out" in data.notes
    assert len(data.splits["train"]) + len(data.splits["validation"]) == 12


def test_tags_follow_the_order_of_a_model(tmp_path: Path) -> None:
    data = with_label_order(load_text_data(of_strings(tmp_path)), ["B-PER", "I-PER", "B-LOC", "I-LOC", "O"])
    assert data.splits["train"]["label"][:3] == [[0, 4, 4, 2, 3], [0, 4], [4]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"tokens": WORDS, "tags": [["O"], *TAGS[1:]]}, "row 0 of train has 5 words in 'tokens' and 1 tags in 'tags'"),
        (
            {"tokens": WORDS, "a": TAGS, "b": TAGS},
            "column 'tokens' holds lists of words, so one column of lists holds",
        ),
    ],
)
def test_errors_are_one_line(tmp_path: Path, columns: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_text_data(write(tmp_path, **columns))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_split_without_tags_is_an_error(tmp_path: Path) -> None:
    lists = Features({"tokens": List(Value("string")), "tags": List(Value("string"))})
    with pytest.raises(UserError, match="the train split has no tags in column 'tags'"):
        load_text_data(write(tmp_path, lists, tokens=WORDS, tags=[None] * 12))


def test_a_file_of_sentences_is_no_conll_file(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("Ann flew home\nit rained\n")
    with pytest.raises(UserError, match=r"line 2 of .*train.txt has 2 columns instead of 3: a CoNLL file has a word"):
        load_text_data(str(tmp_path))


def test_the_embedded_sentences_have_entities_in_iob2() -> None:
    data = load_text_data("synthetic_entities")
    assert data.label_names[:3] == ["O", "B-PER", "I-PER"] and data.primary_metric == "f1"
    assert not any("IOB1" in note for note in data.notes)
    train, test = (load_synthetic_entities()[split] for split in ("train", "test"))
    names = [{" ".join(words) for words in rows["tokens"]} for rows in (train, test)]
    assert len(names[0] & names[1]) < 0.1 * len(names[1]) and train[0] == load_synthetic_entities()["train"][0]


# ---- word pieces ----


def tokenizer(words: list[str], length: int = 512) -> BertTokenizer:
    return BertTokenizer(vocab=vocabulary(words), do_lower_case=True, model_max_length=length)


@pytest.fixture
def data(tmp_path: Path) -> Any:
    return load_text_data(of_strings(tmp_path))


def test_the_first_piece_of_a_word_has_its_tag(data: Any) -> None:
    """`flew` is one piece, `Ann` three letters. The tags of all other pieces are IGNORED, also in the padding."""
    texts = Texts.of(data, tokenizer(["flew flew to to slept slept ann new york bob rain"]))
    row = texts.train[0]
    pieces = texts.collate.tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert pieces[:6] == ["[CLS]", "a", "##n", "##n", "flew", "to"]
    assert row["first_tokens"] == [1, 4, 5, 6, 9] and row["labels"][:6] == [IGNORED, 3, IGNORED, IGNORED, 0, 0]
    batch = texts.collate([texts.train[i] for i in (0, 1)])
    assert batch["labels"].shape == batch["input_ids"].shape and "first_tokens" not in batch
    assert batch["labels"][1][batch["attention_mask"][1] == 0].eq(IGNORED).all()
    assert (batch["labels"] != IGNORED).sum() == 7
    assert texts.labels("train")[:2].tolist() == [IDS[0], [*IDS[1], *[IGNORED] * 3]]


def test_a_word_that_was_cut_off_counts_as_outside(data: Any) -> None:
    texts = Texts.of(data, tokenizer(["flew flew to to ann"], length=6))
    assert texts.train[0]["first_tokens"] == [1, 4, -1, -1, -1]
    logits = [torch.arange(24.0).reshape(6, 4)]
    found = word_logits(logits, [texts.train[0]["first_tokens"]], outside=0)
    assert found.shape == (1, 5, 4) and found[0, :2].tolist() == [[4, 5, 6, 7], [16, 17, 18, 19]]
    assert found[0, 2:].argmax(axis=1).tolist() == [0, 0, 0]


def test_logits_of_words_move_to_the_tokens_of_another_tokenizer(data: Any) -> None:
    """Teacher and student split words differently; each word keeps the teacher's logits."""
    teacher, student = Texts.of(data, tokenizer(["x"])), Texts.of(data, tokenizer(["ann ann flew flew to to new new"]))
    ids = torch.arange(len(data.splits["train"]))
    logits = [torch.randn(len(row["input_ids"]), 4) for row in teacher.train]
    moved = AlignedOutputs(TeacherOutputs(ids, logits), student, teacher, None)
    batch = student.collate([student.train[i] for i in (1, 0)])
    outputs = moved.batch(batch["sample_id"], batch["input_ids"].shape[1])
    assert outputs.logits is not None
    for row, sample in zip(outputs.logits, (1, 0), strict=True):
        places, sources = student.train[sample]["first_tokens"], teacher.train[sample]["first_tokens"]
        torch.testing.assert_close(row[places], logits[sample][sources])
    same = soft_targets(2.0, "token_classification")(Outputs(logits=outputs.logits), outputs, batch["labels"])
    assert same == 0


def test_soft_targets_are_those_of_labelled_tokens() -> None:
    labels = torch.tensor([[IGNORED, 1, IGNORED, 0], [IGNORED, 2, IGNORED, IGNORED]])
    student, teacher = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    found = soft_targets(2.0, "token_classification")(Outputs(logits=student), Outputs(logits=teacher), labels)
    keep = labels != IGNORED
    expected = soft_targets(2.0)(Outputs(logits=student[keep]), Outputs(logits=teacher[keep]), None)
    torch.testing.assert_close(found, expected)


# ---- a run ----


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a few of the embedded sentences, with hidden states."""
    folder, splits = tmp_path_factory.mktemp("tags"), load_synthetic_entities()
    for split, size in (("train", 120), ("validation", 30), ("test", 30)):
        splits[split].select(range(size)).to_parquet(folder / "data" / f"{split}.parquet")
    words = ["--dataset", folder / "data", "--align_epochs", 1, "--from_scratch_epochs", 1, "--num_train_epochs", 1]
    words += ["--hidden_weight", 1, "--per_device_train_batch_size", 20, "--report_to", "none"]
    run_script("NLP/scripts/distill_classifier.py", *words, "--output_dir", folder / "run")
    return folder


def test_a_run_reports_the_metrics_of_entities(run: Path) -> None:
    results = json.loads((run / "run" / "results.json").read_text())
    metrics = results["models"]["student"]["metrics"]["test"]
    assert {"f1", "precision", "recall", "f1_conll", "accuracy", "nll", "agreement"} < metrics.keys()
    assert (
        results["primary_metric"]["name"] == "f1"
        and "token-classification" in (run / "run" / "student" / "README.md").read_text()
    )
    history = json.loads((run / "run" / "stages" / "student" / "stage.json").read_text())["history"]
    logged = next(entry for entry in history if "loss" in entry)
    assert {"loss_task", "loss_soft_targets", "loss_hidden_0"} <= logged.keys()
    assert "loss_hidden_pooled" not in logged  # the head reads all tokens


def test_the_student_loads_in_a_pipeline_and_in_the_project(run: Path) -> None:
    data = load_text_data(str(run / "data"))
    student = load_trained(str(run / "run" / "student"), data)
    texts = Texts.of(data, student.tokenizer)
    entry, logits = evaluate("student", student.model, texts)
    stored = json.loads((run / "run" / "results.json").read_text())["models"]["student"]["metrics"]["test"]
    assert entry["metrics"]["test"]["nll"] == pytest.approx(stored["nll"], rel=1e-4)
    assert entry["metrics"]["test"]["accuracy"] == pytest.approx(stored["accuracy"])
    words, tag = data.splits["test"][0]["text"], pipeline("token-classification", model=str(run / "run" / "student"))
    tag.model.config.id2label = {i: f"{i}" for i in range(9)}
    tokens = {one["start"]: int(one["entity"]) for one in tag(" ".join(words), ignore_labels=[])}
    starts = np.cumsum([0, *(len(word) + 1 for word in words[:-1])])
    assert [tokens[start] for start in starts] == logits["test"][0, : len(words)].argmax(axis=1).tolist()


def test_evaluate(run: Path) -> None:
    student = run / "run" / "student"
    run_script("NLP/scripts/evaluate.py", student, "--dataset", run / "data", "--json", run / "metrics.json")
    stored = json.loads((run / "run" / "results.json").read_text())["models"]["student"]["metrics"]["test"]
    found = json.loads((run / "metrics.json").read_text())["metrics"]["test"]
    assert found["f1"] == stored["f1"] and found["accuracy"] == stored["accuracy"]


@pytest.mark.slow
def test_export(run: Path, capsys: pytest.CaptureFixture) -> None:
    """The code in README.md prints a tag for each token, without torch."""
    student = run / "run" / "student"
    run_script("common/export/__main__.py", run / "run", "--format", "onnx", "--output_dir", run / "export")
    capsys.readouterr()
    run_readme(run / "export", "torch", "transformers")
    printed = capsys.readouterr().out
    tag = pipeline("token-classification", model=str(student))
    tags = [one["entity"] for one in tag("move fifty dollars to my savings", ignore_labels=[])]
    found = ast.literal_eval(printed)
    assert [name for _, name in found[1:-1]] == tags
    run_script("NLP/scripts/export.py", student, "--dataset", run / "data", "--output_dir", run / "int8")
    results = json.loads((run / "int8" / "export.json").read_text())
    assert results["models"]["onnx-int8"]["metrics"]["test"]["agreement"] > 0.9


def test_models_of_other_kinds(run: Path, tmp_path: Path) -> None:
    """A classifier of tokens is trained for tags only, and a model with other words is a student as well."""
    data, folder = load_text_data(str(run / "data")), tmp_path / "other"
    words = tokenizer([" ".join(row) for row in data.splits["train"]["text"][:20]])
    BertForTokenClassification(
        BertConfig(
            vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
    ).bert.save_pretrained(folder)
    words.save_pretrained(folder)
    untrained = load_classifier(str(folder), data)
    assert not untrained.trained and untrained.model.config.num_labels == 9
    flags = [
        "--dataset",
        run / "data",
        "--teacher",
        run / "run" / "student",
        "--student",
        folder,
        "--align_epochs",
        0,
    ]
    flags += ["--num_train_epochs", 1, "--report_to", "none", "--output_dir", tmp_path / "run"]
    run_script("NLP/scripts/distill_classifier.py", *flags)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert 0 <= results["models"]["student"]["metrics"]["test"]["agreement"] <= 1
    assert len(AutoTokenizer.from_pretrained(tmp_path / "run" / "student")) == len(words)
