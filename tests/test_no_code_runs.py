"""Files never cause imports, and pickles are never executed: code runs only if the command line names it."""

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig

from kd_testing.scripts import run_script

EXPORT = "common/export/__main__.py"
EVALUATE_IMAGES = "image-classification/scripts/evaluate.py"
PAYLOAD = "import pathlib\npathlib.Path({mark!r}).touch()\n"


class Evil:
    """A pickle that creates a folder when it is loaded unsafely."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path that exists once the module `evil`, which is importable, was imported. Prompts are answered by yes."""
    mark = tmp_path / "it_ran"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    (tmp_path / "evil.py").write_text(PAYLOAD.format(mark=str(mark)))
    return mark


def error_of(capsys: pytest.CaptureFixture[str], script: str, *arguments: object) -> str:
    with pytest.raises(SystemExit) as exit:
        run_script(script, *arguments)
    line = capsys.readouterr().err.splitlines()[-1]
    assert exit.value.code == 2 and line.startswith("error: ")
    return line


def model_folder(folder: Path, mark: Path, config: dict[str, Any], **files: dict[str, Any]) -> Path:
    """A model folder whose configurations name classes of a module in it."""
    folder.mkdir()
    (folder / "evil.py").write_text(PAYLOAD.format(mark=str(mark)))
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def auto_map(*names: str) -> dict[str, Any]:
    return {"auto_map": {name: "evil.Evil" for name in names}}


CUSTOM = {"model_type": "evil", "architectures": ["EvilForSequenceClassification"]} | auto_map(
    "AutoConfig", "AutoModel", "AutoModelForSequenceClassification", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"
)
TOKENIZER = {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
SMALL: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 8,
    "vocab_size": 9,
}


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("NLP/scripts/evaluate.py", ["MODEL", "--dataset", "intents"]),
        ("NLP/scripts/export.py", ["MODEL", "--dataset", "intents"]),
        ("NLP/scripts/distill_classifier.py", ["--teacher", "MODEL"]),
        ("NLP/scripts/distill_classifier.py", ["--student", "MODEL"]),
        ("NLP/scripts/distill_bottleneck.py", ["--teacher", "MODEL"]),
        ("NLP/scripts/distill_gpt.py", ["--teacher", "MODEL", "--dataset", "TEXTS"]),
        ("NLP/scripts/distill_translation.py", ["--teacher", "MODEL"]),
        ("NLP/scripts/search.py", ["--teacher", "MODEL"]),
        ("image-classification/scripts/train_student.py", ["--teacher", "MODEL"]),
        ("image-classification/scripts/train_bottleneck.py", ["--encoder", "MODEL"]),
        ("image-classification/scripts/evaluate.py", ["MODEL", "--dataset", "digits"]),
        (EXPORT, ["MODEL", "--domain", "NLP"]),
        (EXPORT, ["MODEL", "--domain", "image-classification"]),
    ],
)
@pytest.mark.parametrize("kind", ["model", "tokenizer"])
def test_code_in_a_model_folder_does_not_run(
    tmp_path: Path, mark: Path, capsys: pytest.CaptureFixture[str], script: str, words: list[str], kind: str
) -> None:
    config = CUSTOM if kind == "model" else BertConfig(**SMALL).to_dict()
    folder = model_folder(
        tmp_path / "model",
        mark,
        config,
        tokenizer_config=TOKENIZER,
        preprocessor_config=auto_map("AutoImageProcessor"),
    )
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "train.txt").write_text("one two three four five six seven eight\n" * 100)
    error_of(capsys, script, *({"MODEL": str(folder), "TEXTS": str(texts)}.get(word, word) for word in words))
    assert not mark.exists()


@pytest.mark.parametrize("domain", ["reinforcement-learning", "evil", "../evil", ["evil"]])
def test_export_imports_no_module_that_results_json_names(
    tmp_path: Path, mark: Path, capsys: pytest.CaptureFixture[str], domain: Any
) -> None:
    folder = tmp_path / "run"
    (folder / "student").mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({"domain": domain, "task": "evil:Evil-v0"}))
    line = error_of(capsys, EXPORT, folder)
    assert not mark.exists() and not (folder / "export").exists()
    if domain == "reinforcement-learning":
        assert "pass --task evil:Evil-v0 if you trust that module" in line


STRUCTURE: dict[str, Any] = {"heads": [], "width": 2, "channels": 2, "last": None, "stages": []}
REMOTE = STRUCTURE | {"config": {"model_type": "evil"} | auto_map("AutoConfig", "AutoModelForImageClassification")}


@pytest.mark.parametrize(
    ("architecture", "network"),
    [
        *(("timm:hf-hub:evil/evil", None), ("timm:local-dir:.", None), ("timm:evil", None), ("evil.Evil", None)),
        *(("evil:Evil", None), ("evil:Evil", STRUCTURE), ("timm:hf-hub:evil/evil", STRUCTURE)),
        *(("timm:local-dir:.", STRUCTURE), ("timm:test_vit:checkpoint_path=x", STRUCTURE)),
        ("transformers:evil", REMOTE),
    ],
)
def test_an_architecture_is_only_a_name(
    tmp_path: Path,
    mark: Path,
    capsys: pytest.CaptureFixture[str],
    architecture: str,
    network: dict[str, Any] | None,
) -> None:
    config = {"model_type": "image_classifier", "architecture": architecture, "image_size": 8, "network": network}
    folder = model_folder(tmp_path / "model", mark, config)
    for script, words in ((EXPORT, ["--domain", "image-classification"]), (EVALUATE_IMAGES, ["--dataset", "digits"])):
        error_of(capsys, script, folder, *words)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("script", "words", "config"),
    [
        ("NLP/scripts/evaluate.py", ["--dataset", "intents"], BertConfig(**SMALL).to_dict()),
        (
            EXPORT,
            ["--domain", "NLP"],
            BertConfig(**SMALL, architectures=["BertForMaskedLM"]).to_dict(),
        ),
        (
            EVALUATE_IMAGES,
            ["--dataset", "digits"],
            {"model_type": "image_classifier", "architecture": "resnet8x4", "image_size": 8},
        ),
    ],
)
def test_no_pickle_is_executed(
    tmp_path: Path,
    mark: Path,
    capsys: pytest.CaptureFixture[str],
    script: str,
    words: list[str],
    config: dict[str, Any],
) -> None:
    folder = model_folder(tmp_path / "model", mark, config)
    torch.save({"weight": Evil(mark)}, folder / "pytorch_model.bin")
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\nc\nd\n")
    error_of(capsys, script, folder, *words)
    assert not mark.exists()
    with pytest.raises(FileExistsError):  # the payload does run where a pickle is trusted
        mark.mkdir()
        pickle.loads(pickle.dumps(Evil(mark)))
