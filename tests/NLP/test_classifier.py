"""Distillation of plain classifiers: feature terms, ensembles, the script, and invalid input."""

import functools
import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaModel,
    pipeline,
)

from kd.common.cli import parse
from kd.common.losses import attention_kl, feature_cosine, feature_l2
from kd.common.methods import Method
from kd.common.objective import Objective
from kd.common.outputs import FeatureHooks, Outputs
from kd.common.training.arguments import KDTrainingArguments
from kd.common.utils.errors import UserError
from kd.nlp.data.loading import TextData, Texts, load_text_data
from kd.nlp.student_model import teacher_outputs
from kd.nlp.student_model import training as training_steps
from kd.nlp.student_model.arguments import MatchingArguments, PairArguments, TextArguments
from kd.nlp.student_model.evaluation import predict
from kd.nlp.student_model.inputs import Inputs, inputs_of_seed, load_inputs, validate_arguments
from kd.nlp.student_model.methods import (
    attentions,
    embeddings,
    hidden_states,
    labels_and_logits,
    labels_only,
    layer_pairs,
)
from kd.nlp.student_model.teacher_outputs import cached_outputs
from kd.nlp.student_model.training import learning_rate_of
from kd.nlp.teacher_model.teacher import max_positions, tiny_bert, vocabulary
from kd_testing.paths import REPO
from kd_testing.scripts import run_script

BRIEF = ["--align_epochs", "0", "--report_to", "none", "--per_device_train_batch_size", "48"]


def distill(small: Path, *words: object) -> None:
    run_script("NLP/scripts/distill_classifier.py", "--dataset", small, *BRIEF, *words)


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="session")
def teachers(small, tmp_path_factory) -> list[Path]:
    """Two classifiers of the intents with different random weights."""
    folders, data = [], load_text_data(str(small))
    for seed in (1, 2):
        torch.manual_seed(seed)
        made = tiny_bert(data)
        folder = tmp_path_factory.mktemp("models") / f"teacher{seed}"
        with torch.no_grad():
            for weight in made.model.parameters():
                if weight.dim() > 1:
                    weight.mul_(8)  # default random weights are so small that all texts have the same logits
        made.model.save_pretrained(folder)
        made.tokenizer.save_pretrained(folder)
        folders.append(folder)
    return folders


# ---- terms on features ----


@pytest.mark.parametrize(
    ("layer_map", "expected"),
    [("uniform", [(0, 1), (1, 3), (2, 5)]), ("skip", [(0, 1), (1, 3)]), ("last", [(0, 3), (1, 4)])],
)
def test_layer_maps_from_three_to_six_layers(layer_map, expected):
    assert layer_pairs(layer_map, 3, 6) == expected


def test_layer_maps_of_the_pkd_paper():
    """BERT of 12 layers -> 6: skip matches layers 2, 4, 6, 8, 10, last matches 7 to 11 (counted from 1)."""
    assert [j + 1 for _, j in layer_pairs("skip", 6, 12)] == [2, 4, 6, 8, 10]
    assert [j + 1 for _, j in layer_pairs("last", 6, 12)] == [7, 8, 9, 10, 11]
    with pytest.raises(UserError, match="choose uniform"):
        layer_pairs("last", 1, 12)
    with pytest.raises(UserError, match="has 4 layers to match, its teacher only 3"):
        layer_pairs("uniform", 4, 3)


def bert(width: int = 16, layers: int = 4, heads: int = 4) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=50,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=8,
    )
    return BertForSequenceClassification(config).eval()


IDS = torch.randint(5, 50, (3, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]])


def parts(matching: Method, student, teacher) -> dict[str, float]:
    """The values of the terms for one batch, with features recorded by hooks."""
    recorders = [FeatureHooks(student, matching.features), FeatureHooks(teacher, matching.teacher_features)]
    outputs = []
    for model, recorder in zip((student, teacher), recorders, strict=True):
        logits = model(input_ids=IDS, attention_mask=MASK).logits
        outputs.append(Outputs(logits=logits, features=recorder.take(), mask=MASK))
    return {name: value.item() for name, value in Objective(**matching.terms)(*outputs, None).items()}


