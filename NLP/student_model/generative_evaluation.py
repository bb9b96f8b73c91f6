"""Evaluation of the language models and translators of a run, with the arguments of the run."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from kd.common.data.sources import print_notes
from kd.common.reporting.results import read_recipe
from kd.common.reporting.saved_models import run_of
from kd.common.utils.errors import UserError
from kd.nlp.data.corpora import load_corpus
from kd.nlp.data.prompts import PromptData, load_language_data
from kd.nlp.data.translation import load_translation_data
from kd.nlp.student_model.generation import GenerationTask
from kd.nlp.student_model.language_model import LanguageTask
from kd.nlp.student_model.masked_language_model import MaskedLanguageTask
from kd.nlp.student_model.prompts import PromptTask
from kd.nlp.student_model.translation import TranslationTask
from kd.nlp.teacher_model.generative import Generator, load_language_model, load_translator
from kd.nlp.teacher_model.masked import load_masked_language_model
from kd.nlp.teacher_model.teacher import architecture_of, read_config

TRANSLATORS, MASKED, CAUSAL = (
    set(mapping.values())
    for mapping in (
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    )
)
COLUMNS = ("text_column", "prompt_column", "completion_column", "messages_column", "source", "target")  # of recipes
CLASSIFIER_FLAGS = ("label_column", "label_separator", "unlabelled_label", "label_names", "trust_label_order")


class Recipe(Namespace):
    """The arguments of a run. Those that it left out are None."""

    def __getattr__(self, name: str) -> Any:
        return None


def is_generative(config: Any) -> bool:
    """Whether a model is a language model, masked or causal, or a translator."""
    return architecture_of(config) in TRANSLATORS | MASKED | CAUSAL


def evaluate_generative(name: str, args: Namespace) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The entry of the model NAME for the data that the flags name, or for those of its run, and the columns of
    `write_predictions`, which are translations.

    Raises UserError if the model is in no run, and for flags that its kind does not have.
    """
    architecture = architecture_of(read_config(name))
    recipe = recipe_of(name, architecture, args)
    task, model = load_task(name, architecture, recipe)
    print_notes(task.data.name, task.data.notes)
    if architecture not in TRANSLATORS:
        return task.measured(name, model, recipe.per_device_eval_batch_size)[0], {}
    entry, translations, _ = task.measured(name, model)
    rows = task.data.splits
    return entry, {
        split: {
            "row": range(len(texts)),
            "source": rows[split]["source"][:],
            "label": rows[split]["target"][:],
            "prediction": texts,
        }
        for split, texts in translations.items()
    }


def recipe_of(name: str, architecture: str, args: Namespace) -> Recipe:
    """The arguments of the run of a model with the dataset, columns and limits of the flags."""
    if unused := [f"--{flag}" for flag in CLASSIFIER_FLAGS if getattr(args, flag)]:
        raise UserError(f"{name} is a {architecture}, which has no labels: leave out {', '.join(unused)}")
    if args.predictions and architecture not in TRANSLATORS:
        raise UserError("a language model has no prediction for each row: leave out --predictions")
    folder = run_of(Path(name))
    recipe = Recipe(**({} if folder is None else read_recipe(folder)))
    if (recipe.max_length if architecture in TRANSLATORS else recipe.block_size) is None:
        raise UserError(
            f"{name} is a {architecture} outside of a run, whose recipe has the length of its blocks or "
            "sentences: pass a run of distill_gpt.py, distill_mlm.py or distill_translation.py"
        )
    if args.text_columns:
        vars(recipe).update(dict.fromkeys(COLUMNS) | columns_of(architecture, args.text_columns))
    if args.dataset != recipe.dataset:
        recipe.eval_dataset = None  # of the run
    recipe.dataset, recipe.max_eval_samples = args.dataset, args.max_eval_samples
    return recipe


def columns_of(architecture: str, columns: list[str]) -> dict[str, str]:
    """The columns of --text_columns by argument: texts, or prompts and completions, or sources and targets."""
    possible: list[tuple[str, ...]] = [("text_column",), ("prompt_column", "completion_column")]
    if architecture in TRANSLATORS:
        possible = [("source", "target")]
    elif architecture in MASKED:
        possible = possible[:1]
    for names in possible:
        if len(names) == len(columns):
            return dict(zip(names, columns, strict=True))
    numbers = " or ".join(str(len(names)) for names in possible)
    raise UserError(f"--text_columns of a {architecture} must be {numbers}, got {len(columns)}")


def load_task(name: str, architecture: str, recipe: Recipe) -> tuple[Any, PreTrainedModel]:
    """The data of a recipe in the tokens of the model NAME, as a GenerationTask, and the model."""
    limits = recipe.max_train_samples, recipe.max_eval_samples
    if architecture in TRANSLATORS:
        pairs = load_translation_data(recipe.dataset, recipe.source, recipe.target, *limits, needs_train=False)
        return task_of(TranslationTask, recipe, pairs, load_translator(name, recipe.max_length))
    if architecture in MASKED:
        corpus = load_corpus(recipe.dataset, recipe.text_column, *limits, needs_train=False)
        return task_of(
            MaskedLanguageTask, recipe, corpus, load_masked_language_model(name, recipe.block_size, "the model")
        )
    data, generator = load_language_data(recipe, needs_train=False), load_language_model(name, recipe.block_size)
    if isinstance(data, PromptData):
        data.check_template(generator.tokenizer)
        return task_of(PromptTask, recipe, data, generator)
    return task_of(LanguageTask, recipe, data, generator)


def task_of(
    kind: type[GenerationTask], recipe: Recipe, data: Any, generator: Generator
) -> tuple[Any, PreTrainedModel]:
    """The task, without the train split, and the model."""
    data = replace(data, splits={split: rows for split, rows in data.splits.items() if split != "train"})
    splits = kind.tokenize(recipe, data, generator.tokenizer)
    return kind(recipe, data, generator.tokenizer, splits, None, None), generator.model
