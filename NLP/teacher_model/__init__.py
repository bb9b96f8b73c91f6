"""Text teachers: classifiers, language models and translators."""

SCRATCH = "scratch"  # names a model with random weights
HEAD_WIDTH = 32  # channels of an attention head of such a model
MIN_VOCABULARY_SIZE = 257  # all bytes, and the end-of-text token
