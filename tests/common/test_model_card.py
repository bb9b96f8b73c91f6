"""Model cards: metadata that the parser of the Hub accepts, no local paths, and names that contain markup."""

import os
import shlex
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import EvalResult, ModelCard
from markdown_it import MarkdownIt

from kd.common.data.sources import KnownDatasets, hub_dataset
from kd.common.reporting.model_card import Card, model_card, with_seeds
from kd.common.reporting.origins import is_hub_name, licence_of
from kd.common.reporting.tables import code, escaped, fenced, markdown
from kd_testing.results import model, results

NASTY = "a|b `c` <d> [e](f)\n# _g_ *h* {i}: &amp; 'j' ~~k~~ - \"l\" %m"


def metadata(text: str) -> Any:
    """The metadata of a card, as huggingface_hub reads them."""
    return ModelCard(text).data


def parsed(**card: Any) -> Any:
    return metadata(model_card(results(), Card("load()", **card)))


def shown(text: str) -> list[str]:
    """The text of each heading, paragraph and cell that a Markdown parser finds, without markup."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    inline = (token for token in tokens if token.type == "inline")
    return ["".join(part.content for part in token.children or []) for token in inline]


def test_the_hub_reads_the_metadata() -> None:
    found = parsed(
        library_name="transformers",
        pipeline_tag="text-classification",
        dataset="clinc/clinc_oos:plus",
        origins=["distilbert-base-uncased", "owner/teacher"],
    )
    assert (found.library_name, found.pipeline_tag) == ("transformers", "text-classification")
    assert found.base_model == ["distilbert-base-uncased", "owner/teacher"] and found.datasets == ["clinc/clinc_oos"]
    assert found.tags == ["knowledge-distillation"] and found.metrics == ["accuracy", "f1"]
    assert found.license is None
    place = ("text-classification", "clinc/clinc_oos", "clinc150")
    assert found.eval_results == [
        EvalResult(*place, metric, value, dataset_config="plus", dataset_split=split, metric_name=name)
        for split, metric, name, value in (
            ("validation", "accuracy", "accuracy", 0.81),
            ("validation", "f1", "F1", pytest.approx(0.8)),
            ("test", "accuracy", "accuracy", pytest.approx(0.79)),
        )
    ]


def test_a_run_on_own_data_from_scratch_names_nothing_of_the_hub() -> None:
    found = parsed()
    assert found.base_model is None and found.datasets is None and found.license is None
    assert {result.dataset_type for result in found.eval_results} == {"clinc150"}


def test_names_with_markup_are_shown_and_parsed_as_they_are() -> None:
    run = results(task=NASTY, method=NASTY)
    run["models"]["student"]["name"] = run["models"]["teacher"]["name"] = NASTY
    run["command"] = ["python", "x.py", "--name", "```\n# heading"]
    text = model_card(run, Card('print("```")', pipeline_tag="other"))
    name = " ".join(NASTY.split())
    assert metadata(text).model_name == f"{name} {name}" and metadata(text).eval_results[0].dataset_name == name
    title, first, *others = shown(text.split("\n---\n")[1])
    assert title == f"{name}: {name}"
    assert first.startswith(f"{name}, a student of 1,234,567 parameters for {name}, distilled from the teacher {name}")
    assert others.count(name) == 2  # cells of the table of models
    assert "````\npython x.py --name '```\n# heading'\n````" in text and '````python\nprint("```")\n````' in text


def test_markdown_of_names() -> None:
    assert escaped("resnet8x4_kd, 12 layers") == "resnet8x4_kd, 12 layers"  # no escapes without need
    assert escaped("*a* <b> [c](d) _e_ f|g &lt; [0.1, 0.2]") == r"\*a\* \<b> [c\](d) \_e\_ f\|g \&lt; [0.1, 0.2]"
    assert code("a") == "`a`" and code("a `b`") == "`` a `b` ``"
    assert fenced("```\nx", "python") == "````python\n```\nx\n````"
    assert markdown(["a|b"], [["c\nd"]]) == "| a\\|b |\n| --- |\n| c d |"


def test_no_local_path_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    teacher = tmp_path / "my teachers" / "big"
    for folder in (teacher, tmp_path / "runs" / "out"):
        folder.mkdir(parents=True)
    run = results()
    run["models"]["teacher"]["name"] = f"{teacher} + bert-base"
    run["models"]["student"]["name"] = f"{teacher}, soft targets"
    script = "/home/me/project/NLP/scripts/distill.py"
    run["command"] = [
        "python", script, "NLP/scripts/clinc.yaml", "--teacher", str(teacher), f"--dataset={tmp_path}/data.csv",
        "--output_dir", "runs/out", "--student", "owner/model", "--alpha", "0.5",
    ]  # fmt: skip
    text = model_card(run, Card("load()", origins=[str(teacher)]))
    assert str(tmp_path) not in text and "/home" not in text and "runs/" not in text
    command = next(line for line in text.splitlines() if line.startswith("python "))
    assert shlex.split(command) == [
        "python", "NLP/scripts/distill.py", "NLP/scripts/clinc.yaml", "--teacher", "big", "--dataset=data.csv",
        "--output_dir", "out", "--student", "owner/model", "--alpha", "0.5",
    ]  # fmt: skip
    assert "from the teacher `big + bert-base`" in text and "`big, soft targets`, a student" in text
    assert metadata(text).base_model is None


def write_card(folder: Path, front: str) -> str:
    folder.mkdir()
    (folder / "README.md").write_text(f"---\n{front}\n---\n\n# A model\n")
    return str(folder)


def test_the_licence_is_that_of_all_models_or_none(tmp_path: Path) -> None:
    apache = write_card(tmp_path / "apache", "license: apache-2.0")
    other = write_card(tmp_path / "other", "license: other\nlicense_name: mine\nlicense_link: LICENSE")
    unknown = write_card(tmp_path / "none", "tags: [x]")
    damaged = write_card(tmp_path / "damaged", "license: [")
    (tmp_path / "none" / "config.json").write_text('{"license": "mit"}')
    (tmp_path / "apache" / "model.zip").touch()
    assert licence_of(apache) == licence_of(f"{apache}/model.zip") == {"license": "apache-2.0"}
    assert licence_of(other) == {"license": "other", "license_name": "mine", "license_link": "LICENSE"}
    assert licence_of(unknown) == {"license": "mit"} and licence_of(damaged) == {}
    assert licence_of("owner/not-cached") == {}
    assert parsed(origins=[other]).license_name == "mine" and parsed(origins=[apache, apache]).license == "apache-2.0"
    for origins in ([apache, other], [apache, damaged], [damaged], []):
        assert parsed(origins=origins).license is None
    assert parsed(origins=["timm/x"], licence="cc-by-nc-4.0").license == "cc-by-nc-4.0"


def test_the_names_and_licences_of_all_models_are_kept(tmp_path: Path) -> None:
    """Those of the student's initial weights and of the teacher; a folder names the models that it is based on."""
    student = write_card(tmp_path / "student", "license: mit\nbase_model: owner/small")
    teacher = write_card(tmp_path / "teacher", "license: apache-2.0\nbase_model: [owner/large, ../x, owner/small]")
    text = model_card(results(), Card("load()", origins=[student, teacher, "owner/other"]))
    assert metadata(text).base_model == ["owner/small", "owner/large", "owner/other"]
    assert metadata(text).license is None and str(tmp_path) not in text
    lines = text.split("## Pretrained models\n\n")[1].split("\n\n")[0].splitlines()
    assert lines == [
        "- `student`: mit",
        "- `teacher`: apache-2.0",
        "- `owner/other`: no licence is stated",
        "- Their licences differ or are not known, so this card states none for the student.",
    ]
    same = model_card(results(), Card("load()", origins=[student]))
    assert metadata(same).license == "mit" and "- `student`: mit\n\n" in same
    other = write_card(tmp_path / "named", "license: other\nlicense_name: mine\nlicense_link: LICENSE")
    assert "- `named`: other, mine, LICENSE" in model_card(results(), Card("load()", origins=[other]))
    assert "Pretrained models" not in model_card(results(), Card("load()"))


