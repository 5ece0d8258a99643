"""The conditional U-Net."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.core import errors, sharding
from lavit_jax.models.pixels import unet, unet_blocks

pytestmark = pytest.mark.slow

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


def _gradients(config, variables):
  def loss(variables):
    out = unet.UNet(config).apply(variables, _X, _T, _CONDITION, _MASK)
    return jnp.square(out - 1.0).sum()

  grad = jax.jit(jax.grad(loss)).trace(variables)
  compiled = grad.lower().compile(compiler_options=_QUICK)
  return compiled(variables), str(grad.jaxpr)


@pytest.fixture(scope="module")
def gradients(model):
  """Gradients by every parameter, and how they are computed."""
  return _gradients(_CONFIG, model[1])


def test_gradient_reaches_every_parameter(gradients):
  still = [
    jax.tree_util.keystr(path)
    for path, g in jax.tree_util.tree_leaves_with_path(gradients[0])
    if not jnp.abs(g).max() > 0
  ]
  assert still == []


def test_recomputing_changes_no_gradient(model, gradients):
  once, plain = gradients
  config = dataclasses.replace(_CONFIG, remat="full")
  again, recomputed = _gradients(config, model[1])
  assert "nothing_saveable" in recomputed
  assert "nothing_saveable" not in plain
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    once,
    again,
  )


def test_every_parameter_names_its_axes():
  net = unet.UNet(_CONFIG)
  boxed = jax.eval_shape(net.init, jax.random.key(0), _X, _T, _CONDITION)
  leaves = jax.tree.leaves(
    boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
  )
  assert all(isinstance(leaf, nn.LogicallyPartitioned) for leaf in leaves)
  assert all(len(leaf.names) == leaf.value.ndim for leaf in leaves)


def _abstract(config):
  """Boxed abstract parameters; nothing is computed."""
  inputs = [
    jnp.zeros((1, 4, 4, config.in_channels)),
    jnp.zeros(1, jnp.int32),
    jnp.zeros((1, 5, config.cross_dim)),
  ]
  if config.details.added_dim:
    inputs += [None, jnp.zeros((1, 1280)), jnp.zeros((1, 6))]
  net = unet.UNet(config)
  return jax.eval_shape(net.init, jax.random.key(0), *inputs)["params"]


def test_stable_diffusion_has_its_number_of_parameters():
  shapes = nn.meta.unbox(_abstract(unet.SD15_UNET))
  assert sum(x.size for x in jax.tree.leaves(shapes)) == 859_520_964
  up = shapes["up_blocks_1"]["attentions_2"]["transformer_blocks_0"]
  assert up["attn2"]["to_k"]["kernel"].shape == (768, 1280)
  assert shapes["up_blocks_0"]["resnets_2"]["conv1"]["kernel"].shape == (
    3,
    3,
    2560,
    1280,
  )


def test_sdxl_has_its_number_of_parameters_and_can_be_sharded():
  boxed = _abstract(unet.SDXL_UNET)
  shapes = nn.meta.unbox(boxed)
  assert sum(x.size for x in jax.tree.leaves(shapes)) == 2_567_463_684
  middle = shapes["mid_block"]["attentions_0"]["transformer_blocks"]
  assert middle["norm1"]["scale"].shape == (10, 1280)
  # Latents have 4 channels, which 8 devices do not divide.
  mesh = sharding.make_mesh({"fsdp": 8})
  specs = sharding.param_shardings(boxed, mesh)
  assert tuple(specs["conv_in"]["kernel"].spec) == (None, None, None, "tensor")
  block = specs["down_blocks_1"]["attentions_0"]["transformer_blocks"]
  spec = tuple(block["attn1"]["to_q"]["kernel"].spec)
  assert spec == (None, "fsdp", "tensor")


def test_any_sides_will_do(model):
  """Odd sides are halved upwards; the way up cuts what is too much."""
  apply, variables = model
  x = jax.random.normal(jax.random.key(5), (2, 3, 5, 5))
  assert apply(variables, x, _T, _CONDITION, _MASK).shape == (2, 3, 5, 3)


def test_layers_and_depths_go_by_level():
  config = dataclasses.replace(
    _CONFIG, layers_per_block=(1, 2), transformer_layers=(1, 3)
  )
  shapes = nn.meta.unbox(_abstract(config))
  resnets = lambda block: sum("resnets" in name for name in shapes[block])
  blocks = ("down_blocks_0", "down_blocks_1", "up_blocks_0", "up_blocks_1")
  assert [resnets(block) for block in blocks] == [1, 2, 3, 2]
  middle = shapes["mid_block"]["attentions_0"]
  assert sum("transformer_blocks" in name for name in middle) == 3


_ADDED = dataclasses.replace(
  _CONFIG, details=unet.DiffusersQuirks(added_dim=4 + 3 * 2, added_time_dim=2)
)


def test_pooled_condition_and_sizes_change_the_output():
  net = unet.UNet(_ADDED)
  pooled, sizes = jnp.ones((2, 4)), jnp.array([[512.0, 0, 3]] * 2)
  args = (_X, _T, _CONDITION, _MASK)
  init = jax.jit(net.init, compiler_options=_QUICK)
  variables = init(jax.random.key(0), *args, pooled, sizes)
  apply = jax.jit(net.apply, compiler_options=_QUICK)
  out = apply(variables, *args, pooled, sizes)
  other = apply(variables, *args, pooled.at[0, 1].add(1.0), sizes)
  assert _differ(out[0], other[0]) > 1e-4
  assert _differ(out[1], other[1]) == 0
  other = apply(variables, *args, pooled, sizes.at[1, 2].add(1.0))
  assert _differ(out[1], other[1]) > 1e-4
  assert _differ(out[0], other[0]) == 0


@pytest.mark.parametrize(
  ("config", "pooled", "sizes"),
  [
    (_CONFIG, (2, 4), None),
    (_ADDED, None, None),
    (_ADDED, (2, 4), None),
    (_ADDED, (2, 4), (2, 4)),
  ],
)
def test_an_addition_that_does_not_fit_is_refused(config, pooled, sizes):
  zeros = lambda shape: None if shape is None else jnp.zeros(shape)
  net = unet.UNet(config)
  with pytest.raises(errors.UsageError, match="pooled and sizes"):
    jax.eval_shape(
      lambda: net.init(
        jax.random.key(0),
        _X,
        _T,
        _CONDITION,
        None,
        zeros(pooled),
        zeros(sizes),
      )
    )


def test_a_mask_as_a_bias_hides_tokens_unless_all_are_masked():
  attend = unet_blocks.Attention(2, mask_bias=unet.MASK_BIAS)
  x = jax.random.normal(jax.random.key(3), (2, 3, 4))
  args = jax.random.key(0), x, _CONDITION
  variables = attend.init(*args)
  apply = lambda mask, kind=attend: kind.apply(variables, x, _CONDITION, mask)
  absent = unet_blocks.Attention(2)
  np.testing.assert_allclose(apply(_MASK), apply(_MASK, absent), atol=1e-6)
  # Logits near -10000 are rounded; what is absent gives zeros.
  nothing = jnp.zeros_like(_MASK)
  everything = apply(None)
  np.testing.assert_allclose(apply(nothing), everything, atol=2e-3)
  assert _differ(everything, apply(nothing, absent)) > 0.1


def test_half_precision_stays_near_and_gives_float32(model):
  apply, variables = model
  half = dataclasses.replace(_CONFIG, dtype="bfloat16")
  scaled = jax.tree.map(lambda x: x, variables)
  scaled["params"]["conv_out"]["kernel"] *= 100.0
  args = (scaled, _X, _T, _CONDITION, _MASK)
  out = jax.jit(unet.UNet(half).apply, compiler_options=_QUICK)(*args)
  assert out.dtype == jnp.float32
  difference = _differ(apply(*args), out)
  assert 1e-5 < difference < 0.1


def test_a_config_survives_json():
  config = dataclasses.replace(unet.SDXL_UNET, layers_per_block=(1, 2, 3))
  text = json.dumps(dataclasses.asdict(config))
  assert unet.UNetConfig(**json.loads(text)) == config


def test_timestep_features_begin_with_cosines():
  ours = unet_blocks.timestep_features(jnp.array([0, 5]), 4)
  rates = np.array([1.0, 0.01])
  wanted = np.concatenate([np.cos(5 * rates), np.sin(5 * rates)])
  np.testing.assert_allclose(ours[1], wanted, atol=1e-6)
  np.testing.assert_array_equal(ours[0], [1, 1, 0, 0])


def test_timestep_features_can_begin_with_sines_and_be_shifted():
  t = jnp.array([5.0])
  features = unet_blocks.timestep_features(t, 5, cosines_first=False, shift=1)
  rates = np.array([1.0, 1e-4])
  wanted = np.concatenate([np.sin(5 * rates), np.cos(5 * rates), [0]])
  np.testing.assert_allclose(features[0], wanted, atol=1e-6)


def test_downsampling_pads_both_sides():
  """Zeros on both sides as torch does; XLA's SAME would pad the end only."""
  x = jnp.zeros((1, 4, 4, 1)).at[0, 0, 0, 0].set(1.0)
  down = unet_blocks.Downsample(1)
  kernel = jnp.arange(9.0).reshape(3, 3, 1, 1)
  params = {"conv": {"kernel": kernel, "bias": jnp.zeros(1)}}
  out = down.apply({"params": params}, x)
  assert out.shape == (1, 2, 2, 1)
  assert float(out[0, 0, 0, 0]) == 4.0  # the centre of the kernel


