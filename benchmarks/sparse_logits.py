"""Sparse forms of a teacher's distributions over tokens: bytes per token, and bias and variance of the gradient.

    python benchmarks/sparse_logits.py

A small GPT-2 teacher and a smaller student are trained on the embedded corpus for some seconds. The gradient is that
of the divergence with respect to the student's weights, on one batch. With g of the dense divergence and N draws g_n
of a form, the columns are

- bias: |mean of g_n - g| / |g|; of an unbiased form about deviation / sqrt(N), which the next column shows;
- deviation: the square root of the mean of |g_n - mean|^2, divided by |g|; it decreases with the root of the tokens in
  a batch;
- cosine: the mean cosine of g_n and g.

Bytes are those of the stored file. A dense row in fp16 takes twice the size of the vocabulary.
"""

import kd.common  # noqa: F401, I001 - must be imported before transformers' models

import tempfile
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from kd.common.cli import Parser, run
from kd.common.losses import soft_target_kl
from kd.common.reporting.tables import markdown
from kd.nlp.data.corpora import load_corpus, pack, stack
from kd.nlp.student_model.sparse_logits import Form, Sample, Top, spec_of
from kd.nlp.student_model.teacher_logits import LogitStore, with_sample_ids
from kd.nlp.teacher_model.generative import byte_level_bpe, random_gpt2

BLOCK, BATCH, DRAWS, RATE = 64, 8, 32, 3e-3  # tokens of a block, blocks of the gradient, draws, learning rate
FORMS: list[Form] = [form for k in (8, 16, 64) for form in (Top(k=k), Sample(k=k), Sample(k=k, stratified=False))]
FORMS += [Sample(k=16, exponent=0.8)]


def trained(layers: int, width: int, rows: datasets.Dataset, vocabulary: int, steps: int) -> PreTrainedModel:
    """A GPT-2, trained on labels."""
    torch.manual_seed(0)
    model = random_gpt2(vocabulary, 0, layers, width, BLOCK, dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for chosen in torch.randint(len(rows), (steps, 16)):
        blocks = rows[chosen.tolist()]
        logits = model(input_ids=blocks["input_ids"]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), blocks["labels"].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"{layers} layers of width {width}: loss {loss.item():.2f}", flush=True)
    return model.eval()


def gradient(model: PreTrainedModel, loss: Tensor) -> Tensor:
    """The gradient (parameters,) with respect to all weights."""
    parts = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return torch.cat([part.flatten() for part in parts])


def measure(form: Form, student: PreTrainedModel, logits: Tensor, teacher: Tensor, temperature: float) -> list[float]:
    """Bias, the bias that an unbiased form would show, deviation and cosine. Logits are (tokens, vocabulary)."""
    dense = gradient(student, soft_target_kl(logits, teacher, temperature))
    drawn = []
    for number in range(DRAWS if isinstance(form, Sample) else 1):
        columns = form.compress(teacher, temperature, number)
        columns["tokens"] = columns["tokens"].long()
        losses = form.loss(logits, *form.rows(columns), temperature=temperature)
        drawn.append(gradient(student, losses.mean()))
    found = torch.stack(drawn)
    mean, number = found.mean(0), len(found)
    deviation = ((found - mean).square().sum() / max(1, number - 1)).sqrt() / dense.norm()
    cosine = F.cosine_similarity(found, dense[None]).mean()
    return [float(x) for x in ((mean - dense).norm() / dense.norm(), deviation / number**0.5, deviation, cosine)]


def bytes_per_token(store: LogitStore, teacher: PreTrainedModel, tokenizer: Any, rows: datasets.Dataset) -> float:
    store.open(teacher, tokenizer, rows, stack, batch_size=16)
    return sum(path.stat().st_size for path in store.folder.rglob("*.arrow")) / rows["labels"][:].numel()


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--steps", type=int, default=300, help="Training steps of the teacher, thrice those of the student."
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="Temperature of the divergence.")
    args = parser.parse_args()
    datasets.disable_progress_bars()
    texts = load_corpus("python").splits["train"]
    tokenizer = byte_level_bpe(texts, 2048, BLOCK)
    rows = with_sample_ids(pack(texts, tokenizer, BLOCK))
    teacher = trained(2, 96, rows, len(tokenizer), args.steps)
    student = trained(1, 32, rows, len(tokenizer), args.steps // 3)
    batch = rows[:: len(rows) // BATCH]["input_ids"]
    logits = student(input_ids=batch).logits.flatten(0, 1)
    with torch.no_grad():
        targets = teacher(input_ids=batch).logits.flatten(0, 1)
    entropy = torch.special.entr((targets / args.temperature).softmax(-1)).sum(-1).mean()
    print(f"{len(logits):,} tokens, vocabulary {logits.shape[1]:,}, entropy of the teacher {entropy:.2f} nats\n")
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for form in FORMS:
            store = LogitStore(Path(folder) / spec_of(form), form, args.temperature, "fp32")
            size = bytes_per_token(store, teacher, tokenizer, rows.select(range(64)))
            numbers = measure(form, student, logits, targets, args.temperature)
            lines.append([spec_of(form), f"{size:.0f}", *(f"{number:.3f}" for number in numbers)])
    print(markdown(["form", "bytes per token", "bias", "if unbiased", "deviation", "cosine"], lines))


if __name__ == "__main__":
    run(main)
