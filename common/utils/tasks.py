"""The types of tasks, and the label of a row or position without a target."""

from typing import Literal

# One class per sample, a number, any number of labels, or a tag for each word.
TaskType = Literal["classification", "regression", "multi_label", "token_classification"]
IGNORED = -100  # unlabelled, padding, or the end of a sequence
