#!/usr/bin/env bash
# GPT-2 -> six of its twelve layers, by its distributions over next tokens.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python}" "$here/distill_gpt.py" "$here/gpt.yaml" "$@"
