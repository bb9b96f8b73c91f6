"""Learns classes one after another behind a frozen encoder: a discrete key-value bottleneck against a linear probe.

    python image-classification/scripts/train_bottleneck.py
    python image-classification/scripts/train_bottleneck.py --dataset mnist
    python image-classification/scripts/train_bottleneck.py --dataset mnist --encoder FOLDER --image_size 32

In the report, `student` is the bottleneck and `control` a linear probe, both trained class by class, and `teacher` the
same bottleneck trained i.i.d., on all classes at once and in as many passes over the images. FOLDER is a run of
train_teacher.py, on other data: one on these has seen the labels of all classes already.
"""

from collections.abc import Callable
from functools import partial

from accelerate import PartialState

from kd.common.cli import parse, run
from kd.common.pretrained import stage_loader
from kd.common.reporting.results import print_table, write_report
from kd.common.training.arguments import RunArguments
from kd.common.training.run import Run
from kd.common.utils.folders import writing_folder
from kd.image_classification.data.loading import ImageData
from kd.image_classification.student_model.arguments import DataArguments
from kd.image_classification.student_model.bottleneck_probe import BottleneckProbe, load_encoder
from kd.image_classification.student_model.evaluation import image_processor
from kd.image_classification.student_model.forgetting import incremental_results, plot_forgetting
from kd.image_classification.student_model.incremental import (
    HeadTraining,
    IncrementalArguments,
    Samples,
    Tasks,
    arrival,
    embed_images,
    fit_keys,
    train_head,
)
from kd.image_classification.teacher_model.classifier import ImageClassifier

METHOD = "bottleneck_class_incremental"


class ForgettingRun(Run):
    """A run with one plot more."""

    files = (*Run.files, "forgetting.png")


def main() -> None:
    args, data_args, run_args = parse(IncrementalArguments, DataArguments, RunArguments)
    run_args.output_dir = run_args.output_dir or f"runs/image-classification/{METHOD}"
    encoder, data = load_encoder(args.encoder, data_args.load())
    tasks = arrival(data, args.classes_per_task, run_args.seed if args.order_seed is None else args.order_seed)
    this = ForgettingRun(run_args, args, data_args)
    this.check_inputs(data.fingerprint, encoder=encoder)
    processor = image_processor(data)
    stage = partial(this.stage, load=stage_loader(BottleneckProbe), processor=processor)

    heads = untrained_heads(this, stage, encoder, data, args, tasks)

    def trained(name: str) -> BottleneckProbe:
        model, this.history[name] = train_head(heads[name], args.epochs_per_task, args.batch_size, run_args.seed)
        return model

    models = {name: stage(name, partial(trained, name)) for name in heads}

    if PartialState().is_main_process:
        with writing_folder(this.folder / "student") as student:
            models["student"].save_pretrained(student)
            processor.save_pretrained(student)
        results = incremental_results(this, METHOD, data, heads, models)
        plot_forgetting(this.folder / "forgetting.png", results)
        write_report(this.folder, results, {name: this.history[name] for name in heads})
        print_table(results)
        for name, accuracy in results["accuracy"].items():
            print(f"{name}: {', '.join(f'{split} accuracy {score:.4f}' for split, score in accuracy.items())}")
        print(f"report: {this.folder / 'report.md'}, plot: {this.folder / 'forgetting.png'}")


def untrained_heads(
    this: Run,
    stage: Callable[[str, Callable[[], BottleneckProbe]], BottleneckProbe],
    encoder: ImageClassifier | None,
    data: ImageData,
    args: IncrementalArguments,
    tasks: Tasks,
) -> dict[str, HeadTraining]:
    """The heads by the names of their stages; the encoder runs once over all images, and the keys are fitted once."""
    linear = BottleneckProbe.around(encoder, data, None)
    with this.timed("embeddings"):
        embeddings = embed_images(linear, data)

    def with_keys() -> BottleneckProbe:
        return fit_keys(BottleneckProbe.around(encoder, data, args.bottleneck), embeddings["train"], this.args.seed)

    bottleneck = stage("keys", with_keys)
    with this.timed("codes"):
        codes, vectors = (Samples.of(model, embeddings, data) for model in (bottleneck, linear))
    values, weights, at_once = args.value_learning_rate, args.probe_learning_rate, [sum(tasks, [])]
    return {
        "student": HeadTraining("bottleneck, class by class", bottleneck, codes, tasks, values),
        "teacher": HeadTraining("bottleneck, i.i.d.", bottleneck, codes, at_once, values),
        "control": HeadTraining("linear probe, class by class", linear, vectors, tasks, weights),
        "control_iid": HeadTraining("linear probe, i.i.d.", linear, vectors, at_once, weights),
    }


if __name__ == "__main__":
    run(main)
