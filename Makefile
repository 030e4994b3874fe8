# Everything a checkout needs. `make serve` and `make test` set up .venv by themselves.
#
#   make serve MODEL=path-or-hub-id PORT=8000 HOST=127.0.0.1 PREFILL=2 DECODE=2 ARGS='--max-num-seqs 64'
#   make test ARGS='-k router'      make test-faults      make chaos      make soak MINUTES=20
#   make test-api EXAMPLES=50      make test-clients      make test-security      make test-rolling ROUNDS=2
#   make check      make bench BASE_URL=http://127.0.0.1:8000
#
# PYTHON names the interpreter that .venv is made of (3.11 or newer). Where there is no GPU, PIP_EXTRA_INDEX_URL
# may point at an index with CPU wheels of torch: a far smaller download.

MODEL ?=
# Not ?=, as some shells export a HOST of their own.
HOST := 127.0.0.1
PORT ?= 8000
BASE_URL ?= http://127.0.0.1:$(PORT)
ARGS ?=
MINUTES ?= 20

VENV ?= .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.installed-runtime
TESTING := $(VENV)/.installed-test
CLIENTS := $(VENV)-clients/.installed
PICTURES := deploy/grafana/pictures/node_modules/.package-lock.json
TORCH := $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
SOURCES := protos:kernels:services/core:services/transfer:services/engine:services/prefill:services/decode
SOURCES := $(SOURCES):services/worker:services/router:services/bridge:services/cli:deploy/envoy:benchmarks

SECURITY := $(addprefix tests/,e2e/test_security.py e2e/test_tls.py $(addprefix unit/,test_tls.py test_https.py \
	test_bridge_keys.py test_request_head.py test_slow_clients.py test_fuzz.py test_tcp_lane.py test_tcp_lane_callers.py \
	test_transfer_protocol.py test_transfer_late.py test_transfer_decode_liars.py test_transfer_refusals.py))

IMAGES := router bridge edge worker pagewire

.PHONY: images locks manifests test-compose test-deploy serve test test-faults test-kernels test-api test-clients test-security test-rolling chaos soak pictures setup protos fuzz lint check fuzz-schemas bench clean
.DEFAULT_GOAL := serve

serve: $(RUNTIME)
	@exec $(BIN)/pagewire serve $(if $(MODEL),'$(MODEL)') --host '$(HOST)' --port '$(PORT)' \
		$(if $(PREFILL),--prefill '$(PREFILL)') $(if $(DECODE),--decode '$(DECODE)') $(ARGS)

test: $(TESTING)
	$(BIN)/python -m pytest $(ARGS)

# Every cell of the failure matrix, also in network namespaces where that is allowed: about ten minutes.
test-faults: $(TESTING)
	$(BIN)/python -m pytest -m 'faults or not faults' tests/e2e/test_fault_matrix.py tests/e2e/test_network_faults.py $(ARGS)

# Every case of every Triton kernel under the interpreter: about four minutes.
test-kernels: $(TESTING)
	PAGEWIRE_ALL_KERNEL_CASES=1 $(BIN)/python -m pytest tests/kernels $(ARGS)

# Whatever the OpenAPI document allows, and what it does not, EXAMPLES for each operation, without keys and with them:
# no 5xx, no hang, no leak.
test-api: $(TESTING)
	$(BIN)/python tests/fuzz_api.py --examples $(or $(EXAMPLES),50) $(ARGS)
	$(BIN)/python tests/fuzz_api.py --examples $(or $(EXAMPLES),50) --keys $(ARGS)

# Who may do what, and what strangers get: every route, call and port, other tenants, bent input; then what time tells.
test-security: $(TESTING)
	$(BIN)/python -m pytest $(SECURITY) $(ARGS)
	$(BIN)/python tests/timing_probe.py

# Every bridge, router and worker is restarted ROUNDS times behind Envoy, under load: no request is lost.
test-rolling: $(TESTING)
	$(BIN)/python tests/rolling.py --rounds $(or $(ROUNDS),2) $(ARGS)

# Clients with dependencies of their own, in an environment of their own.
test-clients: $(TESTING) $(CLIENTS)
	$(BIN)/python tests/other_clients.py $(VENV)-clients/bin/python $(ARGS)

# At least FAULTS random faults under load; SEED makes a run again.
chaos: $(TESTING)
	$(BIN)/python tests/chaos.py $(ARGS)

# MINUTES of mixed traffic with clients that leave: nothing may grow.
soak: $(TESTING)
	$(BIN)/python tests/soak.py --minutes $(MINUTES) --out benchmarks/results/soak.json $(ARGS)

