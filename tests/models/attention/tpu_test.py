"""The TPU kernel against the einsums, and compiled for a real topology."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.aot import topology
from lavit_jax.core import sharding
from lavit_jax.models import blocks, layers, llama
from lavit_jax.models.attention import mesh as mesh_lib
from lavit_jax.models.attention import tpu
from lavit_jax.models.pixels import unet_blocks

pytestmark = pytest.mark.slow

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


def _einsums(arrays, **options):
  """The same by `layers.attention`; its scale is in the query already."""
  query, key, value, segments = arrays
  form = functools.partial(layers.attention, segment_ids=segments, **options)
  scale = query.shape[-1] ** 0.5
  out, gradients = _with_gradients(form)(query * scale, key, value)
  return out, (gradients[0] * scale, *gradients[1:])


def _kernel(arrays, sizes, causal=True, segments=None):
  query, key, value, own = arrays
  segments = segments if own is None else (own, own)
  count = int(np.prod([*sizes.values(), 1]))
  with sharding.use(sharding.make_mesh(sizes, jax.devices()[:count])):
    assert tpu.fits(query, key, causal=causal)
    form = lambda *rest: tpu.attend(
      *rest, segments, causal=causal, interpret=True
    )
    return jax.device_get(_with_gradients(form)(query, key, value))


def _assert_close(got, want):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
  ("length", "groups", "packed", "sizes"),
  [
    (256, 4, True, {}),
    (200, 2, True, {}),  # filled up
    (256, 1, False, {"data": 2, "tensor": 2}),  # one key head for two devices
    (512, 2, True, {"data": 2, "context": 2, "tensor": 2}),
    (1000, 4, True, {"context": 4}),
    (768, 4, True, {"context": 2}),  # halves of 192 places cannot trade
  ],
)
def test_kernel_equals_the_einsums(length, groups, packed, sizes):
  arrays = _arrays(length, groups, packed=packed)
  _assert_close(_kernel(arrays, sizes), _einsums(arrays, causal=True))


def test_both_backward_kernels_give_the_gradients(monkeypatch):
  """The fused one is for rows of few blocks, the two others for long ones."""
  arrays = _arrays(256, 2)
  assert tpu.block_sizes(256, 256).use_fused_bwd_kernel
  monkeypatch.setattr(tpu, "_MAX_FUSED_BLOCKS", 0)
  assert not tpu.block_sizes(256, 256).use_fused_bwd_kernel
  want = _einsums(arrays, causal=True)
  _assert_close(_kernel(arrays, {"context": 2}), want)


@pytest.mark.parametrize(
  ("length", "keys", "dim", "masked", "sizes"),
  [
    (257, 257, 88, False, {}),  # ViT-g
    (192, 256, 40, True, {"fsdp": 2}),  # as the merger's, kept to dropped
    (257, 257, 64, False, {"context": 2, "tensor": 2}),
  ],
)
def test_rows_without_a_causal_mask_equal_the_einsums(
  length, keys, dim, masked, sizes
):
  """Padding is not seen, nor masked keys; a row without any gives zeros."""
  query = _arrays(length, _HEADS, dim)[0]
  _, key, value, _ = _arrays(keys, _HEADS, dim)
  arrays = query, key, value, None
  mask = segments = None
  if masked:
    mask = jax.random.bernoulli(jax.random.key(3), 0.5, (_ROWS, 1, 1, keys))
    mask = mask.at[1].set(False)
    ones = jnp.ones((_ROWS, length), jnp.int32)
    segments = ones, mask[:, 0, 0].astype(jnp.int32)
  want = _einsums(arrays, mask=mask)
  assert not masked or not want[0][1].any()
  _assert_close(_kernel(arrays, sizes, False, segments), want)


def test_half_precision_stays_half():
  arrays = [x.astype(jnp.bfloat16) for x in _arrays(257, 4, 88)[:3]]
  out = tpu.attend(*arrays, None, causal=False, interpret=True)
  assert out.dtype == jnp.bfloat16
  want = _einsums([*[x.astype(jnp.float32) for x in arrays], None])[0]
  np.testing.assert_allclose(out.astype(jnp.float32), want, atol=2e-2)


def test_parts_of_the_sequence_get_equal_work():
  """Pairs that a causal mask leaves to each part, before and after trading."""
  length, parts = 1024, 4
  places = tpu._zigzag_positions(length, parts)
  assert sorted(places) == list(range(length))
  pairs = (places + 1).reshape(parts, -1).sum(1)
  assert pairs.max() == pairs.min()
  plain = np.arange(1, length + 1).reshape(parts, -1).sum(1)
  assert plain.max() > 6 * plain.min()


@pytest.mark.parametrize("length", [128, 384, 640, 1024, 2048, 4096, 32768])
def test_blocks_divide_the_row(length):
  sizes = tpu.block_sizes(length, length)
  for block in (sizes.block_q, sizes.block_kv, sizes.block_kv_compute):
    assert length % block == 0
    assert block % 128 == 0
  assert sizes.block_kv % sizes.block_kv_compute == 0
  assert sizes.block_kv <= max(length // 4, 512)


def test_rows_that_do_not_fit_are_left_to_the_einsums():
  def fits(*shape, keys=None, causal=True):
    key = jnp.zeros((shape[0], keys or shape[1], *shape[2:]))
    return tpu.fits(jnp.zeros(shape), key, causal=causal)

  assert fits(4, 256, 4, 128)
  assert fits(4, 200, 4, 128)
  assert not fits(4, 100, 4, 128)
  assert not fits(4, 256, 4, 16)
  assert not fits(4, 0, 4, 128)
  assert not fits(4, 128, 4, 128, keys=256)
  assert fits(4, 128, 4, 128, keys=256, causal=False)
  assert not fits(4, 4096, 4, 40, keys=77, causal=False)  # few logits
  with sharding.use(sharding.make_mesh({"data": 8})):
    assert not fits(4, 256, 4, 128)  # fewer rows than devices
    assert fits(8, 256, 4, 128)


def test_the_platform_is_the_meshs():
  assert mesh_lib.platform() == jax.default_backend() == "cpu"
  with sharding.use(sharding.make_mesh({"data": -1})):
    assert mesh_lib.platform() == "cpu"
  device = jax.sharding.AbstractDevice("TPU v6 lite", 1, "tpu")
  mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    assert mesh_lib.platform() == "tpu"
    assert tpu.block_sizes(8192, 8192).block_q == 1024
  assert tpu.block_sizes(8192, 8192).block_q == 512


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
      sharding.unbox(boxed),
      layout,
    )
    rows = sharding.batch_sharding(mesh)
    ids = jax.ShapeDtypeStruct((8, _LENGTH), jnp.int32, sharding=rows)
    step = jax.jit(jax.grad(loss), out_shardings=layout)
    return step.lower(variables, ids, ids).compile().as_text()


def _calls(hlo, phase, kind="_segmented"):
  """How often the kernel of a phase is called in an HLO text."""
  lines = hlo.splitlines()
  return sum(
    f"%splash_mha_{phase}{kind}" in line.split("=")[0]
    for line in lines
    if 'custom_call_target="tpu_custom_call"' in line
  )


def test_the_train_step_for_v5e_holds_the_kernel(monkeypatch):
  """Forward, not again where a policy saves the residuals, and backward."""
  pytest.importorskip("libtpu")
  save = jax.checkpoint_policies.save_only_these_names(tpu.RESIDUALS)
  monkeypatch.setitem(layers.REMAT, "attention only", save)
  sizes = {"fsdp": 2, "context": 2, "tensor": 2}
  hlo = _compiled(sizes, "attention only")
  assert _calls(hlo, "fwd") == 1
  assert _calls(hlo, "dkv") == 1
  assert not re.search(rf"\[\d+,\d+,\d{{3,}},{_LENGTH}\]", hlo), (
    "logits are there"
  )


@pytest.mark.parametrize(
  ("net", "length", "width"),
  [
    (blocks.SelfAttention(16, key_bias=False, dtype="bfloat16"), 257, 1408),
    (unet_blocks.Attention(10, "bfloat16"), 4096, 640),
  ],
  ids=["ViT-g", "SDXL"],
)
def test_full_size_attention_for_v5e_holds_no_logits(net, length, width):
  """Two rows a chip, and their gradients."""
  pytest.importorskip("libtpu")
  mesh = sharding.make_mesh({"fsdp": 4}, topology.devices("v5e:2x2"))
  with sharding.use(mesh):
    rows = sharding.batch_sharding(mesh)
    x = jax.ShapeDtypeStruct((8, length, width), jnp.bfloat16, sharding=rows)
    boxed = jax.eval_shape(lambda x: net.init(jax.random.key(0), x), x)
    variables = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      sharding.unbox(boxed),
      sharding.param_shardings(boxed, mesh),
    )
    loss = lambda *args: net.apply(*args).astype(jnp.float32).sum()
    made = jax.jit(jax.grad(loss, (0, 1))).lower(variables, x).compile()
  hlo = made.as_text()
  for phase in ("fwd", "dkv"):
    assert _calls(hlo, phase, "") == 1
  assert not re.search(rf"\[\d+,{length},{length}\]", hlo)
  assert not re.search(rf"\[\d+,\d+,{length},{length}\]", hlo)


@pytest.mark.libtpu
def test_wide_float32_heads_leave_vector_memory_to_the_config():
  """An autoencoder's attention, 8 rows a chip, where a config leaves 6 MiB."""
  pytest.importorskip("libtpu")
  mesh = sharding.make_mesh({"fsdp": 4}, topology.devices("v5e:2x2"))
  rows = sharding.batch_sharding(mesh)
  x = jax.ShapeDtypeStruct((32, 4096, 1, 512), jnp.float32, sharding=rows)
  attend = lambda x: layers.attention(x + 1, x * 2, x - 1) + 1
  with sharding.use(mesh):
    lowered = jax.jit(attend).lower(x)
  made = lowered.compile({"xla_tpu_scoped_vmem_limit_kib": "6144"})
  assert _calls(made.as_text(), "fwd", "") == 1


@pytest.mark.libtpu
def test_initializing_parameters_warns_of_no_missing_kernel(caplog):
  """Networks are looked at with one row, which no mesh divides."""
  pytest.importorskip("libtpu")
  layers._warn_of_einsums.cache_clear()
  mesh = sharding.make_mesh({"fsdp": 4}, topology.devices("v5e:2x2"))
  rows = lambda count: jax.ShapeDtypeStruct((count, 256, 2, 64), jnp.bfloat16)
  with sharding.use(mesh):
    jax.eval_shape(layers.attention, *[rows(1)] * 3)
    assert not caplog.records
    jax.eval_shape(layers.attention, *[rows(6)] * 3)  # not by 4
  assert "uses no kernel on this tpu" in caplog.text
