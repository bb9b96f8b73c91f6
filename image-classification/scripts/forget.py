"""Removes classes or training images from a classifier with a bottleneck, without training.

    python image-classification/scripts/forget.py STUDENT --classes cat --output_dir forgotten
    python image-classification/scripts/forget.py STUDENT --examples FOLDER --output_dir forgotten

STUDENT is a run or a folder. With counted values (distill_bottleneck.py --values counted --decoder mean), the values
are then those of a student that was never given these images; FOLDER has them as CLASS/NAME.png. Trained values only
stop predicting a class. Keys and encoder do not change. evaluate.py evaluates the result.
"""

from kd.common.cli import Parser, run, show_help
from kd.common.training.arguments import add_changed_student_arguments

PARSER = Parser(description=__doc__)
add_changed_student_arguments(PARSER)
PARSER.add_argument("--classes", nargs="+", metavar="NAME", help="Classes to forget, instead of images.")
PARSER.add_argument("--examples", dest="dataset", help="Training images with labels, to forget: a folder or file.")
if __name__ == "__main__":
    show_help(parser=PARSER)  # before the imports below, which take seconds

import torch
from transformers import AutoImageProcessor

from kd.common.bottleneck.changes import (
    bottleneck_of,
    check_arguments,
    forget_classes,
    forget_examples,
    save_changed,
)
from kd.common.bottleneck.training import CodeDataset, encode_samples
from kd.common.pretrained import load_model, reading
from kd.common.reporting.saved_models import saved_model
from kd.common.training.inference import identity_collate
from kd.common.utils.devices import best_device
from kd.common.utils.errors import UserError
from kd.image_classification.student_model.data_arguments import DataArguments
from kd.image_classification.teacher_model.classifier import ImageClassifier
from kd.image_classification.teacher_model.teacher import load_trained, trained_config, trained_folder


def main() -> None:
    args = PARSER.parse_args()
    check_arguments(args)
    folder = trained_folder(saved_model(args.model))
    if folder is None:
        raise UserError(f"no folder {args.model}: pass the folder of a classifier or of a run")
    config = trained_config(folder)
    with reading(folder, "an image classifier of this project"):
        model, processor = load_model(ImageClassifier, folder), AutoImageProcessor.from_pretrained(folder)
    model.to(best_device()).eval()
    bottleneck = bottleneck_of(model, str(folder))
    if args.classes:
        description = forget_classes(bottleneck, args.classes, config.label_names)
    else:
        arguments = DataArguments(dataset=args.dataset, image_size=config.image_size)
        _, data = load_trained(folder, arguments.load(config.label_names))
        codes, labels = [], []
        for split, images in data.splits.items():
            codes += encode_samples(model, data.views(split, best_device()), identity_collate, "fp32", 250)
            labels.append(images.labels)
        ids = torch.arange(len(codes))
        description = forget_examples(bottleneck, CodeDataset(codes, torch.cat(labels), ids))
    save_changed(model, processor, str(folder), args.output_dir, description)


if __name__ == "__main__":
    run(main)
