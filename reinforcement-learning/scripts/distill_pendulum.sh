#!/usr/bin/env bash
# Pendulum-v1: a SAC teacher, a small PPO student.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python}" "$here/distill_policy.py" "$here/pendulum.yaml" "$@"
