# What the job scripts beside this file share: environment, start by srun, requeue. Sourced, not run.
#
# JANUS_HOME        the clone; default: where sbatch was called
# JANUS_VENV        the virtual environment; default: JANUS_HOME/.venv
# JANUS_MAX_STARTS  a job that was started this often is not requeued again; default 100
# MASTER_PORT       port of the first rank; default: made of the job's number
set -uo pipefail

JANUS_VENV=${JANUS_VENV:-$JANUS_HOME/.venv}
JANUS_MAX_STARTS=${JANUS_MAX_STARTS:-100}
JANUS_SAVED=75   # exit code of a run that was asked to stop, has saved, and wants to be started again
JANUS_STALLED=76 # of one that no rank made progress in; it goes on from its last checkpoint

# The number of an array may be that of one of its tasks, and means all of them to Slurm's commands.
JANUS_JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JANUS_JOB=${JANUS_JOB:-$SLURM_JOB_ID}
# In the arguments of the script %a is the task, as in Slurm's names of files.
set -- "${@//%a/${SLURM_ARRAY_TASK_ID:-%a}}"

cd "$JANUS_HOME" || exit 2
export PATH="$JANUS_VENV/bin:$PATH"
export PYTHONPATH="$JANUS_HOME${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

if ! command -v janus-ds >/dev/null; then
    printf 'error: janus_ds is not installed\n  where: JANUS_VENV=%s, on node %s\n' "$JANUS_VENV" "$(hostname)"
    printf '  to do: make install in the clone, or export JANUS_VENV, which all nodes must see\n'
    exit 8
fi

# Where the ranks meet: the first node of the job, by the name that Slurm knows it by, or else its address.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
if ! getent hosts "$MASTER_ADDR" >/dev/null; then
    MASTER_ADDR=$(scontrol show node "$MASTER_ADDR" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
fi
export MASTER_ADDR
export MASTER_PORT=${MASTER_PORT:-$((15000 + SLURM_JOB_ID % 15000))}

# When the job's time is over, for Slurm before 23.02, which does not say so by itself.
if [ -z "${SLURM_JOB_END_TIME:-}" ]; then
    janus_end=$(squeue --noheader --jobs "$JANUS_JOB" --format %e | tr -d '[:space:]')
    # `date -d ""` would be midnight.
    SLURM_JOB_END_TIME=${janus_end:+$(date -d "$janus_end" +%s 2>/dev/null || true)}
    export SLURM_JOB_END_TIME
fi

janus_say() { echo "$(date '+%F %T') job $JANUS_JOB, start $((${SLURM_RESTART_COUNT:-0} + 1)): $*"; }

# Runs its arguments as one step. SIGTERM and SIGUSR1 must not end this shell before the ranks have
# saved. Slurm sends the first to every process of the job, this one included; `--signal=B:...` and `scancel --batch`
# reach this shell alone, so srun passes it on.
janus_step() {
    local code
    trap 'janus_say "asked to stop, the ranks are saving"; kill -USR1 ${!-} 2>/dev/null' TERM USR1
    # No --kill-on-bad-exit: the first rank that leaves with 75 would get the others killed while they
    # do the same. A rank that dies ends the others by itself; --wait is the last resort.
    srun --kill-on-bad-exit=0 --wait=60 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "$@" &
    while kill -0 $! 2>/dev/null; do # a signal ends `wait`, not srun
        wait $!
    done
    wait $!
    code=$?
    trap '' TERM USR1
    return $code
}

# Trains: as janus_step, and requeues the job when the run wants to go on.
janus_train() {
    local code state pause
    janus_say "$SLURM_JOB_NUM_NODES node(s), $SLURM_NTASKS rank(s), first $MASTER_ADDR:$MASTER_PORT," \
        "${SLURM_GPUS_ON_NODE:-no} GPU(s) on a node"
    if [ $((${SLURM_GPUS_ON_NODE:-0} * SLURM_JOB_NUM_NODES)) -gt "$SLURM_NTASKS" ]; then
        janus_say "GPUs stay idle: sbatch --ntasks-per-node=$SLURM_GPUS_ON_NODE is one rank for each"
    fi
    janus_step python -u "$@"
    code=$?
    janus_say "ended with exit code $code"
    if [ $code -ne $JANUS_SAVED ] && [ $code -ne $JANUS_STALLED ]; then
        # Ranks see that a node is lost minutes before Slurm gives it up, and requeues what runs there.
        [ $code -ne 0 ] && [ -n "$(sinfo --noheader --Node --dead --nodes "$SLURM_JOB_NODELIST")" ] || exit $code
        janus_say "a node does not answer"
    fi
    if [ $((${SLURM_RESTART_COUNT:-0} + 1)) -ge "$JANUS_MAX_STARTS" ]; then
        janus_say "not requeued: JANUS_MAX_STARTS=$JANUS_MAX_STARTS"
        exit $code
    fi
    for pause in 5 10 20 40 0; do # a busy controller may not answer
        state=$(squeue --noheader --jobs "$JANUS_JOB" --format %T)
        # COMPLETING: `scontrol requeue` or `scancel` has ended it, and Slurm does what was asked for.
        if [ -n "$state" ] && [ "$state" != RUNNING ]; then
            janus_say "left to Slurm, whose squeue says: $state"
            exit $code
        fi
        if [ -n "$state" ] && scontrol requeue "$JANUS_JOB"; then
            janus_say "requeued"
            exit $code
        fi
        sleep $pause
    done
    janus_say "not requeued: Slurm does not do it, see above; the same sbatch goes on"
    exit $code
}
