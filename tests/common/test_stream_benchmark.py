"""benchmarks/streams.py: forgetting, counted values in any order, one pass over the stream, and a short run."""

import json
import sys
from argparse import Namespace
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close
from transformers import BertModel, BertTokenizer

from kd.common.bottleneck.module import DiscreteKeyValueBottleneck
from kd.common.utils.errors import UserError
from kd.nlp.data.loading import load_text_data
from kd.nlp.teacher_model.teacher import tiny_bert
from kd_testing.paths import REPO
from kd_testing.scripts import run_script
from kd_testing.tiny import NARROW_BERT

SHORT = ["--kind", "images", "--dataset", "digits", "--images", 300, "--codebooks", 4, "--codebook_size", 16,
         "--key_dim", 6, "--groups", 5, "--orders", 2]  # fmt: skip


@pytest.fixture
def benchmark(monkeypatch):
    """The modules of the benchmark."""
    monkeypatch.syspath_prepend(REPO / "benchmarks")
    names = "heads", "stream_data", "stream_encoder", "stream_heads", "stream_keys", "stream_table", "streams"
    yield SimpleNamespace(**{name: import_module(name) for name in names})
    for name in (*names, "embeddings"):
        sys.modules.pop(name, None)


def order_of(benchmark, cache, **words):
    """An order of digits in four groups."""
    usual = {"kind": "images", "dataset": ["digits"], "images": 300, "groups": 4, "cache": str(cache), "codebooks": 4,
             "key_dim": 6, "tune_encoder": False, "domains": None, "without": [], "label_column": [],
             "encoder": None}  # fmt: skip
    return benchmark.streams.Order(Namespace(**{**usual, **words}), seed=1)


@pytest.fixture
def order(benchmark, tmp_path):
    return order_of(benchmark, tmp_path, without=["3"])


def test_forgetting_of_a_matrix(benchmark):
    matrix = [[0.9, 0.0, 0.0], [0.7, 0.8, 0.0], [0.4, 0.8, 1.0]]
    assert benchmark.stream_data.forgetting(matrix) == pytest.approx(((0.9 - 0.4) + 0.0) / 2)
    better_later = [[0.5, 0.0, 0.0], [0.6, 0.8, 0.0], [0.7, 0.5, 1.0]]  # a gain counts against the losses
    assert benchmark.stream_data.forgetting(better_later) == pytest.approx((-0.1 + 0.3) / 2)


def test_the_stream_has_every_row_once_group_after_group(order):
    stream = order.stream
    groups = list(stream.training_rows())
    rows = torch.cat(groups)
    assert len(rows) == len(stream.labels["train"]) and torch.equal(rows.sort().values, torch.arange(len(rows)))
    classes = [set(stream.labels["train"][group].tolist()) for group in groups]
    assert sorted(map(len, classes)) == [2, 2, 2, 3] and len(set.union(*classes)) == 9  # of 9 classes, without one


def test_with_domains_every_group_has_classes_of_each(benchmark, tmp_path):
    (tmp_path / "domains.json").write_text(json.dumps({"low": list("01234"), "high": list("56789")}))
    stream = order_of(benchmark, tmp_path, domains=str(tmp_path / "domains.json")).stream
    for group in stream.training_rows():
        assert set(stream.labels["train"][group].tolist()) == {0, 1}
    with pytest.raises(UserError, match="--groups must be between 2 and 5"):
        order_of(benchmark, tmp_path, domains=str(tmp_path / "domains.json"), groups=6)


def test_with_several_datasets_predictions_are_restricted_to_the_classes_of_each(benchmark, tmp_path):
    stream = order_of(benchmark, tmp_path, dataset=["digits", "digits"]).stream
    assert stream.classes == 20 and stream.groups == 2
    labels = stream.labels["test"]
    logits = torch.zeros(len(labels), 20)
    logits[:, 3], logits[:, 14] = 2, 1  # class 3 of the first dataset is the highest, then class 4 of the second
    assert torch.equal(stream.right(lambda rows: logits[rows], "test", 1), (labels == 3) | (labels == 14))
    assert stream.weights("test").sum() == pytest.approx(1)


def test_counted_values_do_not_depend_on_order_and_batches(benchmark, order):
    keys = benchmark.stream_keys.Keys(16)
    bottleneck, rows = order.prepare(keys)
    train, found = rows["train"], []
    in_order = torch.cat(list(order.stream.training_rows()))
    for chosen, size in ((in_order, len(train)), (in_order, 7), (torch.randperm(len(train)), 32)):
        head = benchmark.heads.Counted(bottleneck, order.stream.classes)
        for part in chosen.split(size):
            head.fit(train[part])
        found.append(head.bottleneck.values)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("selected", [1, 3])
