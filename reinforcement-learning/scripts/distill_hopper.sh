#!/usr/bin/env bash
# Hopper-v4: a teacher from rl-baselines3-zoo, a student with 5 % of its actor's parameters.
# The teacher is downloaded; offline pass --teacher rl-trained-agents/tqc/Hopper-v3_1, or another agent.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python}" "$here/distill_policy.py" "$here/hopper.yaml" "$@"
