"""Class-incremental training on a frozen encoder: a discrete key-value bottleneck compared with a linear probe.

    python image-classification/scripts/train_bottleneck.py
    python image-classification/scripts/train_bottleneck.py --dataset mnist
    python image-classification/scripts/train_bottleneck.py --dataset mnist --values counted
    python image-classification/scripts/train_bottleneck.py --dataset mnist --encoder FOLDER --image_size 32

In the report, `student` is the bottleneck and `control` a linear probe, both trained class by class. `teacher` is the
same bottleneck trained i.i.d. on all classes, with as many passes over the images. With counted values both are equal,
because the order has no effect. FOLDER is a run of train_teacher.py on another dataset, because an encoder trained on
this one has seen the labels of all classes.
"""

from kd.common.cli import parse, run, show_help
from kd.common.training.arguments import RunArguments
from kd.image_classification.student_model.arguments import (
    IncrementalArguments,
)
from kd.image_classification.student_model.data_arguments import (
    DataArguments,
)

ARGUMENTS = IncrementalArguments, DataArguments, RunArguments
if __name__ == "__main__":
    show_help(*ARGUMENTS)  # before the imports below, which take seconds

from accelerate import PartialState

from kd.common.training.run import Run
from kd.image_classification.student_model.bottleneck import BottleneckProbe, load_encoder
from kd.image_classification.student_model.incremental import (
    HeadInputs,
    HeadTraining,
    embed_images,
    fitted_bottleneck,
    report,
    split_tasks,
    trained_head,
)

METHOD = "bottleneck_class_incremental"


class ForgettingRun(Run):
    """A run with an additional plot."""

    files = (*Run.files, "forgetting.png")


def main() -> None:
    args, data_args, run_args = parse(*ARGUMENTS)
    run_args.output_dir = run_args.output_dir or f"runs/image-classification/{METHOD}"
    encoder, data = load_encoder(args.encoder, data_args.load(keep_unlabelled=False))
    split_tasks(data, args.classes_per_task, run_args.seed)  # raises UserError if the classes do not fit
    run = ForgettingRun(run_args, args, data_args)
    run.check_inputs(data.fingerprint, encoder=encoder)

    linear = BottleneckProbe.from_encoder(encoder, data, None)
    with run.timed("embeddings"):
        embeddings = embed_images(linear, data)

    for seed_run in run.each_seed():
        seed = seed_run.args.seed if args.order_seed is None else args.order_seed
        tasks = split_tasks(data, args.classes_per_task, seed)
        bottleneck = fitted_bottleneck(seed_run, encoder, data, args, embeddings["train"])
        with seed_run.timed("codes"):
            codes, vectors = (HeadInputs.from_embeddings(model, embeddings, data) for model in (bottleneck, linear))

        at_once, values, weights = [sum(tasks, [])], args.value_learning_rate, args.probe_learning_rate
        heads = {
            "student": HeadTraining("bottleneck, class by class", bottleneck, codes, tasks, values),
            "teacher": HeadTraining("bottleneck, i.i.d.", bottleneck, codes, at_once, values),
            "control": HeadTraining("linear probe, class by class", linear, vectors, tasks, weights),
            "control_iid": HeadTraining("linear probe, i.i.d.", linear, vectors, at_once, weights),
        }
        models = {stage: trained_head(seed_run, data, stage, head, args) for stage, head in heads.items()}
        if PartialState().is_main_process:
            report(seed_run, METHOD, data, heads, models)
    run.summarize()


if __name__ == "__main__":
    run(main)
