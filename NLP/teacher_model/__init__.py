"""Text teachers: classifiers, language models and translators."""

import math

TINY_BERT = "tiny-bert"  # value of --teacher for the embedded classifier, which needs no download
SCRATCH = "scratch"  # value of --teacher or --student for a model with random weights
HEAD_WIDTH = 32  # width of an attention head of such a model
MIN_VOCABULARY_SIZE = 257  # for byte-level BPE: all bytes, and the end-of-text token


def initial_deviation(width: int) -> float:
    """The standard deviation of random weights for a hidden size: 0.02, as in BERT and GPT-2, for a width of 768.

    It is proportional to width**-0.5, so that the outputs of layers have the same variance for any width. With 0.02, a
    model of width 128 needs several times as many epochs.
    """
    return 0.02 * math.sqrt(768 / width)
