#!/bin/sh
# Base images and wheels on a Debian machine that reaches packages but no image registry: then
#   make images BASE_IMAGE=local/debian-python BUILD_IMAGE=local/debian-build PIP_ARGS=--no-index
set -eu
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
include=python3,python3-venv,ca-certificates
mmdebstrap --variant=minbase --include=$include bookworm "$work/base.tar"
mmdebstrap --variant=minbase --include=$include,g++ bookworm "$work/build.tar"
docker import "$work/base.tar" local/debian-python
docker import "$work/build.tar" local/debian-build
for lock in build front envoy worker; do
    python3 -m pip download -q --only-binary=:all: --no-deps --require-hashes -r $lock.lock -d wheels
done
# The image's Python may be older than this one, and needs what its markers ask for.
sed -n 's/^\(async-timeout==[^ ]*\).*/\1/p' front.lock | xargs python3 -m pip download -q --no-deps -d wheels
sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' ../../pyproject.toml | xargs python3 -m pip download -q --no-deps -d wheels
if prometheus=$(command -v prometheus); then
    cp "$prometheus" "$work/prometheus"
    printf 'FROM local/debian-python\nCOPY prometheus /usr/local/bin/\nRUN install -d -o 65534 /prometheus\nUSER 65534:65534\n' > "$work/Dockerfile"
    docker build -q -t pagewire-prometheus "$work"
fi
