"""Distillation of masked language models: layers, the objective, and the script on a few texts."""

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
    pipeline,
)

from kd.common.methods import Method
from kd.common.outputs import Outputs
from kd.common.utils.tasks import IGNORED
from kd.nlp.data.masking import MaskedRows, Masking, fixed_masks, token_rows
from kd.nlp.scripts.distill_mlm import Arguments, MaskedTrainingArguments
from kd.nlp.student_model.layers import alternating_layers, cut_layers, layer_paths
from kd.nlp.student_model.masked_language_model import MaskedLanguageTask, token_soft_targets
from kd.nlp.teacher_model.generative import byte_level_bpe
from kd.nlp.teacher_model.masked import random_bert
from kd_testing.evaluations import check_evaluation
from kd_testing.readmes import run_readme
from kd_testing.scripts import recipe_of, run_script
from kd_testing.verdicts import check_verdict

SCRIPT = "NLP/scripts/distill_mlm.py"
TINY = (
    "--teacher_layers 3 --teacher_width 32 --block_size 16 --vocabulary_size 300 "
    "--num_train_epochs 2 --report_to none --precision fp32 --per_device_train_batch_size 8"
).split()


@pytest.fixture(scope="session")
def texts(tmp_path_factory, sentences) -> Path:
    """A folder with a few short texts."""
    folder = tmp_path_factory.mktemp("data") / "few_texts"
    for split, chosen in (("train", sentences[:96]), ("validation", sentences[96:128]), ("test", sentences[128:160])):
        datasets.Dataset.from_dict({"text": chosen}).to_parquet(folder / f"{split}.parquet")
    return folder


# ---- layers ----


@pytest.mark.parametrize(
    ("kept", "layers", "chosen"),
    [(6, 12, [0, 2, 4, 7, 9, 11]), (2, 4, [0, 3]), (3, 6, [0, 2, 5]), (1, 4, [0]), (4, 4, [0, 1, 2, 3])],
)
def test_kept_layers_are_those_of_distilbert(kept, layers, chosen):
    assert alternating_layers(kept, layers) == chosen


def test_a_cut_has_the_layers_embeddings_and_head_of_the_teacher():
    teacher = random_bert(50, 0, layers=12, width=32, positions=8, dropout=0.0).eval()
    student = cut_layers(teacher, 6, alternating_layers(6, 12))
    for new, old in enumerate([0, 2, 4, 7, 9, 11]):
        paths = layer_paths(student)[new], layer_paths(teacher)[old]
        weights, expected = student.get_submodule(paths[0]).state_dict(), teacher.get_submodule(paths[1]).state_dict()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert torch.equal(student.cls.predictions.transform.dense.weight, teacher.cls.predictions.transform.dense.weight)
    assert student.cls.predictions.decoder.weight is student.get_input_embeddings().weight


# ---- objective ----


def distilbert_loss(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], mask: Tensor, labels: Tensor, restrict: bool
) -> Tensor:
    """The loss of distiller.py of DistilBERT, with its weights 5, 2 and 1 and its temperature 2."""
    (logits, hidden), (teacher_logits, teacher_hidden) = student, teacher
    kept = labels > -1 if restrict else mask.bool()
    kl = nn.KLDivLoss(reduction="batchmean")
    loss_ce = kl(F.log_softmax(logits[kept] / 2, dim=-1), F.softmax(teacher_logits[kept] / 2, dim=-1)) * 2**2
    loss_mlm = nn.CrossEntropyLoss(ignore_index=-100)(logits.flatten(0, 1), labels.flatten())
    selected, selected_teacher = hidden[mask.bool()], teacher_hidden[mask.bool()]
    loss_cos = nn.CosineEmbeddingLoss(reduction="mean")(selected, selected_teacher, torch.ones(len(selected)))
    return 5 * loss_ce + 2 * loss_mlm + loss_cos


@pytest.fixture
def task(tokenizer):
    def build(**arguments: Any) -> MaskedLanguageTask:
        args = Arguments(teacher_width=32, student_layers=1, **arguments)
        return MaskedLanguageTask(args, None, tokenizer, {}, None, None)

    return build


