#!/usr/bin/env bash
# flax.linen calls the initializer of every parameter not only in `init` but
# also, abstractly, each time that `apply` is traced: it compares the shape that
# the initializer would give with that of the parameter it was given. A module
# whose initializers are slow to trace is slow to compile for as often as it is
# traced, and an initializer with a side effect has it at apply, too. Seen with
# flax 0.12.8 and jax 0.10.2: of a jitted apply, one call for each parameter
# while it is traced, and none when it runs again.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet jax==0.10.2 flax==0.12.8
cat >"$work/run.py" <<'PY'
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

calls = []


def counted(key, shape, dtype=jnp.float32):
  calls.append(shape)
  return nn.initializers.lecun_normal()(key, shape, dtype)


class Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    for _ in range(3):
      x = nn.Dense(4, kernel_init=counted, use_bias=False)(x)
    return x


x = jnp.ones((1, 4))
params = Net().init(jax.random.key(0), x)
found = [len(calls)]
apply = jax.jit(Net().apply)
for _ in range(2):
  calls.clear()
  apply(params, x)
  found.append(len(calls))
print(f"jax {jax.__version__}, flax {flax.__version__}: initializers called"
      f" {found[0]} times by init, {found[1]} by the first apply, {found[2]} by"
      " the second")
assert found == [3, 3, 0], found
PY
JAX_PLATFORMS=cpu "$work/env/bin/python" "$work/run.py"
