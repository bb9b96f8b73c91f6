"""forget.py and add.py on a student with counted values and on one with trained values: exact, saved, refused."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from kd.common.bottleneck.training import CodeDataset, add_samples, encode_samples
from kd.nlp.data.loading import Texts, load_text_data
from kd.nlp.student_model.bottleneck_classifier import BottleneckClassifier
from kd.nlp.student_model.bottleneck_training import samples_of
from kd.nlp.teacher_model.teacher import load_trained
from kd_testing.scripts import run_script

SHORT = [
    *("--from_scratch_epochs", 1, "--align_epochs", 0, "--codebook_size", 16, "--no_control", "--report_to", "none"),
    *("--bottleneck", "student", "--keys", "new"),
]


def distilled(folder: Path, data: Path, *words: object) -> Path:
    run_script("NLP/scripts/distill_bottleneck.py", "--dataset", data, "--output_dir", folder, *SHORT, *words)
    return folder


@pytest.fixture(scope="module")
def counted(small, tmp_path_factory) -> Path:
    """A finished run whose student has counted values."""
    folder = tmp_path_factory.mktemp("runs") / "counted"
    return distilled(folder, small, "--values", "counted", "--decoder", "mean")


def forget(model: Path, output: Path, *words: object) -> BottleneckClassifier:
    run_script("NLP/scripts/forget.py", model, "--output_dir", output, *words)
    loaded: BottleneckClassifier = BottleneckClassifier.from_pretrained(output)
    return loaded.eval()


def test_forgotten_texts_leave_the_values_of_a_student_without_them(counted, small, tmp_path, capsys):
    data = load_text_data(str(small))
    student = load_trained(str(counted / "student"), data)
    texts = Texts.of(data, student.tokenizer)
    rows = texts.train.select(range(20, len(texts.train)))
    samples = samples_of(texts, rows)
    retrained = student.model
    codes = encode_samples(retrained, rows, texts.collate, "fp32")
    retrained.bottleneck.label_counts.zero_()
    add_samples(retrained.bottleneck, CodeDataset(codes, samples.labels, samples.sample_ids))

    first = data.splits["train"].select(range(20))
    names = [data.label_names[label] for label in first["label"]]
    pd.DataFrame({"text": first["text"], "intent": names}).to_csv(tmp_path / "forget.csv", index=False)
    found = forget(counted, tmp_path / "out", "--examples", tmp_path / "forget.csv")
    assert torch.equal(found.bottleneck.label_counts, retrained.bottleneck.label_counts)
    assert torch.equal(found.bottleneck.values, retrained.bottleneck.values)
    output = capsys.readouterr().out
    assert "Forgot 20 examples" in output and "Exact" in output and "Keys and encoder do not change" in output
    assert "## Changed" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(SystemExit) as stopped:  # they cannot be forgotten twice
        forget(tmp_path / "out", tmp_path / "again", "--examples", tmp_path / "forget.csv")
    assert stopped.value.code == 2 and "never added" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_a_class_is_forgotten(counted, tmp_path, capsys):
    found = forget(counted, tmp_path / "out", "--classes", "set_alarm", "set_timer")
    before = BottleneckClassifier.from_pretrained(counted / "student").bottleneck
    labels = [found.config.label2id[name] for name in ("set_alarm", "set_timer")]
    assert not found.bottleneck.label_counts[..., labels].any()
    removed = (before.label_counts - found.bottleneck.label_counts).sum() // found.bottleneck.codebooks
    assert f"{removed} counted examples" in capsys.readouterr().out
    run_script("NLP/scripts/evaluate.py", tmp_path / "out", "--dataset", "intents", "--max_eval_samples", 41)


def test_trained_values_forget_classes_but_no_examples(small, tmp_path, capsys):
    run = distilled(tmp_path / "run", small, "--value_epochs", 1)
    found = forget(run, tmp_path / "out", "--classes", "set_alarm")
    label = found.config.label2id["set_alarm"]
    codes = torch.randint(16, (100, found.bottleneck.codebooks))
    assert not (found.bottleneck.decode(codes).argmax(1) == label).any()
    assert "Approximate" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        forget(run, tmp_path / "texts", "--examples", small)
    assert "--examples needs counted values" in capsys.readouterr().err


def test_texts_and_a_new_class_are_added(counted, tmp_path, capsys):
    texts = ["brew me a coffee", "make an espresso", "wake me at seven"]
    pd.DataFrame({"text": texts, "intent": ["coffee", "coffee", "Set Alarm"]}).to_csv(
        tmp_path / "new.csv", index=False
    )
    run_script("NLP/scripts/add.py", counted, "--examples", tmp_path / "new.csv", "--output_dir", tmp_path / "out")
    assert "Added 3 examples and 1 classes (coffee)" in capsys.readouterr().out
    model = BottleneckClassifier.from_pretrained(tmp_path / "out")
    before = BottleneckClassifier.from_pretrained(counted / "student").bottleneck.label_counts
    added = model.bottleneck.label_counts.sum((0, 1)) // model.bottleneck.codebooks
    label = model.config.label2id["set_alarm"]
    assert added[-1] == 2 and model.config.id2label[len(added) - 1] == "coffee"
    assert added[label] == before[..., label].sum() // model.bottleneck.codebooks + 1
    back = forget(tmp_path / "out", tmp_path / "back", "--examples", tmp_path / "new.csv")
    assert torch.equal(back.bottleneck.label_counts[..., :-1], before)
    run_script("NLP/scripts/evaluate.py", tmp_path / "out", "--dataset", tmp_path / "new.csv")
    pd.DataFrame({"text": texts[:1], "intent": ["tea"]}).to_csv(tmp_path / "one.csv", index=False)
    more = tmp_path / "out", "--examples", tmp_path / "one.csv", "--output_dir", tmp_path / "more"
    run_script("NLP/scripts/add.py", *more)  # a single class
    assert "Added 1 examples and 1 classes (tea)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "pass --classes NAME ... or --examples FILE"),
        (["--classes", "set_alarms"], "did you mean set_alarm?"),
        (["--classes", "set_alarm", "--examples", "x.csv"], "pass --classes NAME ... or --examples FILE"),
    ],
)
def test_invalid_flags(counted, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        forget(counted, tmp_path / "out", *words)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_folder_with_files_is_refused(counted, capsys):
    with pytest.raises(SystemExit):
        forget(counted, counted, "--classes", "set_alarm")
    assert "is not empty" in capsys.readouterr().err
