#!/bin/bash
# clu 0.0.12 with JAX 0.10.2: metrics.Std cannot be computed any more. Its
# `compute` clips with `a_min`, an argument that jax.numpy.clip does not have, so
# that it is found only when the value is asked for: the sums are made as ever.
# clu's Average, made of the same values, is computed.
#
# Seen 2026-11-28, clu 0.0.12, jax 0.10.2, flax 0.12.4, CPU:
#   Average of 1 2 4: 2.3333
#   sums of Std: 7.0 21.0 3
#   Std.compute: TypeError ... unexpected keyword argument 'a_min'
# Exits 0 where this is so, and 1 where it has changed.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q clu==0.0.12 jax==0.10.2 jaxlib==0.10.2 \
  flax==0.12.4
cat > "$place/std.py" <<'PYTHON'
import jax.numpy as jnp
from clu import metrics

values = jnp.array([1.0, 2.0, 4.0])
average = metrics.Average.from_model_output(values)
print(f"Average of 1 2 4: {average.compute():.4f}")
std = metrics.Std.from_model_output(values)
print("sums of Std:", std.total, std.sum_of_squares, std.count)
try:
  print("Std.compute:", std.compute())
except TypeError as error:
  print("Std.compute: TypeError", error)
PYTHON
JAX_PLATFORMS=cpu "$place/venv/bin/python" "$place/std.py" | tee "$place/said"
grep -q "Std.compute: TypeError.*a_min" "$place/said"
