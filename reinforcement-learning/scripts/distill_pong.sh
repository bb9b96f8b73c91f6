#!/usr/bin/env bash
# ALE/Pong-v5 from frames: students of 25, 7 or 4 % of the DQN network (Rusu et al., arXiv:1511.06295).
# Usage: bash distill_pong.sh 25|7|4 [flags of distill_policy.py]
# The teacher is downloaded; offline pass --teacher FILE.zip of a trained agent, or --teacher train --teacher_steps
# 10_000_000, which takes many hours on a CPU.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
case "${1:-}" in
  25) size=(--student 256 --channels 16 32 32) ;;
  7) size=(--student 128 --channels 16 16 16) ;;
  4) size=(--student 64 --channels 16 16 16) ;;
  *) echo "error: pass the size of the student first: 25, 7 or 4 (percent)" >&2; exit 2 ;;
esac
size+=(--output_dir "runs/reinforcement-learning/pong_$1_percent")
shift
exec "${PYTHON:-python}" "$here/distill_policy.py" "$here/pong.yaml" "${size[@]}" "$@"
