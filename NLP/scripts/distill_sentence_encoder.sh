#!/usr/bin/env bash
# all-MiniLM-L6-v2 -> 3 of its 6 layers, on captions, questions and sentences of several datasets. Downloads them.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python}" "$here/distill_sentence_encoder.py" "$here/sentence_encoder.yaml" "$@"
