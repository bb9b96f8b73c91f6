"""A run resumes with the same data and teacher, and rejects changed ones."""

import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from stable_baselines3 import PPO
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from kd.common.training.run import Run
from kd.image_classification.data.loading import load_image_data
from kd.image_classification.teacher_model.classifier import new_classifier
from kd_testing.scripts import run_script

Changes = dict[str, Callable[[], None]]


def texts(folder: Path) -> tuple[str, list[object], Changes]:
    words = ["good", "fine", "nice", "bad", "poor", "sad"]
    rows = [{"text": f"{a} {b}", "label": str(i // 3)} for i, a in enumerate(words) for b in words]
    data, teacher = folder / "data", folder / "teacher"

    def write(rows: list[dict[str, str]]) -> None:
        datasets.Dataset.from_list(rows).to_parquet(data / "train.parquet")

    def save(factor: float, activation: str = "gelu", words: list[str] = words) -> None:
        torch.manual_seed(0)
        names: dict[int, str] = {0: "0", 1: "1"}
        shape = BertConfig(vocab_size=12, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                           intermediate_size=32, hidden_act=activation,
                           id2label=names, label2id={"0": 0, "1": 1})  # fmt: skip
        model = BertForSequenceClassification(shape)
        with torch.no_grad():
            model.bert.encoder.layer[0].output.dense.weight *= factor
        model.save_pretrained(teacher)
        vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
        BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(teacher)

    write(rows)
    save(1.0)
    script = ["NLP/scripts/distill_classifier.py", "--dataset", data, "--teacher", teacher]
    changes: Changes = {
        "data": lambda: write(rows[::-1]),
        "teacher": lambda: save(2.0),
        "teacher, in its configuration alone": lambda: save(1.0, activation="relu"),
        "teacher tokenizer": lambda: save(1.0, words=words[::-1]),
    }
    return str(script[0]), script[1:], changes


def images(folder: Path) -> tuple[str, list[object], Changes]:
    random = np.random.default_rng(0)
    for name in ("dark", "light"):
        (folder / "data" / "train" / name).mkdir(parents=True)
        for i in range(20):
            pixels = random.integers(0, 128, (8, 8, 3)) + 128 * (name == "light")
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "data" / "train" / name / f"{i:02}.png")

    def save(factor: float) -> None:
        torch.manual_seed(0)
        model = new_classifier("resnet8", load_image_data(str(folder / "data")).config)
        with torch.no_grad():
            next(model.parameters()).mul_(factor)
        model.save_pretrained(folder / "teacher")

    save(1.0)
    words = ["--dataset", folder / "data", "--teacher", folder / "teacher", "--student", "resnet8",
             "--per_device_train_batch_size", 8]  # fmt: skip
    swap = ["train/dark/03.png", "train/light/03.png"]

    def swapped() -> None:
        first, second = (folder / "data" / name for name in swap)
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)

    return (
        "image-classification/scripts/train_student.py",
        words,
        {"data": swapped, "teacher": lambda: save(2.0)},
    )


def policies(folder: Path) -> tuple[str, list[object], Changes]:
    model = PPO("MlpPolicy", "CartPole-v1", seed=0, device="cpu")

    def save(factor: float) -> None:
        with torch.no_grad():
            next(model.policy.parameters()).mul_(factor)
        model.save(folder / "teacher.zip")

    save(1.0)
    words = "--steps 64 --rounds 1 --updates 2 --episodes 2 --eval_episodes 2 --num_envs 2".split()
    return (
        "reinforcement-learning/scripts/distill_policy.py",
        [*words, "--teacher", folder / "teacher.zip"],
        {"teacher of CartPole-v1": lambda: save(2.0)},
    )


@pytest.mark.parametrize(
    ("domain", "changed"),
    [
        (texts, "data"),
        (texts, "teacher"),
        (texts, "teacher, in its configuration alone"),
        (texts, "teacher tokenizer"),
        (images, "data"),
        (images, "teacher"),
        (policies, "teacher of CartPole-v1"),
    ],
)
def test_a_run_resumes_only_with_unchanged_inputs(
    domain: Callable[[Path], tuple[str, list[object], Changes]],
    changed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script, words, changes = domain(tmp_path)
    words += ["--no_control", "--output_dir", tmp_path / "run"]
    if domain is not policies:
        words += ["--max_steps", 2, "--report_to", "none"]
    begun = Run.stage

    def killed(self: Run, name: str, *arguments: object, **more: object) -> object:
        if name == "student":
            raise KeyboardInterrupt
        return begun(self, name, *arguments, **more)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(Run, "stage", killed)
        run_script(script, *words)
    assert stopped.value.code == 130

    before = tmp_path / "before"
    for name in ("data", "teacher", "teacher.zip"):
        if (tmp_path / name).is_dir():
            shutil.copytree(tmp_path / name, before / name)
        elif (tmp_path / name).exists():
            before.mkdir()
            shutil.copy(tmp_path / name, before / name)
    changes[changed]()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_script(script, *words, "--resume_from_checkpoint")
    assert stopped.value.code == 2
    assert (
        f"cannot continue {tmp_path / 'run'}: {changed.partition(',')[0]} changed since the run began"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "run" / "student").exists()

    shutil.copytree(before, tmp_path, dirs_exist_ok=True)
    run_script(script, *words, "--resume_from_checkpoint")
    assert (tmp_path / "run" / "results.json").exists()