@pytest.mark.parametrize("positions", ["all", "masked"])
def test_the_objective_has_the_gradient_of_distilberts_loss(task, positions, sentences, tokenizer, tmp_path):
    training = MaskedTrainingArguments(output_dir=str(tmp_path), report_to="none")
    teacher = random_bert(len(tokenizer), 0, layers=2, width=32, positions=16, dropout=0.0).eval()
    student = cut_layers(teacher, 1, [0]).eval()
    masking = Masking(tokenizer, 0.3)
    rows = MaskedRows(token_rows(sentences[:6], tokenizer, 16, False, False), masking, 0)
    batch = masking.collate([rows[i] for i in range(6)])
    assert not batch["attention_mask"].all()
    inputs = batch["input_ids"], batch["attention_mask"]
    outputs, expected_outputs = {}, {}
    for role, model in (("student", student), ("teacher", teacher)):
        found = model(*inputs, output_hidden_states=True)
        expected_outputs[role] = found.logits, found.hidden_states[-1]
        path = layer_paths(model)[-1]
        outputs[role] = Outputs(found.logits, {path: found.hidden_states[-1]}, batch["attention_mask"])
    method: Method = task(soft_target_positions=positions).method(training, student, teacher)
    parts = method.objective(outputs["student"], outputs["teacher"], batch["labels"])
    assert set(parts) == {"task", "soft_targets", "cosine"}
    with torch.no_grad():
        teacher_outputs = expected_outputs["teacher"][0].detach(), expected_outputs["teacher"][1].detach()
    expected = distilbert_loss(
        expected_outputs["student"], teacher_outputs, batch["attention_mask"], batch["labels"], positions == "masked"
    )
    total = torch.stack(list(parts.values())).sum()
    torch.testing.assert_close(total, expected)
    weights = list(student.bert.parameters())
    found_gradients = torch.autograd.grad(total, weights, retain_graph=True, allow_unused=True)
    for one, other in zip(found_gradients, torch.autograd.grad(expected, weights, allow_unused=True), strict=True):
        torch.testing.assert_close(one, other)


def test_soft_targets_of_hand_computed_distributions():
    """Two tokens and one padding: KL((3/4, 1/4) || (1/2, 1/2)) and 0, times T^2, averaged over the two tokens."""
    student = Outputs(logits=torch.zeros(1, 3, 2), mask=torch.tensor([[1, 1, 0]]))
    teacher = Outputs(logits=2 * torch.tensor([[[3.0, 1.0], [1.0, 1.0], [9.0, 1.0]]]).log())
    kl = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    labels = torch.tensor([[0, IGNORED, IGNORED]])
    assert token_soft_targets(2.0, "all")(student, teacher, labels).item() == pytest.approx(4 * kl / 2)
    assert token_soft_targets(2.0, "masked")(student, teacher, labels).item() == pytest.approx(4 * kl)


def test_the_control_learns_the_masked_tokens_alone(task, tokenizer, tmp_path):
    training = MaskedTrainingArguments(output_dir=str(tmp_path), report_to="none")
    model = random_bert(len(tokenizer), 0, layers=1, width=32, positions=16, dropout=0.0)
    assert set(task().method(training, model, None).terms) == {"task"}
    assert set(task(alpha_cos=0.0).method(training, model, model).terms) == {"task", "soft_targets"}


# ---- the script ----