def test_downsampling_of_an_autoencoder_pads_the_end():
  x = jnp.zeros((1, 4, 4, 1)).at[0, 0, 0, 0].set(1.0)
  down = unet_blocks.Downsample(1, end_only=True)
  kernel = jnp.arange(9.0).reshape(3, 3, 1, 1) + 1
  params = {"conv": {"kernel": kernel, "bias": jnp.zeros(1)}}
  out = down.apply({"params": params}, x)
  assert out.shape == (1, 2, 2, 1)
  assert float(out[0, 0, 0, 0]) == 1.0  # the first entry of the kernel


def test_heads_of_levels_without_attention_do_not_matter():
  config = dataclasses.replace(_CONFIG, num_heads=(3, 2))
  assert config.num_heads == (3, 2)


def test_sizes_that_do_not_fit_are_named():
  with pytest.raises(ValueError, match="Change unet"):
    dataclasses.replace(_CONFIG, num_heads=(2,))
  with pytest.raises(ValueError, match="groups=5"):
    dataclasses.replace(_CONFIG, groups=5)
  with pytest.raises(errors.ConfigError, match="num_heads=3"):
    dataclasses.replace(_CONFIG, num_heads=(2, 3))
  with pytest.raises(errors.ConfigError, match=r"layers_per_block=\(1,\)"):
    dataclasses.replace(_CONFIG, layers_per_block=(1,))
  with pytest.raises(errors.ConfigError, match="remat='half'"):
    dataclasses.replace(_CONFIG, remat="half")
  with pytest.raises(errors.ConfigError, match="added_time_dim=0"):
    unet.DiffusersQuirks(added_dim=3)


def test_a_scan_over_the_layers_is_the_layers():
  config = dataclasses.replace(_CONFIG, transformer_layers=(1, 2))
  init = lambda config: nn.meta.unbox(
    unet.UNet(config).init(jax.random.key(0), _X, _T, _CONDITION)
  )
  variables = jax.jit(lambda: init(config), compiler_options=_QUICK)()
  apart, _ = _gradients(config, variables)
  scanned = dataclasses.replace(config, scan=True, remat="full")
  stacked = {"params": unet.stacked(variables["params"])}
  expected = jax.eval_shape(lambda: init(scanned))
  assert jax.tree.structure(stacked) == jax.tree.structure(expected)
  together, program = _gradients(scanned, stacked)
  assert program.count("scan[") == 2 * 4  # forward and backward
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    unet.unstacked(together["params"]),
    apart["params"],
  )
  jax.tree.map(
    np.testing.assert_array_equal,
    unet.unstacked(stacked["params"]),
    variables["params"],
  )
