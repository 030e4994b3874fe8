#!/bin/sh
# Envoy, with a configuration made of the flags of `pagewire envoy-config`.
set -eu
pagewire envoy-config /tmp/envoy "$@"
exec envoy -c /tmp/envoy/envoy.yaml --log-level "${ENVOY_LOG_LEVEL:-warning}" --use-dynamic-base-id
