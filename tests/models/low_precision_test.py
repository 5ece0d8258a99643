"""Products in int8 and fp8: near enough, really narrow, and they learn."""

import re
import sys

import jax
import numpy as np
import optax
import pytest

from lavit_jax.core import errors
from lavit_jax.models import llama, low_precision
from lavit_jax.models import matmul as matmul_lib

# Rounding to 127 steps of the largest, and to 3 and 2 bits of mantissa.
_ERRORS = {"int8": (0.015, 0.015), "fp8": (0.05, 0.08)}


def _arrays(dtype):
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = (2, 5, 256), (256, 128), (2, 5, 128)
  return (
    jax.random.normal(key, shape, dtype)
    for key, shape in zip(keys, shapes, strict=True)
  )


def _error(a, b):
  a, b = (np.asarray(x, np.float32) for x in (a, b))
  return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", sorted(low_precision.FORMATS))
def test_products_and_gradients_are_near_those_in_full(name, dtype):
  x, kernel, grad = _arrays(dtype)
  x = x.at[0, 0].multiply(1e3)  # rows have scales of their own
  plain, plain_back = jax.vjp(matmul_lib.linear, x, kernel)
  ours, back = jax.vjp(lambda x, k: low_precision.linear(x, k, name), x, kernel)
  assert ours.dtype == plain.dtype
  forward, backward = _ERRORS[name]
  for row, expected in zip(ours[0], plain[0], strict=True):
    assert 0 < _error(row, expected) < forward * 1.5
  (by_x, by_kernel), (plain_x, plain_kernel) = back(grad), plain_back(grad)
  assert 0 < _error(by_x, plain_x) < backward
  np.testing.assert_array_equal(by_kernel, plain_kernel)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize(
  ("name", "forward", "backward"),
  [
    ("int8", ("i8", "i8"), ("i8", "i8")),
    ("fp8", ("f8E4M3FN",) * 2, ("f8E5M2", "f8E4M3FN")),
  ],
)
def test_products_have_low_precision_operands(
  name, forward, backward, platform
):
  x, kernel, grad = _arrays("bfloat16")

  def both(x, kernel, grad):
    out, back = jax.vjp(
      lambda x, k: low_precision.linear(x, k, name), x, kernel
    )
    return out, back(grad)

  lowers = jax.export.export(jax.jit(both), platforms=[platform])
  text = lowers(x, kernel, grad).mlir_module()
  found = re.findall(
    r"dot_general.*\(tensor<[\dx]+x(\w+)>, tensor<[\dx]+x(\w+)>\)", text
  )
  assert sorted(found) == sorted([forward, backward, ("bf16", "bf16")])


def test_a_language_model_learns_a_batch_as_fast_as_in_full():
  tokens = jax.random.randint(jax.random.key(1), (4, 32), 3, 120)

  def losses(matmul):
    config = llama.LlamaConfig(
      vocab_size=128,
      width=64,
      depth=2,
      num_heads=4,
      num_kv_heads=2,
      mlp_dim=128,
      matmul=matmul,
    )
    model = llama.Llama(config)
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    tx = optax.adam(3e-3)

    def loss(params):
      logits = model.apply(params, tokens)
      each = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1], tokens[:, 1:]
      )
      return each.mean()

    @jax.jit
    def step(params, state):
      value, grads = jax.value_and_grad(loss)(params)
      updates, state = tx.update(grads, state)
      return optax.apply_updates(params, updates), state, value

    state = tx.init(params)
    found = []
    for _ in range(60):
      params, state, value = step(params, state)
      found.append(float(value))
    return found

  plain, ours = losses(""), losses("int8")
  assert plain[0] > 4
  assert ours[-1] < 0.5
  assert ours != plain
  assert abs(np.mean(ours[20:40]) - np.mean(plain[20:40])) < 0.1


def test_an_unknown_format_and_a_missing_library_say_what_to_do(monkeypatch):
  with pytest.raises(
    errors.ConfigError, match=r"expected one of \['fp8', 'int8'\]"
  ):
    low_precision.check("int4")
  low_precision.check("fp8")
  monkeypatch.setitem(sys.modules, "qwix", None)
  low_precision.check("")
  with pytest.raises(errors.ConfigError, match="pip install qwix"):
    low_precision.check("int8")
