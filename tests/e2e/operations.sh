#!/usr/bin/env bash
# The operator's guide of README.md, acted out on one machine with real servers, workers and clones:
# servers, deployments, a fanned-out run, runs by hand and by schedule, killed workers and servers, a regression
# with and without an injected slow-down, the notification. Prints what survived; exit code 1 if anything did not.
#   bash tests/e2e/operations.sh          (make test ARGS="-m operations" does the same)
set -uo pipefail

ROOT=$(cd "$(dirname "$0")/../.." && pwd)
[ -x "$ROOT/.venv/bin/python" ] && PATH="$ROOT/.venv/bin:$PATH"
T=$(mktemp -d -t eugen-operations.XXXX)
mkdir "$T/tmp" "$T/remote"
TABLE=() FAILED=0 PIDS=()

free_port() { python -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
PREFECT_PORT=$(free_port) MLFLOW_PORT=$(free_port) NOTIFY_PORT=$(free_port)
SECRET=planted-$RANDOM$RANDOM$RANDOM
for name in $(compgen -e | grep -E '^(PREFECT_|MLFLOW_|EUGEN_PIPELINE|EUGEN_CLONE|PYTHONPATH)'); do unset "$name"; done
export PREFECT_API_URL=http://127.0.0.1:$PREFECT_PORT/api MLFLOW_TRACKING_URI=http://127.0.0.1:$MLFLOW_PORT
export PREFECT_API_AUTH_STRING=operator:$SECRET MLFLOW_TRACKING_USERNAME=admin MLFLOW_TRACKING_PASSWORD=$SECRET
export EUGEN_DVC_REMOTE=$T/remote DO_NOT_TRACK=1 TMPDIR=$T/tmp PYTHONUNBUFFERED=1
export EUGEN_DATA_DIR=${EUGEN_DATA_DIR:-$ROOT/data/.downloads}
export PREFECT_HOME=$T/prefect

ended() {
    for pid in "${PIDS[@]}"; do kill -INT -- "-$pid" 2>/dev/null || kill -INT "$pid" 2>/dev/null; done
    sleep 3
    for pid in "${PIDS[@]}"; do kill -9 -- "-$pid" 2>/dev/null; done
    [ "$FAILED" = 0 ] && rm -rf "$T" || echo "logs and clones: $T"
}
trap ended EXIT

# step NAME COMMAND…: run it, keep what it says, note how it ended.
step() {
    local name=$1 began=$SECONDS; shift
    if "$@" >"$T/step.log" 2>&1; then
        TABLE+=("$(printf '%-62s survived  %4d s' "$name" $((SECONDS - began)))")
    else
        FAILED=1
        TABLE+=("$(printf '%-62s FAILED    %4d s' "$name" $((SECONDS - began)))")
        echo "--- $name failed:"; tail -n 60 "$T/step.log"
    fi
    echo "${TABLE[-1]}"
}
# background CLONE LOG COMMAND…: start it in a session of its own; its pid is $!.
background() {
    local clone=$1 log=$2; shift 2
    (cd "$T/$clone" && exec setsid "$@") >>"$T/$log.log" 2>&1 &
    PIDS+=($!)
}
within() { # SECONDS COMMAND…: until it holds
    local deadline=$((SECONDS + $1)); shift
    until "$@" >/dev/null 2>&1; do [ $SECONDS -lt $deadline ] || { echo "not within its time: $*"; return 1; }; sleep 0.5; done
}
check() { python "$ROOT/tests/e2e/checks.py" "$@"; }
bench() { local clone=$1; shift; (cd "$T/$clone" && python -m flows.benchmark "$@"); }
operate() { local clone=$1; shift; (cd "$T/$clone" && python -m flows.operate "$@"); }
prefect() { (cd "$T/hub" && python -m prefect --no-prompt "$@"); }

clones() { for each in hub one two alone; do check clone "$T/$each" || return; done; }
alone() { # what a single machine makes of the same parameters, without any server
    (unset PREFECT_API_URL MLFLOW_TRACKING_URI; EUGEN_TRACKING=off bench alone --engine dvc)
}
servers() {
    background hub servers python -m flows.operate server --port "$PREFECT_PORT" --mlflow-port "$MLFLOW_PORT"
    SERVERS=$!
    within 180 check page && within 180 test -s "$T/hub/.work/servers.json"
}
servers_again() { operate hub server --port "$PREFECT_PORT" --mlflow-port "$MLFLOW_PORT" | grep "are running"; }
refused() { check refused "$PREFECT_API_URL/flows/filter" && check refused "$MLFLOW_TRACKING_URI/api/2.0/mlflow/experiments/search"; }
deploy() {
    background hub notify python "$ROOT/tests/e2e/checks.py" listen "$NOTIFY_PORT" "$T/notified"
    operate hub deploy --notify "http://127.0.0.1:$NOTIFY_PORT" && operate hub deploy && check deployments 6
}
worker() { background "$1" "$1" python -m flows.operate worker --pool cpu-pool; eval "WORKER_$1=$!"; }
workers() {
    worker one; worker two
    within 90 check online 2 && operate one worker --pool cpu-pool | grep "a worker of this clone serves"
}
fan_out() { bench hub --pool cpu-pool && check same "$T/hub" "$T/alone" && grep -q " run in " "$T/one.log" && grep -q " run in " "$T/two.log"; }
by_hand() { prefect deployment run benchmark/cpu --watch; }
by_schedule() {
    prefect deployment schedule create benchmark/cpu --cron "* * * * *" && within 300 check scheduled
    local found=$?
    prefect deployment schedule clear -y benchmark/cpu
    within 120 check idle "$T/one" && within 120 check idle "$T/two" && return $found
}
other_seeds() { for each in hub alone; do check seeds "$T/$each" "$1" || return; done; alone; }
worker_killed() {
    other_seeds 5 || return
    bench hub --pool cpu-pool >"$T/fan.log" 2>&1 & local run=$!
    within 120 check busy "$T/one" "transfer|finetune|scratch|profile" || return
    kill -9 "$WORKER_one"
    within 30 check idle "$T/one" || { check idle "$T/one"; echo "the killed worker's stages go on"; return 1; }
    wait $run || { cat "$T/fan.log"; return 1; }
    cat "$T/fan.log"
    grep -q "its cells go to another worker" "$T/fan.log" && check same "$T/hub" "$T/alone" && check sound "$T/hub"
}
flow_killed() {
    worker one
    other_seeds 7 || return
    (cd "$T/hub" && exec setsid python -m flows.benchmark) >"$T/killed.log" 2>&1 & local run=$!
    within 120 check busy "$T/hub" "transfer" || return
    kill -9 -- "-$run"; wait $run
    within 30 check idle "$T/hub" || { check idle "$T/hub"; return 1; }
    bench hub && check same "$T/hub" "$T/alone" && check sound "$T/hub"
}
servers_killed() {
    (cd "$T/hub" && check seeds "$T/hub" 9 && exec setsid python -m flows.benchmark --engine dvc) >"$T/outage.log" 2>&1 &
    local run=$!
    within 120 check busy "$T/hub" "transfer" || return
    kill -9 "$SERVERS"
    within 10 check refused_connection "$PREFECT_API_URL/health" || return
    wait $run || { cat "$T/outage.log"; return 1; }  # work goes on without servers
    servers && within 90 check online 2 && check deployments 6 && bench hub && check sound "$T/hub"
}
regression() { (cd "$T/hub" && python -m flows.regression --base HEAD --cases dense-128 "$@"); }
regression_none() { regression; }
regression_found() {
    rm -f "$T/notified"
    regression --inject 0.3; [ $? = 1 ] && within 60 grep -q '"verdict": "fail"' "$T/notified"
}
told() { check tracked regression 2 && (cd "$T/hub" && python -m stages.report && grep -q Regressions reports/report.html); }
orphans() {
    for pid in "${PIDS[@]}"; do kill -INT -- "-$pid" 2>/dev/null; done
    within 40 check idle "$T/hub" && within 40 check idle "$T/one" && within 40 check idle "$T/two"
}
secret() { # in all that was written but MLflow's accounts, and what Prefect gives to a run that is killed
    local found
    found=$(grep -rlaF "$SECRET" "$T" --exclude=step.log 2>/dev/null |
        grep -vE "/\.work/mlflow-auth\.ini$|/prefect-workspace-attempt-[^/]*/workspace\.json$")
    echo "$found"; [ -z "$found" ]
}

step "four clones" clones
step "single machine, plain DVC: the reference" alone
step "servers start" servers
step "a second make server says they run" servers_again
step "both servers refuse whoever brings no password" refused
step "make deploy, twice" deploy
step "two workers; a second one of a clone says it runs" workers
step "fan-out over two clones equals the reference" fan_out
step "deployment run by hand" by_hand
step "deployment run by a schedule" by_schedule
step "kill -9 of a worker: its cells move, results equal" worker_killed
step "kill -9 of the flow's group: a rerun gives equal results" flow_killed
step "kill -9 of the servers: work goes on, nothing is lost" servers_killed
step "regression without a slow-down passes" regression_none
step "regression with 30 % injected fails and notifies" regression_found
step "both regressions are in MLflow and in the report" told
step "ctrl-C ends servers and workers, no orphan" orphans
step "the passwords are in no file" secret

printf '\n%s\n' "${TABLE[@]}"
exit $FAILED
