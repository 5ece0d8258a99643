"""The GPU kernel against the einsums; lowering_test.py lowers it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax import sharding
from lavit_jax.models import attention_gpu, layers


def _arrays(groups, packed, dim):
  keys = jax.random.split(jax.random.key(0), 4)
  query = jax.random.normal(keys[0], (4, 256, 4, dim)) * dim**-0.5
  key = jax.random.normal(keys[1], (4, 256, groups, dim))
  value = jax.random.normal(keys[2], key.shape)
  starts = jax.random.bernoulli(keys[3], 0.02, (4, 256))
  segments = jnp.cumsum(starts, axis=1, dtype=jnp.int32)
  return (query, key, value), segments if packed else None


def _with_gradients(form):
  def run(*arrays):
    loss = lambda *arrays: jnp.sin(form(*arrays)).sum()
    return form(*arrays), jax.grad(loss, (0, 1, 2))(*arrays)

  return jax.jit(run)


@pytest.mark.parametrize(
  ("groups", "packed", "dim", "sizes"),
  [
    (4, True, 64, {}),
    (2, True, 40, {"fsdp": 2, "tensor": 2}),
    (1, False, 64, {"data": 2, "tensor": 2}),
  ],
)
def test_kernel_equals_the_einsums(groups, packed, dim, sizes):
  arrays, segments = _arrays(groups, packed, dim)
  plain = functools.partial(
    layers.attention, causal=True, segment_ids=segments, scale=1.0
  )
  want = _with_gradients(plain)(*arrays)
  count = int(np.prod([*sizes.values(), 1]))
  with sharding.use(sharding.make_mesh(sizes, jax.devices()[:count])):
    assert attention_gpu.fits(*arrays[:2])
    kernel = lambda *arrays: attention_gpu.attend(
      *arrays, segments, interpret=True
    )
    got = jax.device_get(_with_gradients(kernel)(*arrays))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)


def test_rows_that_do_not_fit_are_left_to_the_einsums():
  fits = lambda *shape: attention_gpu.fits(jnp.zeros(shape), jnp.zeros(shape))
  assert fits(2, 128, 4, 64)
  assert not fits(2, 130, 4, 64)
  assert not fits(2, 128, 4, 8)
  assert not fits(2, 128, 4, 256)
  with sharding.use(sharding.make_mesh({"data": 2, "context": 4})):
    assert not fits(2, 512, 4, 64)


def test_the_library_is_told_of_a_causal_mask_alone(monkeypatch):
  """cuDNN skips what such a mask hides; given an array it could not."""
  (query, key, value), segments = _arrays(2, True, 16)
  told, real = [], jax.nn.dot_product_attention

  def spy(*arrays, **kwargs):
    told.append((kwargs["is_causal"], kwargs["mask"] is None))
    return real(*arrays, **kwargs)

  monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
  run = functools.partial(layers.attention, query, key, value, causal=True)
  np.testing.assert_allclose(run(implementation="xla"), run(), atol=2e-5)
  packed = functools.partial(run, segment_ids=segments)
  np.testing.assert_allclose(packed(implementation="xla"), packed(), atol=2e-5)
  assert told == [(True, True), (False, False)]
