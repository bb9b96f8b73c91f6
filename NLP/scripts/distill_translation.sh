#!/usr/bin/env bash
# Marian translator -> smaller Marian translator, both from random weights, on numbers in words.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python}" "$here/distill_translation.py" "$here/translation.yaml" "$@"
