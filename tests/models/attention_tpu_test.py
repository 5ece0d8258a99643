"""The TPU kernel against the einsums, and compiled for a real topology."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax import sharding
from lavit_jax.models import attention_mesh, attention_tpu, layers, llama
from lavit_jax.train import state as state_lib
from lavit_jax.train import topology

_ROWS, _HEADS = 4, 4
_LENGTH = 1536  # of the rows compiled for v5e; no other size is the same


def _arrays(length, groups, dim=64, packed=True):
  """query, key, value and the segment ids of rows of some documents."""
  keys = jax.random.split(jax.random.key(0), 4)
  shape = (_ROWS, length, _HEADS, dim)
  query = jax.random.normal(keys[0], shape) * dim**-0.5
  key = jax.random.normal(keys[1], (_ROWS, length, groups, dim))
  value = jax.random.normal(keys[2], key.shape)
  if not packed:
    return query, key, value, None
  starts = jax.random.bernoulli(keys[3], 0.02, (_ROWS, length))
  return query, key, value, jnp.cumsum(starts, axis=1, dtype=jnp.int32)


def _with_gradients(form):
  """(output, gradients of a sum of sines) of a form of three arrays."""

  def run(*arrays):
    loss = lambda *arrays: jnp.sin(form(*arrays)).sum()
    return form(*arrays), jax.grad(loss, (0, 1, 2))(*arrays)

  return jax.jit(run)


def _einsums(arrays):
  query, key, value, segments = arrays
  form = functools.partial(
    layers.attention, causal=True, segment_ids=segments, scale=1.0
  )
  return _with_gradients(form)(query, key, value)


def _kernel(arrays, sizes):
  query, key, value, segments = arrays
  count = int(np.prod([*sizes.values(), 1]))
  with sharding.use(sharding.make_mesh(sizes, jax.devices()[:count])):
    assert attention_tpu.fits(query, key)
    form = lambda *rest: attention_tpu.attend(*rest, segments, interpret=True)
    return jax.device_get(_with_gradients(form)(query, key, value))


def _assert_close(got, want):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
  ("length", "groups", "packed", "sizes"),
  [
    (256, 4, True, {}),
    (384, 2, True, {"fsdp": 2, "tensor": 2}),
    (256, 1, False, {"data": 2, "tensor": 2}),  # one key head for two devices
    (512, 2, True, {"data": 2, "context": 2, "tensor": 2}),
    (1024, 4, True, {"context": 4}),
    (256, 4, True, {"context": 2}),  # halves of 64 places cannot trade
  ],
)
def test_kernel_equals_the_einsums(length, groups, packed, sizes):
  arrays = _arrays(length, groups, packed=packed)
  _assert_close(_kernel(arrays, sizes), _einsums(arrays))


def test_both_backward_kernels_give_the_gradients(monkeypatch):
  """The fused one is for rows of few blocks, the two others for long ones."""
  arrays = _arrays(256, 2)
  assert attention_tpu.block_sizes(256, 256).use_fused_bwd_kernel
  monkeypatch.setattr(attention_tpu, "_MOST_FUSED", 0)
  assert not attention_tpu.block_sizes(256, 256).use_fused_bwd_kernel
  _assert_close(_kernel(arrays, {"context": 2}), _einsums(arrays))


def test_parts_of_the_sequence_get_equal_work():
  """Pairs that a causal mask leaves to each part, before and after trading."""
  length, parts = 1024, 4
  places = attention_tpu._traded(length, parts)
  assert sorted(places) == list(range(length))
  pairs = (places + 1).reshape(parts, -1).sum(1)
  assert pairs.max() == pairs.min()
  plain = np.arange(1, length + 1).reshape(parts, -1).sum(1)
  assert plain.max() > 6 * plain.min()


@pytest.mark.parametrize("length", [128, 384, 640, 1024, 2048, 4096, 32768])
def test_blocks_divide_the_row(length):
  sizes = attention_tpu.block_sizes(length, length)
  for block in (sizes.block_q, sizes.block_kv, sizes.block_kv_compute):
    assert length % block == 0
    assert block % 128 == 0
  assert sizes.block_kv % sizes.block_kv_compute == 0
  assert sizes.block_kv <= max(length // 4, 512)


def test_rows_that_do_not_fit_are_left_to_the_einsums():
  fits = lambda *shape: attention_tpu.fits(jnp.zeros(shape), jnp.zeros(shape))
  assert fits(4, 256, 4, 128)
  assert not fits(4, 200, 4, 128)
  assert not fits(4, 256, 4, 32)
  assert not fits(4, 0, 4, 128)
  assert not attention_tpu.fits(
    jnp.zeros((4, 128, 4, 128)), jnp.zeros((4, 256, 4, 128))
  )
  with sharding.use(sharding.make_mesh({"data": 8})):
    assert not fits(4, 256, 4, 128)  # fewer rows than devices
    assert fits(8, 256, 4, 128)


def test_the_platform_is_the_meshs():
  assert attention_mesh.platform() == jax.default_backend() == "cpu"
  with sharding.use(sharding.make_mesh({"data": -1})):
    assert attention_mesh.platform() == "cpu"
  device = jax.sharding.AbstractDevice("TPU v6 lite", 1, "tpu")
  mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    assert attention_mesh.platform() == "tpu"
    assert attention_tpu.block_sizes(8192, 8192).block_q == 1024
  assert attention_tpu.block_sizes(8192, 8192).block_q == 512


def _compiled(sizes, remat):
  """HLO of the gradients of a small LLaMA on eight chips of v5e."""
  mesh = sharding.make_mesh(sizes, topology.devices("v5e:2x4"))
  model = llama.Llama(
    llama.LlamaConfig(
      vocab_size=512,
      width=1024,
      depth=2,
      num_heads=8,
      num_kv_heads=8,
      mlp_dim=1024,
      dtype="bfloat16",
      remat=remat,
    )
  )
  init = lambda: model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))

  def loss(variables, tokens, segments):
    out = model.apply(
      variables, tokens, segment_ids=segments, return_hidden=True
    )
    return jnp.square(out.astype(jnp.float32)).sum()

  with sharding.use(mesh):
    boxed = jax.eval_shape(init)
    layout = sharding.param_shardings(boxed, mesh)
    variables = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      state_lib.unbox(boxed),
      layout,
    )
    rows = sharding.batch_sharding(mesh)
    ids = jax.ShapeDtypeStruct((8, _LENGTH), jnp.int32, sharding=rows)
    step = jax.jit(jax.grad(loss), out_shardings=layout)
    return step.lower(variables, ids, ids).compile().as_text()


def _calls(hlo, phase):
  """How often the kernel of a phase is called in an HLO text."""
  lines = hlo.splitlines()
  return sum(
    f"%splash_mha_{phase}_segmented" in line.split("=")[0]
    for line in lines
    if 'custom_call_target="tpu_custom_call"' in line
  )


@pytest.mark.parametrize(
  ("sizes", "remat", "forwards"),
  [
    ({"fsdp": 4, "tensor": 2}, "full", 2),
    ({"fsdp": 2, "context": 2, "tensor": 2}, "attention only", 1),
  ],
)
def test_the_train_step_for_v5e_holds_the_kernel(
  sizes, remat, forwards, monkeypatch
):
  """Forward, its rerun unless a policy saves the residuals, and backward."""
  pytest.importorskip("libtpu")
  save = jax.checkpoint_policies.save_only_these_names(attention_tpu.RESIDUALS)
  monkeypatch.setitem(layers.REMAT, "attention only", save)
  hlo = _compiled(sizes, remat)
  assert _calls(hlo, "fwd") == forwards
  assert _calls(hlo, "dkv") == 1
  assert not re.search(rf"\[\d+,\d+,\d{{3,}},{_LENGTH}\]", hlo), (
    "logits are there"
  )
