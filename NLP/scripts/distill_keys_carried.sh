#!/usr/bin/env bash
# BERT with a bottleneck -> smaller BERT with a bottleneck whose keys are the teacher's.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python}" "$here/distill_bottleneck.py" "$@"