def distill(folder: Path, texts: Path, *words: object) -> dict:
    run_script(SCRIPT, recipe_of(*TINY), "--dataset", texts, "--output_dir", folder, *words)
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="session")
def finished(texts, tmp_path_factory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "mlm"
    distill(folder, texts, "--whole_words", "--teacher_epochs", 1)
    return folder


def test_evaluate_repeats_the_metrics_of_a_run(finished, tmp_path):
    check_evaluation(finished, tmp_path)


def test_a_run_is_complete_and_reports_the_masked_accuracy_of_the_saved_student(finished, texts):
    found = json.loads((finished / "results.json").read_text())
    check_verdict(found)
    assert found["primary_metric"] == {"split": "validation", "name": "masked_accuracy"}
    score = {role: model["metrics"]["validation"]["masked_accuracy"] for role, model in found["models"].items()}
    assert found["gain_over_control"] == pytest.approx(score["student"] - score["control"])
    assert found["sample"]["text"].count("[MASK]") == 1 and found["sample"]["student"].count(",") == 2
    tokenizer = AutoTokenizer.from_pretrained(finished / "student")
    model = AutoModelForMaskedLM.from_pretrained(finished / "student").eval()
    assert model.config.num_hidden_layers == 1
    for split in ("validation", "test"):
        sentences = datasets.load_dataset("parquet", data_files=str(texts / f"{split}.parquet"))["train"]["text"][:]
        rows = fixed_masks(token_rows(sentences, tokenizer, 16, False, True), Masking(tokenizer, 0.15, True))
        right = total = 0
        for row in rows:
            with torch.no_grad():
                predicted = model(row["input_ids"][None]).logits[0].argmax(-1)
            chosen = row["labels"] != IGNORED
            right, total = right + (predicted == row["labels"])[chosen].sum().item(), total + chosen.sum().item()
        assert found["models"]["student"]["metrics"][split]["masked_accuracy"] == pytest.approx(right / total)


def test_the_student_loads_with_transformers_alone_and_with_its_card(finished, capsys):
    student, stage = (AutoModelForMaskedLM.from_pretrained(finished / name) for name in ("student", "stages/student"))
    ids = torch.randint(5, 100, (2, 16))
    assert torch.equal(student.eval()(ids).logits, stage.eval()(ids).logits)
    guesses = pipeline("fill-mask", model=str(finished / "student"))("set an [MASK] for seven")
    assert len(guesses) == 5
    run_readme(finished / "student")
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_a_continued_run_gives_the_same_student(finished, texts, tmp_path):
    """The student continues from the checkpoint after its first epoch."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for name in ("student", "stages/student", "stages/control"):
        shutil.rmtree(run / name)
    (run / "results.json").unlink()
    interrupted = pytest.MonkeyPatch()

    class Killed(BaseException):
        pass

    def stop(self: MaskedRows, epoch: int) -> None:
        if epoch == 1 and (run / "stages" / "control").exists():
            raise Killed
        self.epoch.fill_(epoch)

    interrupted.setattr(MaskedRows, "set_epoch", stop)
    words = "--whole_words", "--teacher_epochs", 1, "--resume_from_checkpoint"
    with pytest.raises(Killed):
        distill(run, texts, *words)
    interrupted.undo()
    assert list((run / "checkpoints" / "student").iterdir())
    distill(run, texts, *words)
    expected, found = (load_file(path / "student" / "model.safetensors") for path in (finished, run))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_a_named_teacher_stays_as_it_is_and_a_student_of_another_width_is_distilled(finished, texts, tmp_path):
    teacher = finished / "stages" / "teacher"
    words = "--teacher", teacher, "--pack", "--no_control", "--soft_target_positions", "masked"
    found = distill(tmp_path / "run", texts, *words, "--student", "scratch", "--student_width", 64)
    assert not (tmp_path / "run" / "stages" / "teacher").exists()
    before = json.loads((finished / "results.json").read_text())["models"]["teacher"]
    assert found["models"]["teacher"]["parameters"] == before["parameters"]
    config = AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "student").config
    assert (config.hidden_size, config.num_hidden_layers) == (64, 1)
    weights = load_file(tmp_path / "run" / "student" / "model.safetensors")
    assert not [name for name in weights if "projector" in name or "regressor" in name]


@pytest.mark.slow
def test_a_named_student_of_another_architecture_learns_from_a_teacher_with_its_vocabulary(finished, texts, tmp_path):
    teacher = finished / "stages" / "teacher"
    AutoTokenizer.from_pretrained(teacher).save_pretrained(tmp_path / "distilbert")
    vocabulary = AutoModelForMaskedLM.from_pretrained(teacher).config.vocab_size
    config = DistilBertConfig(
        vocab_size=vocabulary, dim=32, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=16
    )
    DistilBertForMaskedLM(config).save_pretrained(tmp_path / "distilbert")
    words = "--teacher", teacher, "--student", tmp_path / "distilbert"
    found = distill(tmp_path / "run", texts, *words)
    assert found["models"]["student"]["name"] == "distilbert 1x32"
    weights = load_file(tmp_path / "run" / "student" / "model.safetensors")
    control = load_file(tmp_path / "run" / "stages" / "control" / "model.safetensors")
    assert weights.keys() == control.keys()
    run_readme(tmp_path / "run" / "student")


@pytest.mark.slow
def test_a_roberta_is_cut_and_distilled(texts, sentences, tmp_path):
    tokenizer = byte_level_bpe(sentences, 300, 16)
    tokenizer.add_special_tokens(
        {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>", "pad_token": "<pad>", "unk_token": "<unk>"}
    )
    tokenizer.save_pretrained(tmp_path / "roberta")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    padding = tokenizer.pad_token_id
    config = RobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=17 + padding, pad_token_id=padding, **sizes
    )
    RobertaForMaskedLM(config).save_pretrained(tmp_path / "roberta")
    words = "--teacher", tmp_path / "roberta", "--no_control"
    found = distill(tmp_path / "run", texts, *words)
    assert found["sample"]["text"].count("<mask>") == 1


def test_the_student_is_fine_tuned_and_distilled_on_a_task(finished, tmp_path):
    """By train_teacher.py, and by distill_classifier.py from that teacher."""
    flags = "--dataset intents --max_length 16 --max_train_samples 200 --max_eval_samples 60 --report_to none".split()
    flags += ["--precision", "fp32"]
    teacher, run = tmp_path / "teacher", tmp_path / "run"
    command = "NLP/scripts/train_teacher.py", "--teacher", finished / "student", "--seeds", 0, 1
    run_script(*command, *flags, "--num_train_epochs", 1, "--output_dir", teacher)
    found = json.loads((teacher / "results.json").read_text())
    assert found["models"]["student"] is None and found["models"]["teacher"]["metrics"]["validation"]["accuracy"] > 0
    assert found["seeds"] == [0, 1] and "shared_by_all_seeds" not in found
    before, after = (
        load_file(p / "model.safetensors") for p in (finished / "student", teacher / "seed0/stages/teacher")
    )
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(before[name], after[name]) and before[name].shape == after[name].shape
    command = "NLP/scripts/distill_classifier.py", "--teacher", teacher / "seed0/stages/teacher"
    command += "--student", finished / "student", "--num_train_epochs", 1, "--align_epochs", 0
    run_script(*command, *flags, "--output_dir", run)
    models = json.loads((run / "results.json").read_text())["models"]
    assert models["student"]["parameters"] == models["control"]["parameters"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--teacher", "CLASSIFIER"], "BertForSequenceClassification, without a head that predicts masked tokens"),
        (["--teacher", "ENCODER"], "as --teacher"),
        (["--teacher", "BERT", "--student", "CLASSIFIER"], "as --student"),
        (["--teacher", "BERT", "--student", "OTHER"], "different vocabularies"),
        (["--teacher", "BERT", "--block_size", "32"], "--block_size of at most 16"),
        (["--teacher", "BERT", "--student_layers", "4"], "cannot be cut from the teacher's 3"),
        (["--teacher", "nonsense"], "nonsense"),
        (["--teacher_epochs", "0"], "untrained"),
        (["--mask_share", "0.0001"], "no token of the validation split is masked"),
        (["--dataset", "intents", "--text_column", "body"], "--text_column"),
    ],
)
def test_invalid_arguments_give_one_line(capsys, texts, finished, tokenizer, tmp_path, words, message):
    teacher = finished / "stages" / "teacher"
    if "OTHER" in words:
        random_bert(len(tokenizer), 0, 1, 32, 16, 0.0).save_pretrained(tmp_path / "other")
        tokenizer.save_pretrained(tmp_path / "other")
    for place, kind in (("CLASSIFIER", BertForSequenceClassification), ("ENCODER", BertModel)):
        if place in words:
            kind(AutoModelForMaskedLM.from_pretrained(teacher).config).save_pretrained(tmp_path / place.lower())
            AutoTokenizer.from_pretrained(teacher).save_pretrained(tmp_path / place.lower())
    words = [str(tmp_path / w.lower()) if w in ("OTHER", "CLASSIFIER", "ENCODER") else w for w in words]
    words = [str(teacher) if word == "BERT" else word for word in words]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        distill(tmp_path / "run", texts, *words)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert message in error
    assert not (tmp_path / "run" / "results.json").exists()
