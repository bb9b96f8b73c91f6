"""`kd.common.distill`: any model and data, any method, and what it returns."""

import copy
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

import kd.common
from kd.common import Method, distill, losses
from kd.common.distillation.adapters import Rows
from kd.common.distillation.task import Task
from kd.common.objective import FeatureTerm, logit_term, soft_targets, task_loss
from kd.common.outputs import Outputs
from kd.common.training.trainer_run import TrainerRun
from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json

QUICK: dict[str, Any] = {"num_train_epochs": 1, "per_device_train_batch_size": 32}


def net(width: int = 8, outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, outputs))


def table(rows: int = 60, seed: int = 0) -> TensorDataset:
    """Three classes of six features."""
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x[:, :3].argmax(1))


def knowing() -> nn.Module:
    """A teacher that knows the labels of `table`."""
    model = nn.Linear(6, 3)
    with torch.no_grad():
        model.weight.copy_(4 * torch.eye(3, 6))
        model.bias.zero_()
    return model


def images(rows: int = 24) -> TensorDataset:
    return TensorDataset(torch.randn(rows, 3, 8, 8), torch.arange(rows) % 3)


class ConvNet(nn.Module):
    def __init__(self, width: int, stride: int = 1) -> None:
        super().__init__()
        self.stage = nn.Conv2d(3, width, 3, padding=1, stride=stride)
        self.head = nn.Linear(width, 3)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.stage(pixels).relu().mean((2, 3)))}


class Digits(Dataset[tuple[Tensor, int]]):
    """As torchvision's datasets: (input, label) rows and `targets`. It counts how many rows are read."""

    def __init__(self) -> None:
        self.data, labels = table().tensors
        self.targets, self.read = labels.tolist(), 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.read += 1
        return self.data[index], self.targets[index]