def test_hidden_states_equal_their_definition():
    student, teacher = bert(layers=2), bert()
    found = parts(hidden_states(student, teacher, 3.0, "both", pooling="cls"), student, teacher)
    states, targets = (m(IDS, MASK, output_hidden_states=True).hidden_states for m in (student, teacher))
    for i, j in ((0, 1), (1, 3)):
        pair = states[i + 1], targets[j + 1], MASK
        expected = feature_l2(*pair) + feature_cosine(*pair)
        assert found[f"hidden_{i}"] == pytest.approx(3 / 2 * expected.item(), rel=1e-5)
    a, b = states[2][:, 0], targets[4][:, 0]
    assert found["hidden_pooled"] == pytest.approx(3 * (feature_l2(a, b) + feature_cosine(a, b)).item(), rel=1e-5)


def test_layers_of_another_width_have_a_regressor_each():
    student, teacher = bert(8, 2, 4), bert()
    matching = hidden_states(student, teacher, 1.0, "both", pooling="cls")
    assert list(matching.terms) == ["hidden_0", "hidden_1"]
    shapes = [tuple(p.shape) for p in Objective(**matching.terms).parameters()]
    assert shapes == [(16, 8), (16,)] * 2


def test_embeddings_and_attentions_equal_their_definitions():
    student, teacher = bert(8, 2, 2), bert()
    found = parts(attentions(student, teacher, 2.0, "uniform"), student, teacher)
    for i, j in ((0, 1), (1, 3)):
        projected = []
        for model, layer in ((student, i), (teacher, j)):
            state = model(IDS, MASK, output_hidden_states=True).hidden_states[layer]
            attention = model.bert.encoder.layer[layer].attention.self
            projected += [attention.query(state), attention.key(state)]
        assert found[f"attention_{i}"] == pytest.approx(attention_kl(*projected, 4, MASK).item(), rel=1e-4)
    same = bert()
    expected = feature_l2(same.bert.embeddings(IDS), teacher.bert.embeddings(IDS), MASK).item()
    assert parts(embeddings(same, teacher, 1.0, "l2"), same, teacher)["embeddings"] == pytest.approx(expected)


def test_a_distilbert_matches_a_bert():
    teacher = bert()
    config = DistilBertConfig(vocab_size=50, dim=16, hidden_dim=8, n_layers=2, n_heads=2)
    student = DistilBertForSequenceClassification(config).eval()
    matching = hidden_states(student, teacher, 1.0) + embeddings(student, teacher, 1.0, "cosine")
    matching += attentions(student, teacher, 1.0, "skip")
    found = parts(matching, student, teacher)
    assert found.keys() == {"hidden_0", "hidden_1", "embeddings", "attention_0"}
    assert all(value > 0 for value in found.values())
    assert parts(hidden_states(teacher, teacher, 1.0), teacher, teacher) == pytest.approx(dict.fromkeys(
        [f"hidden_{i}" for i in range(4)], 0.0), abs=1e-6)  # fmt: skip


# ---- the script ----


def test_a_live_and_a_cached_teacher_give_the_same_losses(small, teachers, tmp_path, monkeypatch):
    """The losses are equal up to the fp16 of cached hidden states. The student loads in a pipeline."""
    words = ["--teacher", teachers[0], "--no_control", "--max_steps", 3, "--logging_strategy", "steps"]
    words += ["--logging_steps", 1, "--hidden_weight", 1, "--embedding_weight", 0.5, "--precision", "fp32"]
    distill(small, *words, "--output_dir", tmp_path / "cached")
    monkeypatch.setattr(teacher_outputs, "FEATURE_BYTES", 0)
    distill(small, *words, "--output_dir", tmp_path / "live")
    logs = []
    for name in ("cached", "live"):
        history = json.loads((tmp_path / name / "stages" / "student" / "stage.json").read_text())["history"]
        logs.append([entry for entry in history if "loss" in entry])
        assert {"loss_task", "loss_soft_targets", "loss_hidden_0", "loss_hidden_pooled"} <= logs[-1][0].keys()
    for cached, live in zip(*logs, strict=True):
        assert cached["loss"] == pytest.approx(live["loss"], rel=2e-3)
    found = pipeline("text-classification", model=str(tmp_path / "live" / "student"))("wake me at seven")
    assert found[0]["label"] in AutoModelForSequenceClassification.from_pretrained(teachers[0]).config.label2id


