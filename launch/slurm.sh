#!/usr/bin/env bash
# One run over several Slurm nodes: a Ray node on each of them, and `rlpost train` on the first.
#
#   sbatch launch/slurm.sh recipes/math_then_code.toml run_dir=/shared/runs/math_then_code [key.path=value ...]
#
# rlpost is installed in the environment this is submitted from, at the same path on every node; run_dir, HF_HOME and the
# model lie on a disk that all nodes mount. Submitted again, or requeued, it continues the run in run_dir.

#SBATCH --job-name=rlpost
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=4
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300

set -euo pipefail

READY_LIMIT_S=300 # for all nodes to join

if (($# < 2)) || [[ $2 != run_dir=?* ]]; then
    echo "usage: sbatch $0 RECIPE run_dir=DIRECTORY [key.path=value ...]" >&2
    exit 2
fi
run_dir=${2#run_dir=}

# The first address of the first node, where this script runs. With several networks, write here the one to use.
head_ip=$(hostname -I | cut -d ' ' -f 1)
address=$head_ip:$((20000 + SLURM_JOB_ID % 10000))

# Ray would run its workers at nice 15, let anybody on the network run code, and hide GPUs that it has not counted.
export RAY_worker_niceness=0 RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN

steps=()    # one srun each, which ends what runs under it
train=      # the command itself
signalled=0 # by Slurm, shortly before the time is up

end_steps() {
    ((${#steps[@]})) || return 0
    kill -TERM "${steps[@]}" 2>/dev/null || true
    wait "${steps[@]}" 2>/dev/null || true
}

trap 'signalled=1; [[ -z $train ]] || kill -TERM "$train" || true' TERM
trap end_steps EXIT

# ray_node NUM_NODES WHICH_NODES RAY_OPTIONS...: `ray start` on some of the nodes of this job.
ray_node() {
    srun --overlap --kill-on-bad-exit=0 --nodes="$1" --ntasks="$1" --ntasks-per-node=1 \
        --cpus-per-task="$SLURM_CPUS_PER_TASK" "$2" \
        ray start --block --disable-usage-stats "${@:3}" \
        --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" &
    steps+=($!)
}

# Fails, and says who is there, until all nodes have joined.
all_joined() {
    python - "$address" "$SLURM_JOB_NUM_NODES" <<'PYTHON'
import sys
import ray

ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
alive = [node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]]
if len(alive) < int(sys.argv[2]):
    sys.exit(f"{len(alive)} of {sys.argv[2]} nodes have joined: {' '.join(alive)}")
PYTHON
}

first_node=$SLURMD_NODENAME
ray_node 1 "--nodelist=$first_node" \
    --head --node-ip-address="$head_ip" --port="${address##*:}" --include-dashboard=false
if ((SLURM_JOB_NUM_NODES > 1)); then
    ray_node $((SLURM_JOB_NUM_NODES - 1)) "--exclude=$first_node" --address="$address"
fi

deadline=$((SECONDS + READY_LIMIT_S))
while ! reason=$(all_joined 2>&1); do
    if ((signalled || SECONDS > deadline)); then
        echo "the Ray cluster at $address is not complete after $SECONDS s. Last seen: ${reason##*$'\n'}" >&2
        exit 1
    fi
    sleep 2
done

resume=()
[[ ! -e $run_dir/recipe.json ]] || resume=(--resume)
rlpost train "$@" "ray_address=$address" "${resume[@]}" &
train=$!

# `wait` returns early when a signal was caught; the run then saves what it has learned and ends with 130.
while kill -0 "$train" 2>/dev/null; do
    wait "$train" || true
done
code=0
wait "$train" || code=$?
if ((signalled && code == 130)); then
    end_steps
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