def texts(rows: int = 24) -> list[dict[str, Any]]:
    """Token ids of several lengths. The label is that of the first token."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for row in range(rows):
        ids = torch.randint(5, 40, (3 + row % 5,), generator=generator).tolist()
        columns = {"input_ids": ids, "attention_mask": [1] * len(ids), "token_type_ids": [0] * len(ids)}
        found.append({"text": "left out", **columns, "label": ids[0] % 2})
    return found


def bert(layers: int = 1) -> BertForSequenceClassification:  # of two classes, as is transformers' default
    config = BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=layers
    )
    return BertForSequenceClassification(config)


def distilbert(width: int = 16) -> DistilBertForSequenceClassification:
    config = DistilBertConfig(vocab_size=40, dim=width, hidden_dim=16, n_heads=2, n_layers=1)
    return DistilBertForSequenceClassification(config)


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


# ---- data ----


def test_the_defaults_need_nothing_and_print_nothing(capfd: pytest.CaptureFixture[str]):
    result = distill(knowing(), net(), table(400), table(100, seed=1))
    assert capfd.readouterr() == ("", "")
    assert result.metrics.keys() == {"teacher", "control", "student"}
    assert {"accuracy", "agreement", "ece"} <= result.metrics["student"]["validation"].keys()
    assert result.metrics["student"]["validation"]["agreement"] > result.metrics["control"]["validation"]["agreement"]
    assert result.verdict is not None and result.verdict["control"]["word"].endswith("(one seed)")
    assert not result.student.training and result.control is not None and not result.control.training
    assert "student  Sequential" in repr(result) and "Verdict" in repr(result)
    assert "| student | Sequential |" in result._repr_markdown_()


def test_a_tenth_of_the_labels_validates_if_nothing_else_does():
    result = distill(net(), net(), table(60), **QUICK)
    assert result.results["data"]["train"] == 54 and result.results["data"]["validation"] == 6
    assert "6 of 60 training rows were set aside" in repr(result)


def test_labels_of_torchvision_are_read_without_the_images():
    digits = Digits()
    rows = list(range(0, 60, 2))
    result = distill(net(), net(), Subset(digits, rows), Subset(digits, range(1, 60, 2)), **QUICK)
    assert digits.read < 3 * 30 + 4 * 30 + 20  # two epochs, three evaluations, and probes
    assert result.results["task"] == "Digits"


@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list], ids=["list", "datasets"])
def test_rows_are_dictionaries_of_several_lengths_and_models_take_other_columns(kind: Any):
    result = distill(bert(), distilbert, kind(texts()), kind(texts(8)), **QUICK)
    assert isinstance(result.student, DistilBertForSequenceClassification)
    assert result.results["models"]["teacher"]["name"] == "BertForSequenceClassification"


def test_padding_does_not_change_the_metrics():
    teacher, rows = bert().eval(), texts()
    result = distill(teacher, distilbert(), rows, rows, precision="fp32", **QUICK)
    names = ("input_ids", "attention_mask", "token_type_ids")
    with torch.no_grad():
        alone = [teacher(**{name: torch.tensor([row[name]]) for name in names}).logits.argmax().item() for row in rows]
    accuracy = sum(row["label"] == found for row, found in zip(rows, alone, strict=True)) / len(rows)
    assert result.metrics["teacher"]["validation"]["accuracy"] == pytest.approx(accuracy)


def test_a_single_column_fits_any_argument_name():
    x, labels = images().tensors
    rows = [{"image": image, "label": label} for image, label in zip(x.double().numpy(), labels, strict=True)]
    assert distill(ConvNet(4), ConvNet(2), rows, **QUICK).student is not None


@pytest.mark.parametrize("inputs", [table().tensors[0], TensorDataset(table().tensors[0])], ids=["tensor", "tuples"])
def test_without_labels_the_student_learns_from_soft_targets_alone(inputs: Any):
    result = distill(knowing(), net(), inputs, num_train_epochs=20, learning_rate=1e-2, per_device_train_batch_size=10)
    assert result.control is None and result.verdict is None
    assert result.metrics["student"]["train"].keys() == {"agreement"}
    assert result.metrics["student"]["train"]["agreement"] > 0.7
    assert "verdict" not in repr(result).lower()


def test_unlabelled_training_data_with_labelled_validation_data():
    result = distill(net(16), net(), table().tensors[0], table(40, seed=1), **QUICK)
    assert result.control is None and "accuracy" in result.metrics["student"]["validation"]
    assert result.verdict is not None and result.verdict["control"] is None


HIDDEN: dict[str, Any] = {
    "None": lambda x, y: [{"input": a, "label": None if i % 4 else int(y[i])} for i, a in enumerate(x)],
    "NaN": lambda x, y: [(a, float("nan") if i % 4 else float(y[i])) for i, a in enumerate(x)],
    "-1": lambda x, y: TensorDataset(x, torch.where(torch.arange(len(y)) % 4 == 0, y, -1)),
    "null": lambda x, y: datasets.Dataset.from_dict(
        {"input": x.tolist(), "label": [None if i % 4 else b for i, b in enumerate(y.tolist())]}
    ).with_format("torch"),
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_rows_without_a_label_train_the_student_and_count_in_no_metric(kind: str):
    """The control is that of the labelled rows alone after as many updates; the student learns from all rows."""
    x, y = table(200).tensors
    validation = HIDDEN[kind](*table(40, seed=1).tensors)
    options: dict[str, Any] = {"num_train_epochs": 2, "per_device_train_batch_size": 50, "learning_rate": 0.02}
    torch.manual_seed(0)
    student = net()
    result = distill(knowing(), student, HIDDEN[kind](x, y), validation, **options)
    assert result.control is not None and result.verdict is not None
    assert result.notes[0].startswith("150 of 200 rows of train have no label and train the student")
    assert result.notes[1] == "30 of 40 rows of validation have no label and are left out."
    known = TensorDataset(x[::4], y[::4])
    alone = distill(knowing(), student, known, table(40, seed=1), **options | {"num_train_epochs": 8})
    assert alone.control is not None and same(result.control, alone.control), "as many updates on the same rows"
    assert not same(result.student, alone.student)
    inputs, targets = (tensor[::4] for tensor in table(40, seed=1).tensors)
    right = (result.student(inputs).argmax(1) == targets).float().mean().item()
    assert result.metrics["student"]["validation"]["accuracy"] == pytest.approx(right)
    soft = options | {"method": "kd:alpha=0", "control": False}
    first = distill(knowing(), student, table(200), table(40, seed=1), **soft)
    second = distill(knowing(), student, HIDDEN[kind](x, y), validation, **soft)
    assert same(first.student, second.student), "soft targets apply to all rows"


def test_missing_scores_missing_sets_of_labels_and_no_label_at_all():
    x, y = table(60).tensors
    scores = TensorDataset(x, torch.where(torch.arange(60) % 3 == 0, torch.nan, x[:, 0]))
    found = distill(nn.Linear(6, 1), net(8, 1), scores, **QUICK)
    assert found.control is not None and found.results["data"]["validation"] == 4
    sets = nn.functional.one_hot(y, 3).float()
    rows = [(a, None if i % 3 == 0 else b.tolist()) for i, (a, b) in enumerate(zip(x, sets, strict=True))]
    found = distill(knowing(), net(), rows, **QUICK)
    assert (
        found.results["primary_metric"]["name"] == "f1_micro"
        and "20 of 56 rows of train have no label" in found.notes[1]
    )
    assert distill(knowing(), net(), [(a, -1) for a in x], **QUICK).control is None
    with pytest.raises(UserError, match='every training row, and some have none: pass method="kd"'):
        distill(knowing(), net(), HIDDEN["-1"](x, y), method="dkd", **QUICK)
    with pytest.raises(UserError, match="-1 and 1, and -1 means that there is no label: use 0 and 1"):
        distill(net(8, 2), net(8, 2), TensorDataset(x, torch.where(x[:, 0] > 0, 1, -1)), **QUICK)


def test_regression():
    x = torch.randn(80, 6)
    data = TensorDataset(x, x.sum(1) + 1)
    result = distill(net(16, 1), net(8, 1), data, num_train_epochs=30, learning_rate=1e-2)
    assert result.results["primary_metric"]["name"] == "spearman"
    assert {"pearson", "mse"} < result.metrics["student"]["validation"].keys()
    assert distill(net(16, 1), net(8, 1), data, method="rkd", features={"0": "0"}, **QUICK).student is not None
    with pytest.raises(UserError, match="dkd"):
        distill(net(16, 1), net(8, 1), data, method="dkd")


def test_several_labels_per_row():
    x = torch.randn(120, 6)
    data = TensorDataset(x, (x[:, :3] > 0).float())
    result = distill(knowing(), net(8), data, num_train_epochs=20, learning_rate=2e-2, per_device_train_batch_size=8)
    assert result.results["primary_metric"]["name"] == "f1_micro" and result.verdict is not None
    metrics = result.metrics["student"]["validation"]
    assert metrics["f1_micro"] > 0.9 and metrics["map"] > 0.9 and {"agreement", "nll"} < metrics.keys()
    assert distill(net(16), net(), data, method="rkd", features={"0": "0"}, **QUICK).student is not None
    with pytest.raises(UserError, match="dkd"):
        distill(knowing(), net(8), data, method="dkd")
    with pytest.raises(UserError, match="use 0 or 1 for each of them"):
        distill(knowing(), net(8), TensorDataset(x, x[:, :3]))


# ---- students and seeds ----


def test_the_same_seed_gives_the_same_result():
    teacher = net(16)
    first, second = (distill(teacher, net, table(), **QUICK) for _ in range(2))
    assert same(first.student, second.student) and first.metrics == second.metrics
    other = distill(teacher, net, table(), seeds=[1], **QUICK)
    assert not same(first.student, other.student)


def test_several_seeds_of_a_module_share_its_weights_and_of_a_function_do_not(tmp_path: Path):
    teacher, student = net(16), net()
    before = copy.deepcopy(student)
    still = {"learning_rate": 1e-9, "seeds": (0, 1), **QUICK}
    shared = distill(teacher, student, table(), output_dir=tmp_path / "module", **still)
    distill(teacher, net, table(), output_dir=tmp_path / "function", **still)
    assert same(student, before) and "share the student's initial weights" in repr(shared)
    assert shared.results["seeds"] == [0, 1] and shared.verdict is not None
    weights = {}
    for kind in ("module", "function"):
        found = [net(), net()]
        for seed, model in enumerate(found):
            load_model(model, tmp_path / kind / f"seed{seed}" / "student" / "model.safetensors")
        weights[kind] = [model[0].weight for model in found]  # type: ignore[index]
    torch.testing.assert_close(*weights["module"], rtol=0, atol=1e-5)
    assert (weights["function"][0] - weights["function"][1]).abs().max() > 0.1


def test_the_teacher_stays_as_it_was():
    teacher = nn.Sequential(net(16), nn.Dropout(0.5))
    teacher.train()
    teacher[1].eval()
    teacher[0][0].weight.requires_grad_(False)
    before = copy.deepcopy(teacher.state_dict())
    distill(teacher, net(), table(), features={"0": "0.0"}, **QUICK)
    assert teacher.training and not teacher[1].training
    assert [p.requires_grad for p in teacher.parameters()] == [False, True, True, True]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(module._forward_hooks or "forward" in vars(module) for module in teacher.modules())


def test_one_model_can_be_teacher_and_student():
    teacher = net()
    before = copy.deepcopy(teacher)
    result = distill(teacher, teacher, table(), seeds=(0, 1), learning_rate=1e-2, **QUICK)
    distill(teacher, lambda: teacher, table(), learning_rate=1e-2, **QUICK)
    assert same(teacher, before) and not same(result.student, before)


def test_the_teacher_stays_as_it_was_after_an_interrupt(monkeypatch: pytest.MonkeyPatch):
    teacher = net(16)
    monkeypatch.setattr(kd.common.KDTrainer, "training_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        distill(teacher, net(), table(), features={"0": "0"}, control=False, **QUICK)
    assert teacher.training and all(p.requires_grad for p in teacher.parameters())
    assert not any(module._forward_hooks for module in teacher.modules())


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_tied_weights_are_saved_once(tmp_path: Path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(3, 6), nn.Linear(6, 3, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x)

    result = distill(net(16), Tied(), table(), output_dir=tmp_path / "run", **QUICK)
    result.save(tmp_path / "student")
    loaded = Tied()
    load_model(loaded, tmp_path / "student" / "model.safetensors")
    assert same(loaded, result.student) and loaded.head.weight is loaded.embed.weight


@pytest.mark.parametrize("kind", ["module", "transformers"])
def test_a_saved_student_gives_the_same_logits(tmp_path: Path, kind: str):
    if kind == "module":
        result = distill(net(16), net(), table(), seeds=(0, 1), **QUICK)
        result.save(tmp_path / "student")
        loaded: nn.Module = net().eval()
        load_model(loaded, tmp_path / "student" / "model.safetensors")
        inputs = {"input": table().tensors[0]}
    else:
        result = distill(bert(), distilbert(), texts(), texts(8), **QUICK)
        result.save(tmp_path / "student")
        loaded = DistilBertForSequenceClassification.from_pretrained(tmp_path / "student").eval()
        inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    with torch.no_grad():
        outputs = [model(**inputs) for model in (result.student, loaded)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)
    assert read_json(tmp_path / "student" / "results.json") == result.results
    card = (tmp_path / "student" / "README.md").read_text()
    assert "## Load it" in card and ("weights are those of seed 0" in card) == (kind == "module")


def test_a_finished_run_is_read_again_and_an_unfinished_one_continued(tmp_path: Path, monkeypatch: Any):
    teacher, student = net(16), net()
    settings = {"seeds": (0, 1), "output_dir": tmp_path / "run", **QUICK}
    expected = distill(teacher, student, table(), **(settings | {"output_dir": tmp_path / "other"}))
    train = TrainerRun.train
    stages: list[str] = []

    def killed_in_third_stage(self: TrainerRun, name: str, *args: Any, **kwargs: Any) -> Any:
        if len(stages) == 3:
            raise KeyboardInterrupt
        stages.append(name)
        return train(self, name, *args, **kwargs)

    monkeypatch.setattr(TrainerRun, "train", killed_in_third_stage)
    with pytest.raises(KeyboardInterrupt):
        distill(teacher, student, table(), **settings)
    stages.clear()
    resumed = distill(teacher, student, table(), resume_from_checkpoint=True, **settings)
    assert stages == ["student"] and same(resumed.student, expected.student) and resumed.metrics == expected.metrics
    stages.clear()
    again = distill(teacher, student, table(), resume_from_checkpoint=True, **settings)
    assert not stages and same(again.student, expected.student)
    for changed in ({"method": "dkd"}, {"features": {"0": "0"}}, {"teacher": net(16)}, {"student": net()}):
        arguments = {"teacher": teacher, "student": student, "train": table(), **settings, **changed}
        with pytest.raises(UserError, match="cannot continue"):
            distill(resume_from_checkpoint=True, **arguments)


def test_an_interrupted_training_continues_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    teacher, student = net(16), net()
    settings = {"features": {"0": "0"}, "control": False, "learning_rate": 1e-2, **QUICK, "num_train_epochs": 4}
    expected = distill(teacher, student, table(), output_dir=tmp_path / "other", **settings)
    step, steps = kd.common.KDTrainer.training_step, []

    def interrupted_in_sixth_step(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        steps.append(self.state.global_step)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(kd.common.KDTrainer, "training_step", interrupted_in_sixth_step)
    settings["output_dir"] = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        distill(teacher, student, table(), **settings)
    resumed = distill(teacher, student, table(), resume_from_checkpoint=True, **settings)
    assert steps == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7]
    assert same(resumed.student, expected.student) and resumed.metrics == expected.metrics


def test_the_best_checkpoint_by_validation_can_be_kept(tmp_path: Path):
    best: dict[str, Any] = {
        "eval_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "accuracy",
    }
    folder = tmp_path / "run"
    distill(net(16), net(), table(), control=False, output_dir=folder, **best, **(QUICK | {"num_train_epochs": 2}))
    assert sum("eval_accuracy" in log for log in history(folder)) == 2


# ---- methods ----


@pytest.mark.parametrize("method", ["dkd:beta=2:warmup=0", "dist", "mlkd", "ctkd"])
def test_methods_of_logits(method: str):
    result = distill(net(16), net(), table(), method=method, control=False, **QUICK)
    assert result.results["method"] == method and result.control is None


@pytest.mark.parametrize("method", ["rkd", "sp", "pkt", "cc:width=4", "wkd"])
def test_methods_that_compare_features(method: str):
    assert distill(net(16), net(), table(), method=method, features={"0": "0"}, control=False, **QUICK).student
    with pytest.raises(UserError, match="compares features"):
        distill(net(16), net(), table(), method=method)


@pytest.mark.parametrize(("width", "stride"), [(4, 1), (2, 1), (4, 2)], ids=["equal", "widths", "sizes"])
def test_matched_maps_become_similar(tmp_path: Path, width: int, stride: int):
    result = distill(
        ConvNet(4),
        ConvNet(width, stride),
        images(),
        features={"stage": "stage"},
        feature_weight=10.0,
        control=False,
        output_dir=tmp_path / "run",
        num_train_epochs=30,
        learning_rate=1e-2,
    )
    losses_by_epoch = [log["loss_features_stage"] for log in history(tmp_path / "run") if "loss" in log]
    assert losses_by_epoch[-1] < 0.8 * losses_by_epoch[0]
    assert sum(p.numel() for p in result.student.parameters()) == sum(p.numel() for p in ConvNet(width).parameters())


def history(folder: Path) -> list[dict[str, float]]:
    found: list[dict[str, float]] = read_json(folder / "stages" / "student" / "stage.json")["history"]
    return found


@pytest.mark.parametrize("width", [16, 8])
def test_matched_hidden_states_without_the_padding(width: int):
    features = {"distilbert.transformer.layer.0": "bert.encoder.layer.1", "pre_classifier": "bert.pooler.dense"}
    result = distill(bert(2), distilbert(width), texts(), texts(8), features=features, **QUICK)
    assert result.results["method"] == "kd"


def test_a_student_that_reads_other_tokens_than_its_teacher():
    """A decoder as the student of an encoder: each model gets its own tokens, with its own padding."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
    }
    teacher = BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=3, pad_token_id=3, **shape))
    student = GPT2ForSequenceClassification(
        GPT2Config(vocab_size=90, n_embd=8, n_layer=1, n_head=1, num_labels=3, pad_token_id=50, bos_token_id=50,
                   eos_token_id=50)
    )  # fmt: skip
    rows = []
    for number in range(12):
        ids, own = [5 + number, 7, 9][: 2 + number % 2], [60 + number] * (1 + number % 4)
        rows.append({
            "input_ids": own, "attention_mask": [1] * len(own), "labels": number % 3,
            "teacher_input_ids": ids, "teacher_attention_mask": [1] * len(ids),
        })  # fmt: skip
    task = Task(teacher, student, {"train": Rows(rows)}, "kd", {}, 1.0)
    batch = task.collate([Rows(rows)[i] for i in range(4)])
    assert batch["input_ids"][0].tolist() == [60, 50, 50, 50] and batch["teacher_input_ids"][0].tolist() == [5, 7, 3]
    with torch.no_grad():
        expected = teacher.eval()(batch["teacher_input_ids"], batch["teacher_attention_mask"]).logits
        torch.testing.assert_close(task.teacher(**batch).logits, expected)
        expected = student.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        torch.testing.assert_close(task.new_student().eval()(**batch).logits, expected)
    result = distill(teacher, student, rows, rows, num_train_epochs=1, precision="fp32")
    assert isinstance(result.student, GPT2ForSequenceClassification) and result.control is not None
    with pytest.raises(UserError, match="read other tokens, so only logits are compared"):
        distill(teacher, student, rows, method="rkd", features={"transformer.h.0": "bert.encoder.layer.0"})


