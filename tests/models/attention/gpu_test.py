"""What cuDNN is asked, and that it is what the einsums compute.

cuDNN computes on a GPU alone. Here `jax.nn`'s own form answers in its place,
with the same arguments; lowering_test.py lowers the kernel where it can.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.core import sharding
from lavit_jax.models import layers
from lavit_jax.models.attention import gpu


@pytest.fixture(autouse=True)
def asked(monkeypatch):
  """Arguments of each call of the library, answered by its form in XLA."""
  calls, real = [], jax.nn.dot_product_attention

  def answer(*arrays, implementation, **kwargs):
    assert implementation == "cudnn"
    calls.append({**kwargs, "dtype": arrays[0].dtype.name})
    return real(*arrays, implementation="xla", **kwargs)

  monkeypatch.setattr(jax.nn, "dot_product_attention", answer)
  monkeypatch.setattr(gpu, "_has_cudnn", lambda: True)
  return calls


def _arrays(groups, dim, length=256, keys=256, dtype=jnp.float32):
  rngs = jax.random.split(jax.random.key(0), 4)
  query = jax.random.normal(rngs[0], (4, length, 4, dim), dtype)
  key = jax.random.normal(rngs[1], (4, keys, groups, dim), dtype)
  value = jax.random.normal(rngs[2], key.shape, dtype)
  starts = jax.random.bernoulli(rngs[3], 0.02, (4, length))
  return (query, key, value), jnp.cumsum(starts, axis=1, dtype=jnp.int32)


def _with_gradients(form):
  def run(*arrays):
    loss = lambda *arrays: jnp.sin(form(*arrays)).sum()
    return form(*arrays), jax.grad(loss, (0, 1, 2))(*arrays)

  return jax.jit(run)


@pytest.mark.parametrize(
  ("kind", "groups", "sizes"),
  [
    ("packed", 4, {}),
    ("packed", 2, {"fsdp": 2, "tensor": 2}),
    ("packed", 2, {"context": 4}),
    ("causal", 1, {"data": 2, "tensor": 2}),
    ("all", 4, {"data": 2, "context": 2}),
    ("keys", 4, {"fsdp": 4}),
    ("odd", 4, {"context": 2}),
  ],
)
def test_the_cudnn_call_computes_what_the_einsums_compute(
  kind, groups, sizes, asked
):
  length = {"keys": 130, "odd": 129}.get(kind, 256)
  keys = 131 if kind == "odd" else 256
  arrays, segments = _arrays(groups, 40, length, keys)
  mask = jax.random.bernoulli(jax.random.key(5), 0.5, (4, 1, 1, 256))
  mask = mask.at[2].set(False)  # a row that sees no key gives zeros
  ids = {"packed": (segments, segments)}.get(kind)
  options = {"causal": kind in ("packed", "causal")}
  plain = functools.partial(layers.attention, **options)
  if kind == "packed":
    plain = functools.partial(plain, segment_ids=segments)
  if kind == "keys":
    plain = functools.partial(plain, mask=mask)
    ids = jnp.ones((4, 130), jnp.int32), mask[:, 0, 0].astype(jnp.int32)
  want = _with_gradients(plain)(*arrays)
  assert not asked  # on a CPU
  count = int(np.prod([*sizes.values(), 1]))
  with sharding.use(sharding.make_mesh(sizes, jax.devices()[:count])):

    def kernel(query, key, value):
      query = query * query.shape[-1] ** -0.5
      return gpu.attend(query, key, value, ids, **options)

    got = jax.device_get(_with_gradients(kernel)(*arrays))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)
  # Told of a causal mask by name, cuDNN skips what it hides.
  by_name = options["causal"] and sizes.get("context", 1) == 1
  assert {call["is_causal"] for call in asked} == {by_name}
  whole = kind in ("causal", "all")
  assert {call["mask"] is None for call in asked} == {whole}


def test_attention_uses_cudnn_on_a_gpu(asked):
  (query, key, value), _ = _arrays(4, 88, 257, 257, jnp.bfloat16)
  device = jax.sharding.AbstractDevice("gpu", None, "gpu")
  mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
  mask = jnp.ones((4, 1, 257, 257), bool)
  with jax.sharding.use_abstract_mesh(mesh):
    run = functools.partial(jax.eval_shape, layers.attention)
    assert run(query, key, value).dtype == jnp.bfloat16
    assert [call["dtype"] for call in asked] == ["bfloat16"]
    jax.eval_shape(
      lambda *x: layers.attention(*x, mask=mask), query, key, value
    )
    assert len(asked) == 1  # any mask at all: einsums


def test_rows_that_do_not_fit_are_left_to_the_einsums(monkeypatch):
  def fits(*shape, dtype=jnp.bfloat16, keys=None, causal=True):
    query = jnp.zeros(shape, dtype)
    key = jnp.zeros((shape[0], keys or shape[1], *shape[2:]), dtype)
    return gpu.fits(query, key, causal=causal)

  assert fits(2, 131, 4, 64)
  assert not fits(2, 64, 4, 64)
  assert not fits(2, 128, 4, 12)
  assert not fits(2, 128, 4, 256)
  assert not fits(2, 128, 4, 64, dtype=jnp.float32)
  assert not fits(2, 128, 4, 64, keys=256)
  assert fits(2, 128, 4, 64, keys=256, causal=False)
  with sharding.use(sharding.make_mesh({"data": 2, "context": 4})):
    assert fits(2, 510, 4, 64)
    assert not fits(3, 512, 4, 64)
  monkeypatch.setattr(gpu, "_has_cudnn", lambda: False)
  assert not fits(2, 128, 4, 64)