def test_the_licence_of_a_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_card(tmp_path / "hub", "license: mit")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: os.path.join(folder, file))
    assert parsed(origins=["bert-base-uncased"]).license == "mit"


def test_hub_names_are_no_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert is_hub_name("owner/other") and is_hub_name("bert-base-uncased")
    assert not any(map(is_hub_name, ("owner/name", "/owner/other", "a/b/c", "../x", "")))
    known: KnownDatasets = {"sst2": "nyu-mll/glue:sst2", "digits": dict}
    assert hub_dataset("sst2", known) == "nyu-mll/glue:sst2" and hub_dataset("owner/data:a", known) == "owner/data:a"
    assert not any(hub_dataset(name, known) for name in ("digits", "owner/name", "file.csv"))


def test_the_card_holds_the_results_and_their_limits() -> None:
    card = model_card(results(student=0.75), Card("load('tiny')"))
    assert "```python\nload('tiny')\n```" in card and "1,234,567" in card and "distill.py" in card
    assert "The code needs" not in card
    assert "The code needs `kd`" in model_card(results(), Card("from kd.nlp import x"))
    assert "It does not reach the validation accuracy of its teacher: 0.7500 against 0.9000." in card
    assert "The control, which was trained without the teacher, is as good or better" in card
    assert "the effect of the teacher is not known" in model_card(results(control=None), Card(""))


def test_metrics_that_the_hub_does_not_know_are_in_the_tables_alone() -> None:
    run = results()
    run["models"]["student"] = model("tiny", 0.8, 10, 1.0)
    run["models"]["student"]["metrics"]["test"] |= {"return_mean": 3.0, "return_ci95": [2.0, 4.0], "episodes": 5}
    text = model_card(run, Card(""))
    found = [(result.metric_type, result.metric_name) for result in metadata(text).eval_results]
    assert found[-1] == ("mean_reward", "mean return") and len(found) == 4
    assert "| test | episodes |" in text


def test_the_card_of_several_seeds_holds_their_scores() -> None:
    first = results(0)
    merged = results(0) | {"seeds": [0, 1]}
    merged["standard_deviations"] = {"models": {"student": {"validation": {"accuracy": 0.01}}}}
    del merged["seed"]
    text = with_seeds(model_card(first, Card("")), first, merged)
    assert "one run, seed 0" not in text
    assert "over the seeds 0, 1: teacher 0.9000, control 0.7800, student 0.8100 ± 0.0100." in text
    assert "The weights are those of seed 0." in text
    named = metadata(model_card(merged, Card(""))).eval_results[0].metric_name
    assert named == "accuracy, mean over 2 seeds"