def test_text_pairs_reach_the_teacher_with_token_types(tmp_path):
    """A DistilBERT takes no token types, but its BERT teacher does."""
    rows = datasets.Dataset.from_dict(
        {
            "sentence1": [f"the {w} is red" for w in ("cat", "dog", "hat", "car")] * 6,
            "sentence2": [f"a {w} has a color" for w in ("cat", "dog", "tree", "star")] * 6,
            "label": ["yes", "yes", "no", "no"] * 6,
        }
    )
    folder = tmp_path / "pairs"
    for split in ("train", "validation"):
        rows.to_parquet(folder / f"{split}.parquet")
    data = load_text_data(str(folder))
    made = tiny_bert(data)
    texts = Texts.of(data, made.tokenizer)
    size = len(made.tokenizer)
    student = DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=size, dim=32, hidden_dim=16, n_layers=2, n_heads=2)
    )
    assert texts.unused_inputs(student) == ["token_type_ids"] and texts.unused_inputs(made.model) == []
    for name, model in (("bert", made.model), ("distil", student)):
        model.save_pretrained(tmp_path / name)
        made.tokenizer.save_pretrained(tmp_path / name)
    words = ["--teacher", tmp_path / "bert", "--no_control", "--max_steps", 2, "--attention_weight", 1]
    base = DistilBertForSequenceClassification.from_pretrained(tmp_path / "distil").distilbert
    base.save_pretrained(tmp_path / "base")
    made.tokenizer.save_pretrained(tmp_path / "base")
    recorded = []
    original = BertModel.forward

    @functools.wraps(original)
    def recording(self, *args, **kwargs):
        recorded.append(kwargs.get("token_type_ids"))
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BertModel, "forward", recording)
        distill(folder, *words, "--student", tmp_path / "base", "--output_dir", tmp_path / "run")
    assert recorded and all(types is not None and int(types.max()) == 1 for types in recorded)


def test_labels_in_another_order_are_matched_by_name_and_a_teacher_at_chance_is_reported(
    small, teachers, tmp_path, capsys
):
    """A teacher with its outputs in another order has the same accuracy and gives the same student."""
    model = AutoModelForSequenceClassification.from_pretrained(teachers[0])
    tokenizer = AutoTokenizer.from_pretrained(teachers[0])
    size = model.config.num_labels
    order = torch.arange(size).flip(0)
    with torch.no_grad():
        model.classifier.weight.copy_(model.classifier.weight[order])
        model.classifier.bias.copy_(model.classifier.bias[order])
    names = [model.config.id2label[int(i)] for i in order]
    model.config.id2label, model.config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    reversed_outputs = saved(tmp_path / "reversed", model, tokenizer)
    found = []
    for name, folder in (("original", teachers[0]), ("reversed", reversed_outputs)):
        words = ["--teacher", folder, "--no_control", "--max_steps", 1, "--output_dir", tmp_path / f"run_{name}"]
        distill(small, *words)
        found.append(results(tmp_path / f"run_{name}"))
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run_reversed" / "student")
    assert [student.config.id2label[i] for i in range(size)] == names
    assert "class ids follow" in found[1]["data_notes"] and "class ids" not in found[0]["data_notes"]
    for role in ("teacher", "student"):
        metrics = [one["models"][role]["metrics"]["validation"]["accuracy"] for one in found]
        assert metrics[0] == pytest.approx(metrics[1])
    for one in found:  # random weights
        [warning] = one["warnings"]
        assert "is no better than chance: its validation accuracy is" in warning
    assert capsys.readouterr().err.count("warning: teacher ") == 2


def test_an_ensemble_is_evaluated_by_its_mean_logits(small, teachers, tmp_path):
    words = ["--teacher", teachers[0], "--ensemble_teachers", teachers[1], "--ensemble_weights", 3, 1]
    distill(small, *words, "--no_control", "--max_steps", 1, "--output_dir", tmp_path / "run")
    found = results(tmp_path / "run")["models"]["teacher"]
    data = load_text_data(str(small))
    logits = []
    for folder in teachers:
        model, tokenizer = (
            AutoModelForSequenceClassification.from_pretrained(folder),
            AutoTokenizer.from_pretrained(folder),
        )
        texts = Texts.of(data, tokenizer)
        logits.append(predict(model, texts.splits["validation"], texts.collate))
    expected = data.scores.metrics(
        0.75 * logits[0] + 0.25 * logits[1], np.asarray(texts.splits["validation"]["labels"])
    )
    assert {name: found["metrics"]["validation"][name] for name in expected} == pytest.approx(expected)
    assert expected != data.scores.metrics(logits[0], np.asarray(texts.splits["validation"]["labels"]))
    assert found["parameters"] == 2 * model.num_parameters()