# The dashboards in docs/images, of a cluster under load: about seven minutes. Needs npm, chromium and prometheus.
pictures: $(TESTING) $(PICTURES)
	$(BIN)/python tests/pictures.py $(ARGS)

setup: $(TESTING)

protos: $(TESTING)
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=protos --pyi_out=protos --grpc_python_out=protos \
		protos/pagewire/v1/*.proto

# Other examples of the fuzz tests every time, and as many as are asked for.
fuzz: $(TESTING)
	PAGEWIRE_FUZZ_EXAMPLES=$(or $(EXAMPLES),3000) $(BIN)/python -m pytest tests/unit/test_fuzz.py --timeout 3600 $(ARGS)

lint: $(TESTING)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	MYPYPATH=$(SOURCES) $(BIN)/mypy --explicit-package-bases --ignore-missing-imports --follow-imports=silent \
		services benchmarks deploy

check: lint test

# A thousand random JSON schemas: valid instances, or errors. SCHEMAS=10000 for a longer run.
fuzz-schemas: $(TESTING)
	$(BIN)/python tests/fuzz_schemas.py $(or $(SCHEMAS),1000)

bench: $(TESTING)
	$(BIN)/pagewire bench --base-url $(BASE_URL) $(ARGS)

# Every image, for CPUs. PIP_EXTRA_INDEX_URL: an index of CPU builds of torch. VARIANT=cuda makes pagewire-worker-cuda
# and pagewire-cuda.
BASE_IMAGE ?= python:3.11-slim-bookworm
BUILD_IMAGE ?= $(BASE_IMAGE)
VARIANT ?= cpu
PIP_ARGS ?=
SUFFIX := $(if $(filter cuda,$(VARIANT)),-cuda)
images:
	for target in $(if $(SUFFIX),worker pagewire,$(IMAGES)); do \
		DOCKER_BUILDKIT=1 docker build . --target $$target --build-arg VARIANT=$(VARIANT) \
			--build-arg BASE_IMAGE='$(BASE_IMAGE)' --build-arg BUILD_IMAGE='$(BUILD_IMAGE)' \
			--build-arg PIP_ARGS='$(PIP_ARGS)' --build-arg PIP_EXTRA_INDEX_URL="$$PIP_EXTRA_INDEX_URL" \
			-t $$(test $$target = pagewire && echo pagewire$(SUFFIX) || echo pagewire-$$target$(SUFFIX)) || exit 1; \
	done

# compose.yaml for real, with the images that `make images` has made. ARGS=--local where no registry can be reached.
test-compose:
	python3 tests/compose.py $(ARGS)

# The chart in several shapes and every overlay of kustomize, against Kubernetes' schemas. Nothing needs a cluster.
test-deploy: $(TESTING)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[deploy]'
	$(BIN)/python -m pytest tests/deploy tests/unit/test_images.py tests/unit/test_monitoring.py $(ARGS)

# kustomize's bases, from the chart.
manifests: $(TESTING)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[deploy]'
	$(BIN)/python deploy/kustomize/render.py

# What the images are made of, from pyproject.toml.
locks: $(TESTING)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python deploy/images/lock.py

clean:
	rm -rf $(VENV) $(VENV)-clients tests/node/node_modules deploy/grafana/pictures/node_modules dist build .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone, so that a CPU wheel that is already there, or on the extra index, is kept.
$(RUNTIME): pyproject.toml
	@test -x $(BIN)/python || sh .ci/make_venv $(VENV) $(PYTHON)
	$(BIN)/python -m pip install --disable-pip-version-check '$(TORCH)'
	$(BIN)/python -m pip install --disable-pip-version-check -e .
	$(BIN)/python -m pagewire_kernels.cpu.build
	@touch $@

$(TESTING): $(RUNTIME) tests/node/package-lock.json
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@npm ci --prefix tests/node --silent --no-audit --no-fund || \
		echo 'There is no npm, or it reaches no registry: the clients for Node are not tested.'
	@touch $@

$(CLIENTS): tests/clients/requirements.txt
	@test -x $(VENV)-clients/bin/python || sh .ci/make_venv $(VENV)-clients $(PYTHON)
	$(VENV)-clients/bin/python -m pip install --quiet --disable-pip-version-check -r tests/clients/requirements.txt
	@touch $@

$(PICTURES): deploy/grafana/pictures/package-lock.json
	npm ci --prefix deploy/grafana/pictures --silent --no-audit --no-fund --ignore-scripts
