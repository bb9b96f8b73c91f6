#!/usr/bin/env bash
# Hopper-v5: a normalized PPO teacher into a student that needs no statistics.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python}" "$here/distill_policy.py" "$here/hopper.yaml" "$@"
