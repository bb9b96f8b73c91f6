#!/usr/bin/env bash
# BERT + bottleneck -> smaller BERT + bottleneck with keys fitted on the student's embeddings.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python}" "$here/distill_bottleneck.py" "$here/new_keys.yaml" "$@"
