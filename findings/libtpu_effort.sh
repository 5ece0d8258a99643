#!/bin/bash
# `jax_exec_time_optimization_effort` of JAX 0.10.2: at -1 libtpu 0.0.42.1 (the
# one that jax[tpu] 0.10.2 pins) compiles a Pallas kernel and its gradients
# ahead of time for v5e in less than half of the time, to the same kernels. The
# CPU backend takes no notice: its program is the same to the letter. So tests
# that compile for TPUs gain from it, and those that run on CPUs do not.
#
# Seen 2026-11-30, Python 3.11, on two CPU cores:
#   v5e: less than half of the time: True, kernels 3 and 3
#   CPU: same program: True
# Exits 0 where this is so, and 1 where it has changed.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 libtpu==0.0.42.1
cat > "$place/compile.py" <<'PYTHON'
import sys
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as masks,
)

chip = topologies.get_topology_desc(
  platform="tpu", topology_name="v5e:2x2"
).devices[0]
place = jax.sharding.SingleDeviceSharding(chip)
mask = masks.MultiHeadMask([masks.CausalMask((2048, 2048))] * 8)
kernel = splash.make_splash_mha_single_device(mask)


def loss(q, k, v):
  for _ in range(3):
    q = jnp.tanh(kernel(q, k, v))
  return q.astype(jnp.float32).sum()


def compiled(effort, function, *args):
  """(seconds, text of the program) at an effort."""
  jax.clear_caches()
  jax.config.update("jax_exec_time_optimization_effort", effort)
  start = time.perf_counter()
  text = jax.jit(function).lower(*args).compile().as_text()
  return time.perf_counter() - start, text


def kernels(text):
  lines = [x for x in text.splitlines() if "tpu_custom_call" in x]
  return len({x.split("=")[0].strip().split(".")[0] for x in lines})


x = jax.ShapeDtypeStruct((8, 2048, 128), jnp.bfloat16, sharding=place)
gradients = jax.grad(loss, (0, 1, 2))
compiled(0.0, gradients, x, x, x)  # libtpu itself is loaded
all_seconds, whole = compiled(0.0, gradients, x, x, x)
few_seconds, less = compiled(-1.0, gradients, x, x, x)
print(
  f"v5e: less than half of the time: {few_seconds < all_seconds / 2},"
  f" kernels {kernels(whole)} and {kernels(less)}"
)


def small(x):
  step = lambda c, w: (jnp.tanh(c @ w), None)
  return jax.lax.scan(step, x, jnp.stack([x] * 4))[0]


y = jnp.ones((64, 64))
slope = jax.grad(lambda x: small(x).sum())
(_, whole), (_, less) = (compiled(effort, slope, y) for effort in (0.0, -1.0))
print(f"CPU: same program: {whole == less}")
print(f"{all_seconds:.1f} s and {few_seconds:.1f} s", file=sys.stderr)
PYTHON
TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu "$place/venv/bin/python" \
  "$place/compile.py" 2> "$place/log" | tee "$place/said"
tail -1 "$place/log"
diff "$place/said" - <<'SEEN'
v5e: less than half of the time: True, kernels 3 and 3
CPU: same program: True
SEEN
