# Each target is one line that a person could type; set-up happens by itself.
#   make bench                    the benchmark: data, baseline, transfer, fine-tuning, profiling, report
#   make bench PROFILE=smoke      another profile of params/ (smoke, cpu, study*, gpu*)
#   make bench ENGINE=dvc         without Prefect
#   make bench POOL=cpu-pool      the cells on the workers of a work pool, through EUGEN_DVC_REMOTE
#   make test [ARGS="-k name"]    the test suite
#   make lint                     style, types, import contracts, generated tables
#   make audit                    known vulnerabilities of the pinned versions, where the database is reachable
#   make regression BASE=<ref>    is this commit slower, larger or worse? @name is an alias; default @baseline
#   make baseline REF=<ref>       name a commit for that: the alias `baseline`, or another one by ALIAS=name
#   make server [HOST=] [PORT=]   the Prefect and MLflow servers of this clone, on loopback
#   make deploy                   flows/prefect.yaml on the server: benchmark, cells, nightly, weekly
#   make worker POOL=cpu-pool     this clone works for the server
#   make gpu-check                all figures of this machine's GPU in nine minutes; torch and timm are enough
#   make push, make pull          share outputs through EUGEN_DVC_REMOTE (a folder, or s3://bucket/path)
#   make clean-runs OLDER=30d     what old runs left in MLflow and DVC's cache; APPLY=1 deletes it
#   make ui                       MLflow's pages with the runs, on this machine only

PYTHON ?= python3

export DO_NOT_TRACK := 1
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export PYTHONUNBUFFERED := 1

# The stamp's name holds what was installed: another pyproject.toml or constraints.txt makes it another file.
STAMP := .venv/.stamp-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
# DVC runs each stage with the `python` that it finds on PATH.
IN_VENV := PATH="$(CURDIR)/.venv/bin:$$PATH"
RUN := $(IN_VENV) .venv/bin/python -m

# Without set-up: machines with a GPU bring their own torch.
GPU_PYTHON := $(or $(wildcard .venv/bin/python),$(PYTHON))

.PHONY: bench test lint audit regression baseline server worker deploy gpu-check push pull clean-runs ui
bench: $(STAMP)
	@$(RUN) flows.benchmark $(if $(PROFILE),--profile $(PROFILE)) $(if $(ENGINE),--engine $(ENGINE)) \
	    $(if $(POOL),--pool $(POOL))

test: $(STAMP)
	@$(RUN) pytest -n 2 --dist loadfile $(ARGS)

lint: $(STAMP)
	@$(RUN) ruff check
	@$(RUN) ruff format --check
	@$(RUN) basedpyright
	@$(IN_VENV) lint-imports
	@$(RUN) stages.report --check

audit: $(STAMP)
	@.venv/bin/python .ci/audit.py

regression: $(STAMP)
	@$(RUN) flows.regression $(if $(BASE),--base $(BASE)) $(ARGS)

baseline: $(STAMP)
	@$(RUN) stages.tracking.baseline set $(or $(REF),HEAD) $(if $(ALIAS),--alias $(ALIAS))

server: $(STAMP)
	@$(RUN) flows.operate server $(if $(HOST),--host $(HOST)) $(if $(PORT),--port $(PORT)) \
	    $(if $(MLFLOW_PORT),--mlflow-port $(MLFLOW_PORT))

worker: $(STAMP)
	@$(RUN) flows.operate worker $(if $(POOL),--pool $(POOL)) $(if $(LIMIT),--limit $(LIMIT))

deploy: $(STAMP)
	@$(RUN) flows.operate deploy $(if $(NOTIFY),--notify $(NOTIFY))

gpu-check:
	@$(GPU_PYTHON) -m benchmarks.gpu_check $(ARGS)

ui: $(STAMP)
	@$(RUN) stages.tracking.ui $(ARGS)

push pull: $(STAMP)
	@$(RUN) flows.dvc.remote $@ $(if $(REMOTE),--remote $(REMOTE)) $(ARGS)

clean-runs: $(STAMP)
	@$(RUN) flows.dvc.clean --older $(or $(OLDER),30d) $(if $(APPLY),--apply)

# Old stamps go first and the new one comes last: an interrupted set-up leaves none and is taken up again.
.venv/.stamp-%:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and sys.argv[1] % sys.version_info[:2])' \
	    "Python 3.11 or newer is needed, $(PYTHON) is %d.%d: install one and name it, as in make bench PYTHON=python3.12"
	@echo "setting up .venv (a few minutes the first time)"
	@rm -f .venv/.stamp-*
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[suite,dev]'
	@touch $@