@pytest.mark.parametrize("source", ["teacher", "pretrained"])
def test_a_student_is_cut_from_the_trained_or_from_the_pretrained_teacher(small, tmp_path, source):
    """With a learning rate too small for fp32, the student keeps its initial weights."""
    words = ["--student_from", source, "--max_steps", 2, "--from_scratch_learning_rate", 1e-2, "--no_control"]
    distill(small, *words, "--student_learning_rate", 1e-50, "--output_dir", tmp_path)
    student = load_file(tmp_path / "student" / "model.safetensors")
    teacher = load_file(tmp_path / "stages" / "teacher" / "model.safetensors")
    name = "bert.encoder.layer.{}.output.dense.weight"
    assert torch.equal(student[name.format(1)], teacher[name.format(3)]) == (source == "teacher")


def loaded(folder: Path, small: Path, **pair: Any) -> tuple[Inputs, PairArguments, KDTrainingArguments]:
    training = KDTrainingArguments(output_dir=str(folder), learning_rate=1e-4, report_to="none")
    arguments = PairArguments(align_epochs=0, student_layers=2, **pair)
    data = load_text_data(str(small))
    return load_inputs(TextArguments(dataset=str(small)), arguments, training, data), arguments, training


def test_a_control_with_control_init_starts_from_that_model(small, teachers, tmp_path, monkeypatch):
    """The control has the learning rate of that model, and a head that depends only on the seed."""
    monkeypatch.setattr(training_steps, "fine_tune", lambda run, name, model, *_, **arguments: (model, arguments))
    heads = []
    for drawn in range(2):
        inputs, pair, training = loaded(
            tmp_path / str(drawn), small, teacher=str(teachers[0]), control_init="tiny-bert"
        )
        torch.rand(drawn)
        run: Any = SimpleNamespace(args=training)
        control, arguments = training_steps.train_control(run, inputs, pair, 1.0)
        assert (
            arguments["learning_rate"]
            == pair.from_scratch_learning_rate
            != learning_rate_of(inputs.teacher, pair, training)
        )
        heads.append(control.classifier.weight)
    assert torch.equal(*heads)


def test_another_seed_changes_random_heads_but_not_pretrained_weights(small, teachers, tmp_path):
    inputs, pair, training = loaded(tmp_path, small, teacher=str(teachers[0]), control_init="tiny-bert")
    other = inputs_of_seed(inputs, TextArguments(dataset=str(small)), pair, training, training.seed + 1)
    first, second = (found.control_init.model.classifier.weight for found in (inputs, other))
    assert not torch.equal(first, second)
    first, second = (found.teacher.model.classifier.weight for found in (inputs, other))
    assert torch.equal(first, second)
    assert inputs_of_seed(inputs, TextArguments(dataset=str(small)), pair, training, training.seed) is inputs


def test_label_smoothing_with_and_without_a_teacher(tmp_path):
    args = KDTrainingArguments(output_dir=str(tmp_path), alpha=0.3, label_smoothing_factor=0.2)
    data = TextData("three", {}, ["a", "b", "c"], False, "accuracy", "")
    outputs, labels = Outputs(logits=torch.randn(4, 3)), torch.tensor([0, 2, 1, 0])
    expected = torch.nn.functional.cross_entropy(outputs.logits, labels, label_smoothing=0.2).item()
    for method, alpha in ((labels_and_logits, 0.3), (labels_only, 1.0)):
        parts = method(data, args).objective(outputs, outputs, labels)
        assert parts["task"].item() == pytest.approx(alpha * expected)


def test_teacher_outputs_are_computed_again_if_any_token_changes(small, teachers, tmp_path):
    args = SimpleNamespace(precision="fp32")
    run: Any = SimpleNamespace(args=args, shared=None, folder=tmp_path, timed=lambda name: nullcontext())
    model = AutoModelForSequenceClassification.from_pretrained(teachers[0])
    texts = Texts.of(load_text_data(str(small)), AutoTokenizer.from_pretrained(teachers[0]))
    ids = texts.train["input_ids"][:]
    other = [*ids[:-1], [*ids[-1][:-1], ids[-1][0]]]
    changed = texts.train.remove_columns("input_ids").add_column("input_ids", other)
    for rows, number in ((texts.train, 1), (texts.train, 1), (changed, 2)):
        cached_outputs(run, model, replace(texts, splits=texts.splits | {"train": rows}))
        assert len(list((tmp_path / "teacher_outputs").iterdir())) == number


# ---- invalid input ----


