"""Hidden states of student and teacher with different tokenizers, matched through the characters of their tokens."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerBase,
)

from kd.common.losses import feature_l2
from kd.common.objective import FeatureTerm
from kd.common.outputs import Outputs
from kd.common.training.teacher_outputs import TeacherOutputs
from kd.common.utils.errors import UserError
from kd.nlp.data.entities import load_synthetic_entities
from kd.nlp.data.loading import TextData, Texts, load_text_data
from kd.nlp.student_model import teacher_outputs
from kd.nlp.student_model.alignment import AlignedOutputs, LiveOutputs, match_pooled, overlap, token_spans
from kd.nlp.student_model.arguments import MatchingArguments, PairArguments
from kd.nlp.student_model.inputs import validate_alignment
from kd.nlp.teacher_model.generative import byte_level_bpe
from kd.nlp.teacher_model.teacher import vocabulary
from kd_testing.scripts import run_script

TEXTS = ["unhappy cats", "a cat", "happy, unhappy dogs!"]


def of_words(*words: str) -> BertTokenizer:
    """A tokenizer with these words and pieces."""
    pieces = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, model_max_length=32)


def data_of(texts: list[Any], **columns: list[Any]) -> TextData:
    number = list(range(len(texts)))
    rows = datasets.Dataset.from_dict({"text": texts, "label": [0] * len(texts), "sample_id": number} | columns)
    task: Any = "token_classification" if isinstance(texts[0], list) else "classification"
    return TextData("few", {"train": rows, "validation": rows}, ["a", "b"], task, "accuracy", "f")


def spans(*tokens: tuple[int, int, int]) -> np.ndarray:
    return np.array(tokens)


def test_each_token_is_the_mean_of_those_that_share_a_character_with_it() -> None:
    """`unhappy cats`: the teacher has un|happy|cat|s, the student unhap|py|cats and two separators."""
    teacher = spans((0, 0, 2), (0, 2, 7), (0, 8, 11), (0, 11, 12))
    student = spans((-1, 0, 0), (0, 0, 5), (0, 5, 7), (0, 8, 12), (-1, 0, 0))
    expected = [[0, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 0.5, 0.5], [0, 0, 0, 0]]
    assert overlap(student, teacher).tolist() == expected
    assert (overlap(teacher, teacher) == np.eye(4)).all()


def test_texts_of_a_pair_and_empty_tokens_share_no_characters() -> None:
    teacher, student = spans((0, 0, 4), (1, 0, 4), (0, 4, 4)), spans((1, 0, 2), (0, 2, 4), (0, 4, 4))
    assert overlap(student, teacher).tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("student", "teacher", "place", "expected"),
    [
        ("cls", "cls", 0, [1, 0, 0, 0]),
        ("cls", "last", 0, [0, 0, 0, 1]),
        ("cls", "mean", 0, [0.25] * 4),
        ("last", "cls", 1, [1, 0, 0, 0]),
        ("tokens", "tokens", None, None),
        ("mean", "mean", None, None),
    ],
)
def test_the_tokens_that_the_heads_read_are_matched(student: Any, teacher: Any, place: Any, expected: Any) -> None:
    weights = np.full((2, 4), 9.0)
    match_pooled(weights, student, teacher)
    rows = [weights[row].tolist() for row in range(2)]
    if place is not None:
        assert rows.pop(place) == expected
    assert rows == [[9.0] * 4] * len(rows)


def test_characters_of_real_tokenizers() -> None:
    bert, bpe = of_words("un", "##happy", "cats", "a", "cat"), byte_level_bpe(TEXTS * 3, 300, 32)
    data = data_of(TEXTS)
    first, second = (token_spans(Texts.of(data, tokenizer)) for tokenizer in (bert, bpe))
    assert first[0].tolist() == [[-1, 0, 0], [0, 0, 2], [0, 2, 7], [0, 8, 12], [-1, 0, 0]]
    for row, text in zip(second, TEXTS, strict=True):  # the byte-level tokenizer covers every character once
        assert [end for _, _, end in row[:-1]] == [start for _, start, _ in row[1:]] and row[-1, 2] == len(text)
    words = data_of([["unhappy", "cats"]], label=[[0, 1]])
    assert token_spans(Texts.of(words, bert))[0].tolist() == [[-1, 0, 0], [0, 0, 2], [0, 2, 7], [1, 0, 4], [-1, 0, 0]]
    pair = data_of(["a cat"], text_pair=["cats"])
    found = token_spans(Texts.of(pair, bert))[0]
    assert found.tolist() == [[-1, 0, 0], [0, 0, 1], [0, 2, 5], [-1, 0, 0], [1, 0, 4], [-1, 0, 0]]


def test_a_teacher_moves_to_the_tokens_of_its_student() -> None:
    """Each state of the teacher is the number of its token; the loss ignores what has no counterpart."""
    data = data_of(TEXTS)
    teacher = Texts.of(data, of_words("un", "##happy", "cats", "a", "cat", "happy", "dogs", ",", "!"))
    student = Texts.of(data, of_words("unhappy", "cat", "##s", "a", "happy", "dogs"))
    states = [torch.arange(len(row["input_ids"])).float()[:, None] for row in teacher.train]
    cache = TeacherOutputs(torch.arange(3), torch.ones(3, 2), {"layer": states})
    aligned = AlignedOutputs(cache, student, teacher, ("cls", "last"))
    found = aligned.batch(torch.tensor([1, 0]), positions=7)
    assert found.features is not None and found.mask is not None
    assert found.features["layer"][0, :, 0].tolist() == [3, 1, 2, 0, 0, 0, 0]  # [CLS] a cat [SEP]
    assert found.features["layer"][1, :, 0].tolist() == [4, 1.5, 3, 3, 0, 0, 0]  # [CLS] unhappy cat ##s [SEP]
    assert found.mask.tolist() == [[True, True, True] + [False] * 4, [True] * 4 + [False] * 3]
    assert torch.equal(found.logits, torch.ones(2, 2))  # type: ignore[arg-type]
    own = torch.randn(2, 7, 1)
    term = FeatureTerm("own", "layer", feature_l2)
    loss = term(Outputs(features={"own": own}, mask=torch.ones(2, 7, dtype=torch.long)), found, None)
    kept = found.mask[:, :, None]
    torch.testing.assert_close(loss, (own - found.features["layer"])[kept].square().mean())


def test_equal_tokens_are_moved_to_themselves() -> None:
    texts = Texts.of(data_of(TEXTS), of_words("un", "##happy", "cats", "a", "cat"))
    states = [torch.randn(len(row["input_ids"]), 3) for row in texts.train]
    cache = TeacherOutputs(torch.arange(3), None, {"layer": states})
    moved = AlignedOutputs(cache, texts, texts, ("cls", "cls")).batch(torch.arange(3))
    expected = cache.batch(torch.arange(3))
    assert moved.features and expected.features and moved.mask is not None
    torch.testing.assert_close(moved.features["layer"][moved.mask], expected.features["layer"][moved.mask])
    spans = token_spans(texts)
    in_texts = [int((row[:, 0] >= 0).sum()) for row in spans]
    assert moved.mask.sum(1).tolist() == [1 + number for number in in_texts]  # separators are masked out


def test_a_live_teacher_equals_a_cached_one() -> None:
    texts = Texts.of(data_of(TEXTS), of_words("un", "##happy", "cats", "a", "cat"))
    shape: dict[str, Any] = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertForSequenceClassification(BertConfig(vocab_size=20, num_hidden_layers=2, **shape)).eval()
    path = "bert.encoder.layer.1"
    live = LiveOutputs(model, texts, {path: path}).batch(torch.tensor([2, 0]))
    assert live.features and not any(module._forward_hooks for module in model.modules())
    with torch.no_grad():
        batch = texts.collate([texts.train[i] for i in (2, 0)])
        states = model(batch["input_ids"], batch["attention_mask"], output_hidden_states=True)
    torch.testing.assert_close(live.features[path], states.hidden_states[2])
    torch.testing.assert_close(live.logits, states.logits)


# ---- the script ----


def saved(folder: Path, model: Any, tokenizer: PreTrainedTokenizerBase) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Encoders and a classifier of different vocabularies."""
    data = load_text_data(str(small))
    texts = data.splits["train"]["text"][:]
    folder = tmp_path_factory.mktemp("models")
    labels: dict[str, Any] = {"id2label": dict(enumerate(data.label_names))}
    shape: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    bert, bpe = BertTokenizer(vocab=vocabulary(texts, 60), model_max_length=64), byte_level_bpe(texts, 400, 64)
    torch.manual_seed(0)
    narrow = BertModel(BertConfig(vocab_size=len(bert), hidden_size=16, **shape))
    gpt = GPT2Config(vocab_size=len(bpe), n_embd=24, n_layer=2, n_head=2, eos_token_id=0, **labels)
    return {
        "bert": saved(folder / "bert", narrow, bert),
        "gpt": saved(folder / "gpt", GPT2ForSequenceClassification(gpt), bpe),
    }


