#!/bin/bash
# JAX 0.10.2: a bound on a compilation cache that was filled without one stops
# the cache. Eviction reads a `NAME-atime` file for every program; programs that
# were written while jax_compilation_cache_max_size was -1 (the default) have
# none, so that every later write fails. JAX gives a warning and compiles again
# in each process; nothing new is ever stored. Start with an empty folder.
#
# Seen 2026-11-28, jax and jaxlib 0.10.2, filelock 4.3.1, CPU:
#   entries without a bound: 3
#   entries after a second program with a bound: 3
#   UserWarning: Error writing persistent compilation cache entry ...
#   FileNotFoundError: ... -atime
# Exits 0 where this is so, and 1 where it has changed.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 filelock==4.3.1
cat > "$place/program.py" <<'PYTHON'
import sys

import jax
import jax.numpy as jnp

jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_compilation_cache_max_size", int(sys.argv[2]))
power = int(sys.argv[3])
jax.jit(lambda x: x**power @ x).lower(jnp.ones((4, 4))).compile()
PYTHON
run() { JAX_PLATFORMS=cpu "$place/venv/bin/python" "$place/program.py" "$@"; }
count() { find "$place/cache" -name '*-cache' | wc -l; }
run "$place/cache" -1 3
first=$(count)
run "$place/cache" 100000000 5 2> "$place/said"
second=$(count)
echo "entries without a bound: $first"
echo "entries after a second program with a bound: $second"
grep -E "Error writing|atime" "$place/said" | cut -c1-200 || true
[[ $first -gt 0 && $second -eq $first ]] && grep -q "atime" "$place/said"
