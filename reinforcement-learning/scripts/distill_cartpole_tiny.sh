#!/usr/bin/env bash
# CartPole-v1: a student of 56 parameters.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python}" "$here/distill_policy.py" "$here/cartpole_tiny.yaml" "$@"
