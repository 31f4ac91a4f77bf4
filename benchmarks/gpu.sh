#!/usr/bin/env bash
# One GPU, one command, under 9 minutes: products and attention at the reference job's shapes, the tests that need a GPU,
# the reference job at full size, smaller GPTs, equality with the CPU, 8-bit products and real text. A table last; JSON
# under $OUT, or benchmarks/results if that is not set, and what failed parts said. --rehearse runs all on the CPU at toy sizes.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec python3 -m benchmarks.gpu "$@"
