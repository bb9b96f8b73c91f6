#!/usr/bin/env bash
# Published agents of rl-baselines3-zoo: a run for each agent with the flags of zoo.yaml, then one table.
# Usage: bash distill_zoo.sh FOLDER [AGENT ...] [flags of distill_policy.py]
# FOLDER is a clone of https://github.com/DLR-RM/rl-trained-agents, and AGENT one of the agents below (default: all). Runs
# that are finished are skipped, and those that were interrupted continue.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
out=runs/reinforcement-learning/zoo

# The share of the teacher's actor that the student may have: 5 % if the actor has more than 5,000 parameters, else 10 %.
# The policy of ARS is linear, so its student is linear, too. Robots, and the greedy policy of a DQN, need more steps and
# updates than the other tasks.
long="--steps 50_000 --updates 800"
agents="
qrdqn/CartPole-v1_1            --student_share 0.05
ppo/Acrobot-v1_1               --student_share 0.1
ppo/MountainCar-v0_1           --student_share 0.1
a2c/MountainCar-v0_1           --student_share 0.1
tqc/MountainCarContinuous-v0_1 --student_share 0.1
ppo/Pendulum-v1_1              --student_share 0.1
sac/Pendulum-v1_1              --student_share 0.1
ppo/LunarLander-v2_1           --student_share 0.1
a2c/LunarLander-v2_1           --student_share 0.1
dqn/LunarLander-v2_1           --student_share 0.05 $long
trpo/LunarLanderContinuous-v2_1 --student_share 0.1
ppo/BipedalWalker-v3_1         --student_share 0.05 $long
ars/Swimmer-v3_1               --student --loss mse $long
trpo/Swimmer-v3_1              --student_share 0.1 $long
tqc/Hopper-v3_1                --student_share 0.05 $long
ppo/Hopper-v3_1                --student_share 0.05 $long
tqc/HalfCheetah-v3_1           --student_share 0.05 $long
sac/HalfCheetah-v3_1           --student_share 0.05 $long
trpo/Walker2d-v3_1             --student_share 0.05 $long
ppo/Walker2d-v3_1              --student_share 0.05 $long
"

[ $# -gt 0 ] || { echo "error: pass the folder of the agents first, a clone of rl-trained-agents" >&2; exit 2; }
zoo="${1%/}"
shift
chosen=()
while [ $# -gt 0 ] && [[ "$1" != --* ]]; do
  grep -q "^$1 " <<< "$agents" || { echo "error: $1 is none of the agents of ${BASH_SOURCE[0]##*/}" >&2; exit 2; }
  chosen+=("$1")
  shift
done
while read -r agent size; do
  [ -n "$agent" ] || continue
  [ ${#chosen[@]} -eq 0 ] || [[ " ${chosen[*]} " == *" $agent "* ]] || continue
  run="$out/${agent//\//_}"
  [ ! -f "$run/results.json" ] || { echo "finished: $run"; continue; }
  resume=()
  [ ! -f "$run/recipe.yaml" ] || resume=(--resume_from_checkpoint)
  # shellcheck disable=SC2086  # several flags
  "${PYTHON:-python}" "$here/distill_policy.py" "$here/zoo.yaml" --teacher "$zoo/$agent" $size --output_dir "$run" \
    "$@" "${resume[@]}" < /dev/null
done <<< "$agents"
exec "${PYTHON:-python}" "$here/table.py" "$out" --markdown "$out/table.md"
