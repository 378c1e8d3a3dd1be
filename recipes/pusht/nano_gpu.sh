#!/usr/bin/env bash
# The nano policy from nothing to numbers on one rented GPU: record, train, evaluate, collect.
#
#   bash recipes/pusht/nano_gpu.sh                 # all of it; stopped or killed, the same command goes on
#   bash recipes/pusht/nano_gpu.sh train           # one part: record, train, evaluate or collect
#
# A try without GPU, in minutes:
#
#   export EPISODES=4 MAX_STEPS=4 SAVE_STEPS=2 EVAL_EPISODES=2 CURVE_EPISODES=1 MAX_EPISODE_STEPS=10
#   export TRAIN_FLAGS="--use_cpu true --bf16 false --optim adamw_torch --num_eval_episodes 1 --probe_steps 2 \
#     --per_device_train_batch_size 8 --dataloader_num_workers 0 --dataloader_persistent_workers false"
#   bash recipes/pusht/nano_gpu.sh
#
# No part runs longer than STEP_SECONDS: it stops with all it has done kept, and status 130 says to call it again.
set -euo pipefail
cd "$(dirname "$0")/../.."

: "${WORK:=runs/pusht_nano_gpu}" "${RESULTS:=$WORK/results}" "${CONFIG:=recipes/pusht/nano_gpu.yaml}"
: "${EPISODES:=2000}" "${STATE:=agent}" "${MAX_STEPS:=20000}" "${SAVE_STEPS:=2000}" "${TRAIN_FLAGS:=}"
: "${EVAL_EPISODES:=500}" "${CURVE_EPISODES:=64}" "${MAX_EPISODE_STEPS:=300}" "${STEP_SECONDS:=540}"
export TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Training saves on Ctrl-C's signal; the others keep every finished episode whatever ends them.
bounded() { timeout --kill-after 60 "$STEP_SECONDS" python "$@"; }

record() {
    bounded data_prep/record_pusht.py --num_episodes "$EPISODES" --num_proc "$(nproc)" --state "$STATE" \
        --action_noise 4 --noise_fraction 0.5 --output_dir "$WORK/data"
}

train() { # TRAIN_FLAGS is a list of words
    timeout --foreground --signal INT "$STEP_SECONDS" python recipes/sft_pusht.py --config "$CONFIG" \
        --dataset_name "$WORK/data" --output_dir "$WORK/train" --max_steps "$MAX_STEPS" --save_steps "$SAVE_STEPS" \
        $TRAIN_FLAGS
}

# The last policy on seeds that nothing was chosen by, and every checkpoint on others, all at once: simulators need a
# core each.
evaluate() {
    local checkpoint name status=0 jobs=()
    for checkpoint in "$WORK/train" "$WORK"/train/checkpoint-*; do
        name=$(basename "$checkpoint")
        [ "$name" = "checkpoint-$MAX_STEPS" ] && continue # the last policy once more
        local seed=60000 episodes=$CURVE_EPISODES
        [ "$name" = train ] && name=final && seed=100000 && episodes=$EVAL_EPISODES
        mkdir -p "$WORK/train/eval/$name"
        bounded eval/eval_pusht.py --model_name_or_path "$checkpoint" --num_episodes "$episodes" --seed "$seed" \
            --max_steps "$MAX_EPISODE_STEPS" --num_envs 32 --num_videos 2 --output_dir "$WORK/train/eval/$name" \
            > "$WORK/train/eval/$name/log.txt" 2>&1 &
        jobs+=($!)
    done
    for job in "${jobs[@]}"; do wait "$job" || status=$?; done
    tail -n 4 "$WORK/train/eval/final/log.txt"
    return $status
}

collect() { # what is worth keeping, in less than 64 MiB
    local key
    mkdir -p "$RESULTS/checkpoint" || return
    for key in success_rate mean_max_coverage observation_gap first_action_loss; do
        python recipes/curves.py "$WORK/train" --key "$key" --output "$RESULTS/$key.png" || return
    done
    cp -r "$WORK/train/eval" "$WORK/train/trainer_state.json" "$WORK/data/README.md" "$RESULTS/" &&
        find "$WORK/train" -maxdepth 1 -type f ! -name "*.bin" -exec cp {} "$RESULTS/checkpoint/" \; &&
        du -sh "$RESULTS"
}

for part in ${*:-record train evaluate collect}; do
    printf '\n%s: %s\n' "$(date +%H:%M:%S)" "$part"
    status=0
    "$part" || status=$?
    case $status in
        0) ;;
        124 | 130) echo "$part has more to do: run the same command again" && exit 130 ;;
        *) exit "$status" ;;
    esac
done
