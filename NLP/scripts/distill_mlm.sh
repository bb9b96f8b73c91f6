#!/usr/bin/env bash
# BERT -> six of its twelve layers, on WikiText, as DistilBERT was made. Downloads both; use a GPU.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python}" "$here/distill_mlm.py" "$here/mlm.yaml" "$@"
