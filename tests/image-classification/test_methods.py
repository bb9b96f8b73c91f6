"""Properties of every method for image classifiers, and parsing of their arguments."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F

from kd.common.methods import arguments_of, check_methods_differ, fill_arguments, parse_method
from kd.common.objective import Scheduled
from kd.common.utils.errors import UserError
from kd.image_classification.student_model.methods import METHODS
from kd.image_classification.teacher_model.classifier import new_classifier
from kd_testing.image_pairs import Pair, copied, forward_both, noise
from kd_testing.paths import REPO

NAMES = sorted(METHODS)
WITH_WEIGHTS = {  # methods with auxiliary parameters
    *("cc", "crd", "ctkd", "fitnet", "norm", "ofd", "reviewkd", "semckd", "srrl", "vid"),
}


@copied
def new_pair(student: str = "resnet8", teacher: str = "resnet14x2", classes: int = 5) -> Pair:
    data = noise(classes=classes)
    return Pair(new_classifier(student, data.config), new_classifier(teacher, data.config), data)


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_student_and_auxiliary_parameters_but_not_the_teacher(name):
    pair = new_pair()
    pair.teacher.requires_grad_(False)
    before = copy.deepcopy(pair.teacher.state_dict())
    method = METHODS[name](pair.spec)
    method.objective.set_progress(0.5)
    student_outputs, teacher_outputs = forward_both(method, pair, pair.images)
    parts = method.objective(
        student_outputs, teacher_outputs, pair.data.splits["validation"].labels[: len(pair.images)]
    )
    sum(parts.values()).backward()
    assert pair.student.backbone.conv1.weight.grad.abs().sum() > 0
    extra = list(method.objective.parameters())
    assert bool(extra) == (name in WITH_WEIGHTS)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in extra), "or it would never learn"
    assert {id(p) for p in extra}.isdisjoint(id(p) for p in [*pair.student.parameters(), *pair.teacher.parameters()])
    assert all(torch.equal(value, before[key]) for key, value in pair.teacher.state_dict().items())
    assert set(pair.student.state_dict()) == set(new_classifier("resnet8", pair.data.config).state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_the_task_loss_is_the_cross_entropy_with_the_labels(name):
    pair = new_pair()
    method = METHODS[name](pair.spec)
    student_outputs, teacher_outputs = forward_both(method, pair, pair.images)
    labels = pair.data.splits["validation"].labels[: len(pair.images)]
    parts = method.objective(student_outputs, teacher_outputs, labels)
    weight = method.objective.current_weights()["task"]
    assert parts["task"].item() == pytest.approx(
        weight * F.cross_entropy(student_outputs.logits, labels).item(), rel=1e-5
    )


@pytest.mark.parametrize("name", NAMES)
def test_it_is_finite_with_confident_logits_and_in_bf16(name):
    pair = new_pair()
    method = METHODS[name](pair.spec)
    method.objective.set_progress(1.0)
    student_outputs, teacher_outputs = forward_both(method, pair, pair.images)
    for logits in (teacher_outputs, student_outputs):
        logits["logits"] = 200 * logits.logits
        logits["features"] = {key: value.bfloat16() for key, value in logits.features.items()}
    with torch.autocast("cpu", torch.bfloat16):
        parts = method.objective(
            student_outputs, teacher_outputs, pair.data.splits["validation"].labels[: len(pair.images)]
        )
    assert all(part.isfinite() and part.dtype == torch.float32 for part in parts.values()), parts
    sum(parts.values()).backward()
    assert all(p.grad.isfinite().all() for p in pair.student.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"srrl", "reviewkd"}))  # they normalize pooled features
def test_it_is_finite_in_a_batch_of_one(name):
    pair = new_pair()
    method = METHODS[name](pair.spec)
    student_outputs, teacher_outputs = forward_both(method, pair, pair.images[:1])
    parts = method.objective(student_outputs, teacher_outputs, torch.zeros(1, dtype=torch.long))
    sum(parts.values()).backward()
    assert all(part.isfinite() for part in parts.values()), parts
    assert all(p.grad.isfinite().all() for p in pair.student.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("classes", [1, 2])
def test_with_few_classes_it_is_finite_or_a_one_line_error(name, classes):
    pair = new_pair(classes=classes)
    needs = dict.fromkeys(("lskd", "mlkd_ls", "crd", "rld", "vrm"), 2) | dict.fromkeys(("dkd", "dkd_ls", "wkd"), 3)
    if classes < needs.get(name, 1):
        with pytest.raises(UserError, match=r"at least \d classes") as caught:
            METHODS[name](pair.spec)
        assert "\n" not in str(caught.value)
        return
    method = METHODS[name](pair.spec)
    student_outputs, teacher_outputs = forward_both(method, pair, pair.images)
    parts = method.objective(student_outputs, teacher_outputs, torch.arange(len(pair.images)) % classes)
    assert all(part.isfinite() for part in parts.values()), parts


@pytest.mark.parametrize("name", NAMES)
def test_its_parameters_and_buffers_are_checkpointed(name):
    """A new objective of the method continues from the state of the old one."""
    pair = new_pair()
    labels = pair.data.splits["validation"].labels[: len(pair.images)]
    method = METHODS[name](pair.spec)
    student_outputs, teacher_outputs = forward_both(method, pair, pair.images)
    method.objective(student_outputs, teacher_outputs, labels)  # updates batch norms and memories
    torch.manual_seed(1)
    other = METHODS[name](pair.spec)
    other.objective.load_state_dict(method.objective.state_dict())
    first, second = (m.objective.train()(student_outputs, teacher_outputs, labels) for m in (method, other))
    assert {key: value.item() for key, value in first.items()} == {key: value.item() for key, value in second.items()}


@pytest.mark.parametrize("name", NAMES)
def test_its_docstring_names_its_paper(name):
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|(CVPR|ICLR) 20\d\d", str(METHODS[name].__doc__))


def test_the_documents_count_and_list_all_methods():
    text = (REPO / "image-classification" / "README.md").read_text()
    assert all(f"SimKD{words} {len(METHODS)} other methods" in file for words, file in (
        (",", text), (" with all its projectors, and", (REPO / "README.md").read_text())
    ))  # fmt: skip
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    assert set(METHODS) <= {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def test_arguments_are_checked():
    assert list(arguments_of(METHODS["kd"])) == ["alpha", "temperature"]
    assert parse_method("kd:alpha=0.3:temperature=2", METHODS).keywords == {"alpha": 0.3, "temperature": 2.0}
    assert parse_method("kd:alpha=0.3", METHODS, alpha=0.9, temperature=1.5, other=1).keywords == {
        "alpha": 0.3,
        "temperature": 1.5,
    }
    assert parse_method("catkd:normalized=True", METHODS).keywords == {"normalized": True}
    for spec, message in (
        ("kdd", "did you mean kd?"),
        ("kd:alphas=1", "no argument 'alphas'; did you mean alpha?"),
        ("kd:alpha=much", "kd: alpha=much is invalid"),
        ("kd:alpha", "kd: alpha= is invalid"),
        ("dkd:warmup=2", "dkd: warmup must be between 0 and 1, got 2"),
        ("dist:temperature=0", "dist: temperature must be above 0, got 0"),
        ("norm:copies=0", "norm: copies must be at least 1, got 0"),
        ("sp:weight=-1", "sp: weight must be at least 0, got -1"),
        ("sp:weight=nan", "sp: weight must be .*, got nan"),
        ("pkt:weight=inf", "pkt: weight must be .*, got inf"),
        ("kd:alpha=7", "kd: alpha must be between 0 and 1, got 7"),
        ("kd:alpha=nan", "kd: alpha must be .*, got nan"),
        ("kd:temperature=inf", "kd: temperature must be above 0, got inf"),
        ("kd:temperature=1e999", "kd: temperature must be .*, got inf"),
        ("ctkd:alpha=-0.1", "ctkd: alpha must be .*, got -0.1"),
        ("ctkd:curriculum=0", "ctkd: curriculum must be above 0 and at most 1, got 0"),
        ("crd:momentum=1", "crd: momentum must be at least 0 and below 1, got 1"),
        ("crd:negatives=0", "crd: negatives must be .*, got 0"),
        ("semckd:batch=0", "semckd: batch must be .*, got 0"),
        ("catkd:size=2.5", "catkd: size=2.5 is invalid"),
        ("catkd:normalized=maybe", "catkd: normalized=maybe is invalid, pass a value such as normalized=true"),
        ("sp:weight=1_0", "sp: weight=1_0 is invalid"),
        ("dkd:beta=2:beta=3", "dkd: beta is set twice, to 2 and to 3: set it once"),
        ("mlkd:views=2", "mlkd has no argument 'views'"),
    ):
        with pytest.raises(UserError, match=message.replace("?", r"\?")) as caught:
            parse_method(spec, METHODS)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="kd: alpha must be .*, got nan"):  # as flags pass it
        parse_method("kd", METHODS, alpha=float("nan"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1"])
def test_no_argument_accepts_negative_or_non_finite_values(name, value):
    for argument in arguments_of(METHODS[name]):
        with pytest.raises(UserError, match=rf"method {name}: {argument}(={value}| must be .*, got {value})"):
            parse_method(f"{name}:{argument}={value}", METHODS)


def test_arguments_of_a_pair_fill_those_that_a_spec_does_not_set():
    published = ["dkd:beta=6", "dkd_ls:alpha=15:beta=30"]
    assert fill_arguments("dkd", published, METHODS) == "dkd:beta=6"
    assert fill_arguments("dkd:alpha=2", published, METHODS) == "dkd:beta=6:alpha=2"
    assert fill_arguments("dkd_ls:beta=1", published, METHODS) == "dkd_ls:alpha=15:beta=1"
    assert fill_arguments("kd", published, METHODS) == "kd"
    for wrong, message in (
        (["dkd:beta=6", "dkd:alpha=2"], "two entries for dkd"),
        (["dkdd:beta=6"], "no method 'dkdd'"),
        (["dkd:gamma=6"], "no argument 'gamma'"),
    ):
        with pytest.raises(UserError, match=message):
            fill_arguments("kd", wrong, METHODS)


def test_one_method_in_two_notations_is_an_error():
    def of(*specs):
        return [(spec, parse_method(spec, METHODS, alpha=0.1)) for spec in specs]

    check_methods_differ(of("kd", "kd:temperature=2", "lskd", "dkd:beta=2", "dkd:beta=3", "mlkd", "mlkd_ls"))
    for first, second in (
        ("dkd", "dkd:beta=8"),
        ("dkd:beta=2:alpha=3", "dkd:alpha=3.0:beta=2"),
        ("kd", "kd:alpha=0.1"),
        ("sp:weight=1e3", "sp:weight=1000"),
    ):
        with pytest.raises(UserError, match=f"{first} and {second} are the same method"):
            check_methods_differ(of(first, second))


def test_scheduled_terms_get_the_training_progress():
    for name in NAMES:
        objective = METHODS[name](new_pair().spec).objective
        objective.set_progress(0.25)
        assert all(term.progress == 0.25 for term in objective.terms.values() if isinstance(term, Scheduled))
