#!/usr/bin/env bash
# GPT-2 -> a student with every second layer, on WikiText, as in DistilGPT2. Downloads both; use a GPU.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python}" "$here/distill_gpt.py" "$here/gpt.yaml" "$@"