def test_a_method_object():
    hidden = FeatureTerm("hidden", "hidden", losses.feature_l2, projector=nn.Linear(8, 16))
    method = Method(
        {"task": (1.0, task_loss()), "soft": (1.0, soft_targets(2.0)), "hidden": (1.0, hidden)},
        {"hidden": "0"},
        {"hidden": "0"},
    )
    before = copy.deepcopy(hidden.state_dict())
    result = distill(net(16), net(), table(), method=method, seeds=(0, 1), **QUICK)
    assert result.results["method"] == "task + soft + hidden"
    assert all(torch.equal(value, before[name]) for name, value in hidden.state_dict().items())


def test_models_may_return_outputs_and_features():
    class Named(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.hidden, self.head = nn.Linear(6, width), nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Outputs:
            hidden = self.hidden(x)
            return Outputs(logits=self.head(hidden), features={"hidden": hidden})

    term = FeatureTerm("hidden", "hidden", losses.feature_l2)
    method = Method({"task": (1.0, task_loss()), "hidden": (1.0, term)})
    assert distill(Named(8), Named(8), table(), method=method, **QUICK).student is not None


def test_a_student_with_the_knowledge_of_its_teacher_beats_the_control():
    """The teacher knows the probabilities, of which each of the few labels is one sample."""
    torch.manual_seed(3)
    teacher = nn.Linear(6, 3)
    nn.init.normal_(teacher.weight, std=1.0)

    def sampled(rows: int, seed: int) -> TensorDataset:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, 6, generator=generator)
        labels = torch.multinomial(teacher(x).softmax(1).detach(), 1, generator=generator)
        return TensorDataset(x, labels.flatten())

    settings = {"num_train_epochs": 40, "learning_rate": 1e-2, "per_device_train_batch_size": 20}
    result = distill(
        teacher, lambda: net(16), sampled(40, 1), sampled(2000, 2), "kd:alpha=0:temperature=1", (0, 1, 2), **settings
    )
    assert result.results["gain_over_control"] > 0.03
    assert result.verdict is not None and result.verdict["control"]["word"] == "better"


