#!/bin/bash
# flax 0.12.4: `nn.scan(..., check_constancy_invariants=False)` draws other
# parameters of the same key than `nn.scan` does by default. The option is one
# of tracing (the body is traced once, not twice); inside the scanned modules
# the keys are others all the same, outside of them they are not. A model that
# takes it up starts from other weights for its old seed.
#
# Seen 2026-11-29, flax 0.12.4, jax 0.10.2, CPU:
#   default scanned 0.0007 -0.0835 outside -0.7364
#   without scanned -0.2006 -0.1857 outside -0.7364
# Exits 0 where this is so, and 1 where it has changed.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 flax==0.12.4
cat > "$place/scan.py" <<'PYTHON'
import flax.linen as nn
import jax
import jax.numpy as jnp


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, unused):
    return x + nn.Dense(3, use_bias=False)(x), None


class Net(nn.Module):
  options: dict

  @nn.compact
  def __call__(self, x):
    scan = nn.scan(
      Block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=2,
      **self.options,
    )
    x, _ = scan(name="blocks")(x, None)
    return nn.Dense(3, use_bias=False, name="last")(x)


made = {}
for name, options in (
  ("default", {}),
  ("without", {"check_constancy_invariants": False}),
):
  params = Net(options).init(jax.random.key(0), jnp.ones((1, 3)))["params"]
  scanned = params["blocks"]["Dense_0"]["kernel"][:, 0, 0]
  last = params["last"]["kernel"]
  made[name] = scanned, last
  print(name, "scanned", *(f"{x:.4f}" for x in scanned), end=" ")
  print(f"outside {last[0, 0]:.4f}")
assert bool((made["default"][0] != made["without"][0]).all())
assert bool((made["default"][1] == made["without"][1]).all())
PYTHON
JAX_PLATFORMS=cpu "$place/venv/bin/python" "$place/scan.py"
