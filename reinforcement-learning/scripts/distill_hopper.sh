#!/usr/bin/env bash
# Hopper-v5: a PPO teacher with VecNormalize, a student for raw observations.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python}" "$here/distill_policy.py" "$here/hopper.yaml" "$@"