@pytest.mark.parametrize("linear_decoder", [False, True])
def test_streamed_values_have_the_logits_of_the_bottleneck_and_change_where_selected(
    benchmark, selected, linear_decoder
):
    torch.manual_seed(0)
    decoder, value_dim = ("linear", benchmark.stream_heads.VALUE_DIM) if linear_decoder else ("mean", 5)
    bottleneck = DiscreteKeyValueBottleneck(8, 5, 2, 6, decoder=decoder, value_dim=value_dim)
    embedded = torch.randn(4, 8)
    codes = benchmark.stream_keys.nearest(bottleneck, embedded, selected)
    first = codes if selected == 1 else codes[:, 0]
    assert torch.equal(first, bottleneck.encode(embedded))
    values = benchmark.stream_heads.Values(bottleneck, 5, linear_decoder)
    with torch.no_grad():
        values.table.normal_()
        bottleneck.values.copy_(values.table.view_as(bottleneck.values))
        if linear_decoder:
            bottleneck.decoder.load_state_dict(values.decoder.state_dict())
    rows = benchmark.heads.Rows(embedded, codes, torch.tensor([0, 1, 2, 3]))
    mask = None if selected == 1 else torch.ones(4, selected)
    assert_close(values(rows), bottleneck.decode(codes, mask))

    before = values.table.detach().clone()
    benchmark.stream_heads.OneStep(values, 0.5).fit(rows)
    changed = (values.table != before).any(1).view(2, 6)
    assert torch.equal(changed, torch.zeros(2, 6).index_put((torch.arange(2), codes), torch.tensor(1.0)).bool())


def test_a_step_of_values_from_zero_is_that_computed_by_hand(benchmark):
    """With two classes and logits of zero, the gradient of a logit is 1/2, or -1/2 for the label."""
    bottleneck = DiscreteKeyValueBottleneck(4, 2, 2, 3, decoder="mean")
    rows = benchmark.heads.Rows(torch.zeros(2, 4), torch.tensor([[0, 1], [0, 2]]), torch.tensor([0, 1]))
    head = benchmark.stream_heads.mean_values(benchmark.stream_heads.Sizes(bottleneck, 4, 2, 2, None), rate=8.0)
    head.fit(rows)
    table = head.network.table.view(2, 3, 2)
    one = 8.0 * 0.5 / 2 / 2  # rate, gradient, a mean of two codebooks and of two rows
    assert torch.equal(table[0], torch.zeros(3, 2))  # the two rows select key 0, and their gradients cancel
    assert_close(table[1], torch.tensor([[0, 0], [one, -one], [-one, one]]))


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """The folders of 60 texts in four classes, and of a small encoder of them."""
    rows = [f"{word},{place} and {word} {number}" for number, word in enumerate(["cat", "dog", "owl", "bee"] * 15)
            for place in ("here", "over there")]  # fmt: skip
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.csv").write_text("\n".join(["label,text", *rows]))
    (tmp_path / "texts" / "test.csv").write_text("\n".join(["label,text", *rows[:24]]))
    monkeypatch.setattr("kd.nlp.teacher_model.teacher.TINY_SIZES", NARROW_BERT)
    made = tiny_bert(load_text_data(str(tmp_path / "texts")))
    made.model.bert.save_pretrained(tmp_path / "encoder")
    made.tokenizer.save_pretrained(tmp_path / "encoder")
    return tmp_path / "texts", tmp_path / "encoder"


def test_an_encoder_in_the_stream_starts_with_the_embeddings_of_the_others(benchmark, texts, tmp_path):
    dataset, encoder = map(str, texts)
    order = order_of(benchmark, tmp_path, kind="texts", dataset=[dataset], encoder=encoder, groups=2)
    rows, expected = order.tokens["test"], order.stream.embeddings["test"]
    head = benchmark.stream_encoder.TunedEncoder(encoder, 4, rate=1e-3)
    head.precision = "fp32"
    assert_close(head.predict(rows), torch.zeros(24, 4))
    with torch.no_grad():
        head.layer.weight.copy_(torch.eye(4, expected.shape[1]))
    assert_close(head.predict(rows), expected[:, :4], atol=1e-5, rtol=1e-4)
    before = [parameter.clone() for parameter in head.parameters()]
    head.fit(rows)
    changed = [not torch.equal(old, new) for old, new in zip(before, head.parameters(), strict=True)]
    assert sum(changed) >= len(changed) - 3  # all but the pooler, and keys' biases, whose gradient is zero


