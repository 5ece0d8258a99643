"""The conditional U-Net."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.models import unet, unet_blocks

_CONFIG = unet.UNetConfig(
  in_channels=5,
  out_channels=3,
  channels=(8, 16),
  layers_per_block=1,
  attention=(False, True),
  transformer_layers=(1, 1),
  num_heads=(2, 2),
  cross_dim=6,
  groups=4,
)
_X = jax.random.normal(jax.random.key(1), (2, 4, 6, 5))
_T = jnp.array([3, 700])
_CONDITION = jax.random.normal(jax.random.key(2), (2, 7, 6))
_MASK = jnp.arange(7) < jnp.array([[4], [7]])
# Quick to compile; these programs are too small for optimizing to pay.
_QUICK = {"xla_backend_optimization_level": 0}


@pytest.fixture(scope="module")
def model():
  """(compiled apply, params), once for the tests of this file."""
  net = unet.UNet(_CONFIG)
  init = jax.jit(net.init, compiler_options=_QUICK)
  variables = nn.meta.unbox(init(jax.random.key(0), _X, _T, _CONDITION))
  return jax.jit(net.apply, compiler_options=_QUICK), variables


def _differ(a, b):
  return float(jnp.abs(a - b).max() / jnp.abs(a).max())


def test_output_has_the_shape_of_the_input(model):
  apply, variables = model
  out = apply(variables, _X, _T, _CONDITION, _MASK)
  assert out.shape == (2, 4, 6, 3)
  assert out.dtype == jnp.float32
  assert jnp.isfinite(out).all()


def test_step_and_condition_change_the_output(model):
  apply, variables = model
  out = apply(variables, _X, _T, _CONDITION, _MASK)
  other = apply(variables, _X, _T, _CONDITION + 1.0, _MASK)
  assert _differ(out, other) > 1e-3
  other = apply(variables, _X, jnp.array([3, 20]), _CONDITION, _MASK)
  assert _differ(out[0], other[0]) == 0
  assert _differ(out[1], other[1]) > 1e-3


def test_masked_condition_tokens_are_not_seen(model):
  apply, variables = model
  out = apply(variables, _X, _T, _CONDITION, _MASK)
  hidden = _CONDITION.at[0, 4:].add(100.0)
  np.testing.assert_allclose(
    apply(variables, _X, _T, hidden, _MASK), out, atol=1e-6
  )
  seen = _CONDITION.at[0, 3].add(1.0)
  assert _differ(out[0], apply(variables, _X, _T, seen, _MASK)[0]) > 1e-4


def test_gradient_reaches_every_parameter(model):
  _, variables = model

  def loss(variables):
    out = unet.UNet(_CONFIG).apply(variables, _X, _T, _CONDITION, _MASK)
    return jnp.square(out - 1.0)

  grad = jax.jit(jax.grad(lambda v: loss(v).sum()), compiler_options=_QUICK)
  grads = grad(variables)
  still = [
    jax.tree_util.keystr(path)
    for path, g in jax.tree_util.tree_leaves_with_path(grads)
    if not jnp.abs(g).max() > 0
  ]
  assert still == []


def test_every_parameter_names_its_axes():
  net = unet.UNet(_CONFIG)
  boxed = jax.eval_shape(net.init, jax.random.key(0), _X, _T, _CONDITION)
  leaves = jax.tree.leaves(
    boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
  )
  assert all(isinstance(leaf, nn.LogicallyPartitioned) for leaf in leaves)
  assert all(len(leaf.names) == leaf.value.ndim for leaf in leaves)


def test_stable_diffusion_has_its_number_of_parameters():
  net = unet.UNet(unet.SD15)
  shapes = jax.eval_shape(
    net.init,
    jax.random.key(0),
    jnp.zeros((1, 8, 8, 4)),
    jnp.zeros(1, jnp.int32),
    jnp.zeros((1, 5, 768)),
  )
  shapes = nn.meta.unbox(shapes)["params"]
  assert sum(x.size for x in jax.tree.leaves(shapes)) == 859_520_964
  up = shapes["up_blocks_1"]["attentions_2"]["transformer_blocks_0"]
  assert up["attn2"]["to_k"]["kernel"].shape == (768, 1280)
  assert shapes["up_blocks_0"]["resnets_2"]["conv1"]["kernel"].shape == (
    3,
    3,
    2560,
    1280,
  )


def test_timestep_features_begin_with_cosines():
  ours = unet_blocks.timestep_features(jnp.array([0, 5]), 4)
  rates = np.array([1.0, 0.01])
  wanted = np.concatenate([np.cos(5 * rates), np.sin(5 * rates)])
  np.testing.assert_allclose(ours[1], wanted, atol=1e-6)
  np.testing.assert_array_equal(ours[0], [1, 1, 0, 0])


def test_downsampling_pads_both_sides():
  """Zeros on both sides as torch does; XLA's SAME would pad the end only."""
  x = jnp.zeros((1, 4, 4, 1)).at[0, 0, 0, 0].set(1.0)
  down = unet_blocks.Downsample(1)
  kernel = jnp.arange(9.0).reshape(3, 3, 1, 1)
  params = {"conv": {"kernel": kernel, "bias": jnp.zeros(1)}}
  out = down.apply({"params": params}, x)
  assert out.shape == (1, 2, 2, 1)
  assert float(out[0, 0, 0, 0]) == 4.0  # the centre of the kernel


def test_sizes_that_do_not_fit_are_named():
  with pytest.raises(ValueError, match="Change unet"):
    dataclasses.replace(_CONFIG, num_heads=(2,))
  with pytest.raises(ValueError, match="groups=5"):
    dataclasses.replace(_CONFIG, groups=5)
