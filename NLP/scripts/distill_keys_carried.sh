#!/usr/bin/env bash
# BERT with a bottleneck -> smaller BERT with a bottleneck and the teacher's keys.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python}" "$here/distill_bottleneck.py" "$@"
