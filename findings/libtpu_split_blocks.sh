#!/bin/bash
# libtpu 0.0.42.1 (the one that jax[tpu] 0.10.2 pins), compiling ahead of time
# for TPU7x: a float32 vector that the chips share, cut into blocks for a scan,
# is "Reshape should have supported layout before reaching the emitter". The
# same program compiles for v5e, and for TPU7x where the matrix is cut into
# blocks first and the vector is made of each block inside the scan.
#
# Seen 2026-11-29, Python 3.11, on a CPU:
#   v5e, vector in blocks: compiles
#   TPU7x, vector in blocks: FAILED_PRECONDITION
#   TPU7x, matrix in blocks: compiles
# Exits 0 where this is so, and 1 where it has changed.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 libtpu==0.0.42.1
cat > "$place/compile.py" <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies


def tried(topology, summed):
  """What becomes of a program for a slice of eight devices."""
  found = topologies.get_topology_desc(
    platform="tpu", topology_name=topology
  ).devices
  mesh = jax.sharding.Mesh(np.array(found), ("rows",))
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
  x = jax.ShapeDtypeStruct((16384, 32), jnp.float32, sharding=split)
  try:
    jax.jit(summed).lower(x).compile()
  except jax.errors.JaxRuntimeError as error:
    return str(error).split(":")[0]
  return "compiles"


def sums(blocks, of_block):
  add = lambda total, block: (total + of_block(block), None)
  return jax.lax.scan(add, jnp.zeros(1024), blocks)[0]


def vector(x):
  return sums((x * x).sum(-1).reshape(16, 1024), lambda block: block)


def matrix(x):
  return sums(x.reshape(16, 1024, 32), lambda block: (block * block).sum(-1))


print("v5e, vector in blocks:", tried("v5e:2x4", vector))
print("TPU7x, vector in blocks:", tried("tpu7x:2x2x1", vector))
print("TPU7x, matrix in blocks:", tried("tpu7x:2x2x1", matrix))
PYTHON
TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu "$place/venv/bin/python" \
  "$place/compile.py" 2> "$place/log" | tee "$place/said"
diff "$place/said" - <<'SEEN'
v5e, vector in blocks: compiles
TPU7x, vector in blocks: FAILED_PRECONDITION
TPU7x, matrix in blocks: compiles
SEEN