# ---- errors ----


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(table())


def pictures() -> list[tuple[Any, int]]:
    return [(Image.new("RGB", (8, 8)), number % 3) for number in range(30)]


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "other number of logits": ({"student": net(outputs=2)}, "student returns 2 logits and the teacher 3"),
    "PIL images": ({"train": pictures()}, "holds Image, not tensors: convert it in the dataset"),
    "iterable data": ({"train": Stream()}, "needs a length and rows"),
    "a loader": ({"train": DataLoader(table())}, "needs a length and rows"),
    "no rows": ({"train": []}, "is empty"),
    "a tuple of arrays": ({"train": table().tensors}, "or TensorDataset"),
    "too few rows": ({"train": table(3)}, "too few"),
    "labels of text": (
        {"train": [{"x": torch.zeros(6), "label": "cat"}] * 20},
        "must be one number, or floats .*, got 'cat'",
    ),
    "too many classes": ({"train": TensorDataset(torch.zeros(40, 6), torch.arange(40) % 4)}, "use 0 to 2"),
    "float labels": ({"train": TensorDataset(torch.zeros(40, 6), torch.ones(40))}, "labels are float32"),
    "unlabelled validation": ({"validation": table().tensors[0]}, "validation data have no labels"),
    "other columns": ({"train": [{"a": 1.0, "b": 2.0, "label": 0}] * 20}, "takes input, and the rows have a, b"),
    "images of several sizes": (
        {"train": [(torch.zeros(3, 8, size), 0) for size in (8, 9)] * 20}, "have shapes"),
    "no logits": ({"teacher": nn.LSTM(6, 3)}, r"LSTM must return logits \(batch, classes\), got tuple"),
    "no module": ({"student": lambda: 3}, "must be a torch.nn.Module, got int"),
    "unknown method": ({"method": "dkk"}, "there is no method 'dkk'.*did you mean"),
    "unknown argument of a method": ({"method": "dkd:betta=2"}, "did you mean beta"),
    "a wrong path": ({"features": {"9": "0"}}, "has no submodule 9: choose paths of its named_modules"),
    "features of two kinds": (
        {"teacher": ConvNet(4), "student": ConvNet(4), "train": images(), "features": {"stage": "head"}},
        "cannot match"),
    "a method without its features": ({"method": "rkd"}, "compares features"),
    "labels that a method needs": ({"train": table().tensors[0], "method": "dkd"}, "needs labels"),
    "unknown training argument": ({"num_epochs": 3}, "no argument 'num_epochs'; did you mean"),
    "invalid training argument": ({"learning_rate": -1.0}, "learning_rate"),
    "argument of kd": ({"temperature": 2.0}, "kd:temperature=2"),
    "a seed in the singular": ({"seed": 1}, "pass seeds="),
    "no seeds": ({"seeds": []}, "at least one seed"),
}  # fmt: skip


@pytest.mark.parametrize(("changed", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_name_what_is_wrong(changed: dict[str, Any], message: str):
    arguments: dict[str, Any] = {"teacher": net(16), "student": net(), "train": table()}
    with pytest.raises(UserError, match=message) as error:
        distill(**(arguments | changed))
    assert "\n" not in str(error.value)


def test_public_names_of_the_core():
    assert {"distill", "KDTrainer", "Objective", "Method", "losses", "DiscreteKeyValueBottleneck"} <= set(
        dir(kd.common)
    )
    assert kd.common.losses is losses and kd.common.Objective(task=(1.0, logit_term(losses.soft_target_kl)))
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        kd.common.__getattr__("distil")
