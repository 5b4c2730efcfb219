#!/bin/bash
# Runs a command on a Ray cluster of this Slurm job's nodes; for the sbatch files beside it, which `exec` it.
#   infra/slurm/on_ray.sh dvae tokenize configs/tokenize.yaml …
# Five minutes before the time limit, and at a preemption, Slurm sends SIGTERM (--signal). The command is told to stop,
# saves what it has (exit code 130), and the job goes back into the queue, where it goes on from there. The exit code is
# the command's. The nodes must be the job's alone (--exclusive): `ray symmetric-run` ends with `ray stop`.
set -uo pipefail

address=${DVAE_HEAD_IP:-$(hostname --all-ip-addresses | cut --delimiter=' ' --fields=1)}:6379   # this is the first node
driver=$(mktemp)   # will hold the process id of the command
stopping=

# shellcheck disable=SC2317,SC2329  # it is reached, by the trap
stop() {
    stopping=yes
    touch "$driver.stop"   # for a command that has not begun: Ray may wait for its nodes for minutes
    echo "on_ray: told to stop; the command saves what it has" >&2
    [[ -s $driver ]] && kill -TERM "$(<"$driver")"
}
trap stop TERM USR1

# Without a token, anybody who reaches the nodes runs code on them.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(head --bytes=32 /dev/urandom | sha256sum | cut --characters=1-64)}
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=${RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT:-600}

# It writes its id before it looks for the file, and the trap the other way round: one of them sees the other.
# shellcheck disable=SC2016  # the inner shell expands these
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
    ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" --disable-usage-stats -- \
    bash -c 'echo $$ > "$0"; [[ -e $0.stop ]] && exit 130; exec env RAY_ADDRESS="$@"' "$driver" "$address" "$@" &
steps=$!

# A trap interrupts `wait`, which is then to be taken up again; once the step has ended, it gives its exit code.
while kill -0 "$steps" 2> /dev/null; do
    wait "$steps"
done
wait "$steps"
code=$?
rm --force "$driver" "$driver.stop"

if [[ -n $stopping && $code -ne 0 ]]; then
    echo "on_ray: back into the queue" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
