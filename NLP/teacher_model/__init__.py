"""Text teachers: classifiers, language models and translators."""

TINY_BERT = "tiny-bert"  # value of --teacher for the embedded classifier, which needs no download
SCRATCH = "scratch"  # value of --teacher or --student for a model with random weights
HEAD_WIDTH = 32  # width of an attention head of such a model
MIN_VOCABULARY_SIZE = 257  # for byte-level BPE: all bytes, and the end-of-text token