def test_carried_keys_are_those_of_a_stream_of_the_teacher(benchmark, texts, tmp_path):
    dataset, teacher = map(str, texts)
    student = str(tmp_path / "student")
    model = BertModel.from_pretrained(teacher, num_hidden_layers=2)
    model.save_pretrained(student)
    BertTokenizer.from_pretrained(teacher).save_pretrained(student)
    words = {"kind": "texts", "dataset": [dataset], "groups": 2}
    order = order_of(benchmark, tmp_path, encoder=student, teacher=teacher, **words)
    carried, new = (order.prepare(benchmark.stream_keys.Keys(8, 1, source))[0] for source in ("carried", "stream"))
    of_teacher, _ = order_of(benchmark, tmp_path, encoder=teacher, **words).prepare(benchmark.stream_keys.Keys(8))
    assert torch.equal(carried.keys, of_teacher.keys) and torch.equal(carried.projection, of_teacher.projection)
    assert torch.equal(new.projection, of_teacher.projection) and not torch.equal(new.keys, of_teacher.keys)


def test_runs_of_carried_keys_and_with_an_encoder_in_the_stream(texts, tmp_path):
    words = ["--dataset", texts[0], "--encoder", texts[1], "--codebooks", 4, "--codebook_size", 8, "--key_dim", 6,
             "--groups", 2, "--orders", 2, "--cache", tmp_path, "--output", tmp_path / "found.json"]  # fmt: skip
    run_script("benchmarks/streams.py", *words, "--study", "carried", "--teacher", texts[1], "--orders", 1)
    table = (tmp_path / "found.md").read_text()
    assert table.count("8 keys, 1 selected, carried ") == 3
    assert all(table.count(f"8 keys, 1 selected, {keys} ") == 2 for keys in ("stream", "first group", "random"))
    run_script("benchmarks/streams.py", *words, "--study", "encoder")
    found = json.loads((tmp_path / "found.json").read_text())["records"]
    assert len(found) == 2 * 4 and len({record["head"] for record in found}) == 4
    assert {record["setting"] for record in found if "encoder" in record["head"]} <= {1e-7, 1e-6, 1e-5, 1e-4}


def test_the_linear_discriminant_is_that_of_scikit_learn(benchmark):
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    embedded = torch.randn(60, 4, generator=generator) + 2 * torch.eye(3, 4)[labels]
    head = benchmark.stream_heads.Discriminant(4, 3, ridge=0.0)
    for part in torch.arange(60).split(7):
        head.fit(benchmark.heads.Rows(embedded[part], labels[part], labels[part]))
    expected = LinearDiscriminantAnalysis(solver="lsqr", priors=[1 / 3] * 3).fit(embedded.numpy(), labels.numpy())
    found = head(benchmark.heads.Rows(embedded, labels, labels)).log_softmax(1)
    assert_close(found, torch.from_numpy(expected.predict_log_proba(embedded.numpy())).float(), atol=1e-4, rtol=1e-4)


def test_replay_stores_a_uniform_sample(benchmark):
    class Recorder(benchmark.heads.Head):
        def fit(self, rows):
            self.sizes = [*getattr(self, "sizes", []), len(rows)]

    counts = torch.zeros(40)
    for seed in range(200):
        torch.manual_seed(seed)
        recorder = Recorder()
        head = benchmark.stream_heads.Replay(recorder, 10)
        for part in torch.arange(40).split(8):
            head.fit(benchmark.heads.Rows(part, part, part))
        assert recorder.sizes == [8, 16, 16, 16, 16]
        counts[head.stored.labels] += 1
    assert counts.sum() == 2000 and 30 < counts.min() and counts.max() < 70  # 50 expected, standard deviation 6


def test_a_run_on_digits(tmp_path):
    words = [*SHORT, "--cache", tmp_path / "cache", "--output"]
    run_script("benchmarks/streams.py", *words, tmp_path / "heads.json")
    found = json.loads((tmp_path / "heads.json").read_text())["records"]
    heads = {record["head"] for record in found}
    assert len(heads) == 11 and len(found) == 2 * len(heads)
    for record in found:
        assert 0 <= record["accuracy"] <= 1 and len(record["matrix"]) == (1 if record["forgetting"] is None else 5)
        assert record["accuracy"] == pytest.approx(sum(record["matrix"][-1]) / 5)
    counted = [record for record in found if record["head"] == "bottleneck, counted values"]
    assert min(record["accuracy"] for record in counted) > 0.6
    run_script("benchmarks/streams.py", *words, tmp_path / "keys.json", "--study", "keys", "--orders", 1)
    table = (tmp_path / "keys.md").read_text()
    assert table.count("\n| bottleneck") == 3 * 6 and table.count("16 keys, 4 selected, stream") == 3
    assert "nan" not in table