def saved(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hidden_weight", "-1"], "--hidden_weight must be at least 0"),
        (["--layer_map", "skip", "--student_layers", "1", "--hidden_weight", "1"], "choose uniform"),
        (["--student", "{deep}", "--align_epochs", "1"], "has 5 layers to match, its teacher only 4"),
        (
            ["--teacher", "{shared}", "--align_epochs", "1"],
            "their outputs cannot be matched: pass --align_epochs 0",
        ),
        (["--max_length", "4"], "--max_length must be at least 8"),
        (["--max_length", "513"], "takes at most 512 tokens"),
        (["--load_best_model_at_end"], "needs --metric_for_best_model"),
        (["--label_smoothing_factor", "0.1", "--method", "dist"], "leave --label_smoothing_factor at 0"),
        (["--ensemble_teachers", "{untrained}"], "is not a trained classifier"),
        (["--ensemble_teachers", "{teacher}", "--attention_weight", "1"], "a single teacher"),
        (["--ensemble_weights", "1"], "pass --ensemble_teachers"),
        (["--ensemble_teachers", "{teacher}", "--ensemble_weights", "1"], "needs 2 weights"),
        (["--ensemble_teachers", "{teacher}", "--ensemble_weights", "1", "0"], "--ensemble_weights"),
        (["--student_from", "pretrained", "--teacher", "{teacher}"], "--student_from pretrained"),
        (["--teacher", "bert-base-uncased", "--max_steps", "5"], "cannot be reached"),
        (["--student", "distilbert-base-uncased", "--max_steps", "5"], "cannot be reached"),
    ],
)
def test_invalid_arguments_give_one_line(capsys, small, teachers, tmp_path, words, message):
    tokenizer = AutoTokenizer.from_pretrained(teachers[0])
    shape: dict[str, Any] = {"vocab_size": 50, "hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8}
    models = {
        "untrained": BertModel(BertConfig(num_hidden_layers=1, **shape)),
        "deep": BertModel(BertConfig(num_hidden_layers=5, **shape)),
        "shared": AlbertModel(AlbertConfig(num_hidden_layers=4, embedding_size=8, **shape)),
    }
    folders = {name: saved(tmp_path / name, model, tokenizer) for name, model in models.items()}
    words = [word.format(teacher=teachers[1], **folders) for word in words]
    with pytest.raises(SystemExit) as stopped:
        distill(small, *words, "--no_control", "--output_dir", tmp_path / "run")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and error.startswith("error: ") and message in error
    assert not (tmp_path / "run").exists()


def test_a_control_init_that_does_not_fit_the_teacher(small, teachers, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(teachers[0])
    shape: dict[str, Any] = {"hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8}
    shallow = BertModel(BertConfig(vocab_size=50, num_hidden_layers=1, **shape))
    deep = BertModel(BertConfig(vocab_size=50, num_hidden_layers=2, **shape))
    other_tokenizer = BertTokenizer(vocab=vocabulary(["a few other words"]))
    for control_init, message in (
        (saved(tmp_path / "shallow", shallow, tokenizer), "has fewer layers"),
        (saved(tmp_path / "other", deep, other_tokenizer), "different vocabularies"),
        (teachers[1], "is trained already"),
    ):
        with pytest.raises(UserError, match=message):
            validate_arguments(
                *loaded(tmp_path / "run", small, teacher=str(teachers[0]), control_init=str(control_init))
            )
    assert not (tmp_path / "run").exists()


def test_the_maximum_number_of_positions_of_an_encoder():
    shape: dict[str, Any] = {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    assert max_positions(BertModel(BertConfig(max_position_embeddings=20, **shape))) == 20
    assert max_positions(RobertaModel(RobertaConfig(max_position_embeddings=20, **shape))) == 18
    assert max_positions(ModernBertModel(ModernBertConfig(pad_token_id=0, **shape))) == math.inf


@pytest.mark.parametrize("recipe", ["clinc", "sentiment"])
def test_recipes_set_their_flags(recipe):
    path = REPO / "NLP" / "scripts" / f"{recipe}.yaml"
    written = yaml.safe_load(path.read_text())
    instances = parse(TextArguments, PairArguments, MatchingArguments, KDTrainingArguments, argv=[str(path)])
    read = {name: value for instance in instances for name, value in vars(instance).items()}
    assert {name: read[name] for name in written} == {name: type(read[name])(v) for name, v in written.items()}
    assert (path.parent / f"distill_{recipe}.sh").exists()
