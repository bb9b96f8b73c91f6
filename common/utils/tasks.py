"""The types of tasks, and the label of a row or position without a target."""

from typing import Literal

TaskType = Literal["classification", "regression", "multi_label", "token_classification"]
IGNORED = -100  # unlabelled, padding, or the end of a sequence