def distill(data: Path, *words: object) -> dict[str, Any]:
    """Runs distill_classifier.py and returns the first logged losses of the student."""
    fixed = ["--dataset", data, "--no_control", "--report_to", "none", "--precision", "fp32", "--max_steps", 2,
             "--logging_strategy", "steps", "--logging_steps", 1]  # fmt: skip
    run_script("NLP/scripts/distill_classifier.py", *fixed, *words)
    folder = Path(str(words[words.index("--output_dir") + 1]))
    history = json.loads((folder / "stages" / "student" / "stage.json").read_text())["history"]
    first: dict[str, Any] = next(entry for entry in history if "loss" in entry)
    return first


def test_a_decoder_teaches_an_encoder_of_another_vocabulary(
    small: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--teacher", models["gpt"], "--student", models["bert"], "--align_epochs", 0]
    words += ["--hidden_weight", 1, "--embedding_weight", 0]
    cached = distill(small, *words, "--output_dir", tmp_path / "cached")
    assert cached.keys() >= {"loss_task", "loss_soft_targets", "loss_hidden_0", "loss_hidden_1"}
    monkeypatch.setattr(teacher_outputs, "FEATURE_BYTES", 0)
    live = distill(small, *words, "--output_dir", tmp_path / "live")
    for name in cached:
        if name.startswith("loss_"):
            assert cached[name] == pytest.approx(live[name], rel=2e-3)
    student = tmp_path / "cached" / "student"
    assert AutoModelForSequenceClassification.from_pretrained(student).config.model_type == "bert"
    assert (
        AutoTokenizer.from_pretrained(student).get_vocab() == AutoTokenizer.from_pretrained(models["bert"]).get_vocab()
    )


def test_a_continued_run_reads_the_cached_states(small: Path, models: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["--teacher", models["gpt"], "--student", models["bert"], "--align_epochs", 0, "--hidden_weight", 1]
    distill(small, *words, "--output_dir", folder)
    weights = (folder / "student" / "model.safetensors").read_bytes()
    cached = {path: path.stat().st_mtime_ns for path in folder.glob("teacher_outputs/**/*.arrow")}
    assert cached
    for name in ("stages/student", "student"):
        shutil.rmtree(folder / name)
    (folder / "results.json").unlink()
    distill(small, *words, "--output_dir", folder, "--resume_from_checkpoint")
    assert (folder / "student" / "model.safetensors").read_bytes() == weights
    assert {path: path.stat().st_mtime_ns for path in cached} == cached


@pytest.mark.slow
def test_a_published_encoder_teaches_a_student_of_another_vocabulary(shared: Path, tmp_path: Path) -> None:
    """all-MiniLM-L6-v2 on CLINC150: the loss of the hidden states falls, although no token is the same."""
    data = shared / "data" / "clinc_oos_plus"
    texts = load_text_data(str(data), max_train_samples=2000).splits["train"]["text"][:]
    saved(tmp_path / "student", GPT2Config(n_embd=64, n_layer=2, n_head=2), byte_level_bpe(texts, 800, 64))
    words = ["--teacher", shared / "models" / "all-MiniLM-L6-v2", "--teacher_epochs", 1, "--align_epochs", 0,
             "--student", tmp_path / "student", "--hidden_weight", 1, "--max_train_samples", 2000,
             "--max_eval_samples", 200, "--output_dir", tmp_path / "run", "--no_control", "--num_train_epochs", 3,
             "--report_to", "none", "--precision", "fp32"]  # fmt: skip
    run_script("NLP/scripts/distill_classifier.py", "--dataset", data, *words)
    history = json.loads((tmp_path / "run" / "stages" / "student" / "stage.json").read_text())["history"]
    losses = [entry["loss_hidden_1"] for entry in history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]


def test_tags_and_hidden_states_of_another_tokenizer(tmp_path: Path, narrow_bert: None) -> None:
    splits = load_synthetic_entities()
    for split, size in (("train", 60), ("validation", 20)):
        splits[split].select(range(size)).to_parquet(tmp_path / "data" / f"{split}.parquet")
    texts = [" ".join(words) for words in splits["train"]["tokens"][:60]]
    pieces = BertTokenizer(vocab=vocabulary(texts, 20), model_max_length=128)
    shape: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    student = saved(tmp_path / "bert", BertModel(BertConfig(vocab_size=len(pieces), hidden_size=16, **shape)), pieces)
    words = ["--student", student, "--align_epochs", 0, "--hidden_weight", 1, "--from_scratch_epochs", 0.5]
    losses = distill(tmp_path / "data", *words, "--output_dir", tmp_path / "run")
    assert losses["loss_hidden_0"] > 0 and losses["loss_soft_targets"] > 0


def test_an_encoder_teaches_a_decoder_by_pooled_features(small: Path, models: dict[str, Path], tmp_path: Path) -> None:
    words = ["--student", models["gpt"], "--method", "sp", "--from_scratch_epochs", 0.2, "--align_epochs", 0.1]
    losses = distill(small, *words, "--output_dir", tmp_path / "run")
    assert losses.keys() >= {"loss_task", "loss_similarities"}
    aligned = json.loads((tmp_path / "run" / "stages" / "student_encoder" / "stage.json").read_text())["history"]
    assert {"loss_hidden_0", "loss_hidden_1"} <= next(entry for entry in aligned if "loss" in entry).keys()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    notes = results["model_notes"]
    assert "padded with its end-of-text token" in notes and "read texts in different tokens" in notes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--attention_weight", "1"], "read a text in different tokens.*set --attention_weight to 0"),
        (["--embedding_weight", "1"], "no submodule embeddings: leave --embedding_weight at 0"),
    ],
)
def test_what_needs_equal_tokens_is_refused(
    small: Path, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: Any, message: str
) -> None:
    models_named = ["--teacher", models["gpt"], "--student", models["bert"], "--align_epochs", 0]
    with pytest.raises(SystemExit) as stopped:
        distill(small, *models_named, *words, "--output_dir", tmp_path / "run")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and re.search(message, error), error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "method", "message"),
    [
        ({"is_fast": False}, "kd", "S has no character offsets .*tokenizer.json.*, or pass --align_epochs 0"),
        ({"padding_side": "left"}, "kd", "S pads texts on the left: pass --align_epochs 0"),
        ({"classifier_pooling": "mean"}, "sp", '--method on logits, or set "classifier_pooling": "cls"'),
        ({"classifier_pooling": "mean"}, "kd", None),
        ({}, "sp", None),
    ],
)
def test_features_of_other_tokens_that_cannot_be_matched(change: Any, method: str, message: str | None) -> None:
    tokenizer = {"is_fast": True, "padding_side": "right"}
    tokenizer |= {name: value for name, value in change.items() if name in tokenizer}
    config = {"model_type": "modernbert"} | {name: x for name, x in change.items() if name not in tokenizer}
    good = SimpleNamespace(tokenizer=SimpleNamespace(is_fast=True, padding_side="right"))
    student = SimpleNamespace(
        tokenizer=SimpleNamespace(**tokenizer), model=SimpleNamespace(config=SimpleNamespace(**config))
    )
    inputs: Any = SimpleNamespace(student=student, teacher=good, same_tokens=False, data=data_of(TEXTS))
    pair = PairArguments(teacher="T", student="S")
    matching = MatchingArguments(method=method, hidden_weight=1.0)
    if message is None:
        return validate_alignment(inputs, pair, matching)
    with pytest.raises(UserError, match=message):
        validate_alignment(inputs, pair, matching)
