"""Speed of training a bottleneck's values: on cached codes, and with encoder and search in every step.

    python benchmarks/cached_codes.py --dataset clinc_oos --encoder sentence-transformers/all-MiniLM-L6-v2

Both use the same data, model, batch size and KDTrainer; batches hold codes or token ids. The pass that fills the cache
is timed separately, and the script prints after how many epochs it pays off.
"""

import time
from typing import Any

import torch

from kd.common.bottleneck.training import CodeDataset, embed_samples, encode_samples, set_keys
from kd.common.cli import Parser, run
from kd.common.methods import labels
from kd.common.training.arguments import KDTrainingArguments
from kd.common.training.inference import identity_collate
from kd.common.training.trainer import KDTrainer
from kd.common.utils.devices import resolve_precision
from kd.nlp.data.loading import Texts, load_text_data
from kd.nlp.student_model.bottleneck_classifier import BottleneckClassifier
from kd.nlp.teacher_model.teacher import load_classifier


def train(
    model: BottleneckClassifier, dataset: Any, collate: Any, steps: int, batch_size: int, precision: Any
) -> float:
    """Samples per second over `steps` steps, after a warm-up of a twentieth of them."""

    def seconds(number: int) -> float:
        args = KDTrainingArguments(
            output_dir="runs/benchmark", max_steps=number, per_device_train_batch_size=batch_size, precision=precision,
            eval_strategy="no", save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
            learning_rate=3e-3, value_learning_rate=3e-2,
            train_sampling_strategy="random" if isinstance(dataset, CodeDataset) else "group_by_length",
        )  # fmt: skip
        objective = labels().objective
        trainer = KDTrainer(model=model, args=args, objective=objective, train_dataset=dataset, data_collator=collate)
        started = time.perf_counter()
        trainer.train()
        elapsed = time.perf_counter() - started
        trainer.finish()
        return elapsed

    seconds(max(2, steps // 20))
    return steps * batch_size / seconds(steps)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--dataset", default="intents", help="Embedded dataset, Hub name, folder or file.")
    parser.add_argument("--encoder", default="tiny-bert", help="Hub name or folder of the encoder.")
    parser.add_argument("--decoder", choices=["linear", "mean"], default="linear", help="Map from values to logits.")
    parser.add_argument("--batch_size", type=int, default=256, help="Samples per step.")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="Precision.")
    args = parser.parse_args()
    args.precision = resolve_precision(args.precision)

    data = load_text_data(args.dataset)
    pretrained = load_classifier(args.encoder, data)
    texts = Texts.of(data, pretrained.tokenizer)
    names = dict(enumerate(data.label_names))
    model = BottleneckClassifier.from_encoder(pretrained.encoder, names, "mean", decoder=args.decoder)
    started = time.perf_counter()
    embeddings = torch.stack(embed_samples(model, texts.train, texts.collate, args.precision)).to(model.device)
    set_keys(model.bottleneck, "new", None, embeddings, seed=0)
    fitted = time.perf_counter()
    rows = texts.train
    cached_codes = encode_samples(model, rows, texts.collate, args.precision)
    codes = CodeDataset(cached_codes, torch.tensor(rows["labels"]), torch.tensor(rows["sample_id"]))
    pass_seconds = time.perf_counter() - fitted

    online = train(model, texts.train, texts.collate, 30, args.batch_size, args.precision)
    cached = train(model, codes, identity_collate, 1200, args.batch_size, args.precision)
    print(f"{data.name}, {len(codes)} texts, {args.decoder} decoder, batch {args.batch_size}")
    print(f"keys fitted in {fitted - started:.1f} s, codes cached in one pass of {pass_seconds:.1f} s")
    print("| values trained on | samples per second |\n|---|---|")
    print(f"| texts: encoder and search every step | {online:,.0f} |\n| cached codes | {cached:,.0f} |")
    print(
        f"ratio {cached / online:.0f}; the cache pays off from epoch {1 + pass_seconds * online / len(codes):.1f} on"
    )


if __name__ == "__main__":
    run(main)
