"""The autoencoder, alone and against recordings and diffusers."""

import dataclasses
import json
import os
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.core import errors, sharding
from lavit_jax.models.pixels import vae
from lavit_jax.port.diffusers import config as config_lib
from lavit_jax.port.formats import tensors
from lavit_jax.port.tables import names, pixel_names

_CONFIG = vae.VaeConfig(
  channels=(4, 8), layers_per_block=1, groups=2, sample_size=8
)
_MODEL = vae.AutoencoderKL(_CONFIG)
_X = jax.random.uniform(jax.random.key(1), (2, 8, 12, 3), minval=-1.0)
# Quick to compile; these programs are too small for optimizing to pay.
_QUICK = {"xla_backend_optimization_level": 0}


def _jit(method, model=_MODEL):
  apply = lambda variables, x: model.apply(variables, x, method=method)
  return jax.jit(apply, compiler_options=_QUICK)


def _jit_tiled(model=_MODEL, **kwargs):
  decode = lambda variables, z: vae.decode_tiled(model, variables, z, **kwargs)
  return jax.jit(decode, compiler_options=_QUICK)


@pytest.fixture(scope="module")
def variables():
  init = jax.jit(_MODEL.init, compiler_options=_QUICK)
  return nn.meta.unbox(init(jax.random.key(0), _X))


def test_latents_have_one_position_per_square_of_pixels(variables):
  mean, logvar = _jit("encode")(variables, _X)
  assert mean.shape == logvar.shape == (2, 4, 6, 4)
  image = _jit("decode")(variables, mean)
  assert image.shape == _X.shape
  assert jnp.isfinite(image).all()
  assert mean.dtype == image.dtype == jnp.float32


def test_variances_are_kept_within_bounds(variables):
  far = jax.tree.map(lambda x: x, variables)
  bias = jnp.array([0, 0, 0, 0, 99, -99, 1, 2.0])
  far["params"]["quant_conv"] = {"kernel": jnp.zeros((8, 8)), "bias": bias}
  _, logvar = _jit("encode")(far, _X)
  wanted = np.broadcast_to([20.0, -30, 1, 2], logvar.shape)
  np.testing.assert_array_equal(logvar, wanted)


def test_latents_are_sampled_with_noise_and_are_means_without():
  mean = jnp.full((1, 100, 100, 1), 3.0)
  logvar = jnp.full_like(mean, 2 * np.log(0.5))
  np.testing.assert_array_equal(vae.sample(mean, logvar), mean)
  noise = jax.random.normal(jax.random.key(0), mean.shape)
  drawn = vae.sample(mean, logvar, noise)
  assert abs(float(drawn.mean()) - 3.0) < 0.02
  assert abs(float(drawn.std()) - 0.5) < 0.02


def test_upcast_models_compute_in_float32_with_every_dtype():
  asked = dataclasses.replace(_CONFIG, dtype="bfloat16")
  assert asked.compute_dtype == "float32"
  free = dataclasses.replace(asked, force_upcast=False)
  assert free.compute_dtype == "bfloat16"

  def dtypes(config):
    model = vae.AutoencoderKL(config)
    make = lambda: model.init_with_output(
      jax.random.key(0), _X, capture_intermediates=True, mutable=True
    )
    _, state = jax.eval_shape(make)
    seen = state["intermediates"]["decoder"]
    return {seen[f"up_blocks_{i}"]["__call__"][0].dtype for i in (0, 1)}

  assert dtypes(asked) == {jnp.dtype("float32")}
  assert dtypes(free) == {jnp.dtype("bfloat16")}


def test_every_parameter_names_its_axes_and_can_be_sharded():
  boxed = jax.eval_shape(_MODEL.init, jax.random.key(0), _X)
  leaves = jax.tree.leaves(
    boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
  )
  assert all(isinstance(leaf, nn.LogicallyPartitioned) for leaf in leaves)
  assert all(len(leaf.names) == leaf.value.ndim for leaf in leaves)
  # Images have 3 channels and latents 4, which 8 devices do not divide.
  full = vae.AutoencoderKL(vae.SD15_VAE)
  boxed = jax.eval_shape(full.init, jax.random.key(0), _X[:, :, :8])
  mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
  specs = sharding.param_shardings(boxed["params"], mesh)
  spec = specs["decoder"]["up_blocks_0"]["resnets_0"]["conv1"]["kernel"].spec
  assert tuple(spec) == (None, None, "fsdp", "tensor")


@pytest.mark.parametrize("config", [vae.SD15_VAE, vae.SDXL_VAE])
def test_full_size_has_its_number_of_parameters(config):
  leaves = jax.tree.leaves(config_lib.abstract_vae(config))
  assert sum(leaf.size for leaf in leaves) == 83_653_863


def test_tiles_of_one_row_fade_into_each_other(variables):
  """A tile begins as the one before it and ends as itself."""
  z = jax.random.normal(jax.random.key(2), (2, 2, 7, 4))
  decode = _jit("decode")
  # Tiles of 4 places, 2 of them shared: starts 0, 2, 4 (3 wide), 6 (1 wide).
  tiled = _jit_tiled(tile=4, overlap=2)(variables, z)
  assert tiled.shape == (2, 4, 14, 3)
  first, second = (decode(variables, z[:, :, i : i + 4]) for i in (0, 2))
  np.testing.assert_allclose(tiled[:, :, :4], first[:, :, :4], atol=1e-5)
  weight = np.array([0, 0.25, 0.5, 0.75])[:, None]
  faded = first[:, :, 4:] * (1 - weight) + second[:, :, :4] * weight
  np.testing.assert_allclose(tiled[:, :, 4:8], faded, atol=1e-5)


def test_latents_no_larger_than_a_tile_are_decoded_whole(variables):
  z = jax.random.normal(jax.random.key(2), (1, 4, 3, 4))
  whole = _jit("decode")(variables, z)
  tiled = _jit_tiled()(variables, z)  # sample_size 8: 4 places
  np.testing.assert_allclose(tiled, whole, atol=1e-5)


def test_tiles_need_a_fraction_of_the_memory(variables):
  """Of decoding 128 x 128 pixels whole."""
  z = jnp.zeros((1, 64, 64, 4))

  def peak(function):
    compiled = jax.jit(function).lower(variables, z).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  whole = peak(lambda v, z: _MODEL.apply(v, z, method="decode"))
  decode = lambda v, z: vae.decode_tiled(_MODEL, v, z, tile=16, overlap=0)
  assert peak(decode) < whole / 4


@pytest.mark.parametrize("overlap", [-1, 4])
def test_overlaps_that_cannot_be_are_refused(variables, overlap):
  z = jnp.zeros((1, 8, 8, 4))
  with pytest.raises(errors.UsageError, match="less than a tile"):
    vae.decode_tiled(_MODEL, variables, z, tile=4, overlap=overlap)


def test_images_that_do_not_divide_are_refused(variables):
  with pytest.raises(errors.UsageError, match="multiples of 2"):
    _MODEL.apply(variables, _X[:, :7], method="encode")


def test_widths_that_groups_do_not_divide_are_refused():
  with pytest.raises(errors.ConfigError, match="groups=3"):
    dataclasses.replace(_CONFIG, groups=3)


def _error(ours, theirs):
  """Largest difference over the largest value; ours is NHWC."""
  ours = np.moveaxis(np.asarray(ours), -1, 1)
  assert ours.shape == theirs.shape
  return np.abs(ours - theirs).max() / np.abs(theirs).max()


def _nhwc(x):
  return jnp.asarray(np.moveaxis(np.asarray(x), 1, -1))


@pytest.mark.shared
@pytest.mark.parametrize(
  ("kind", "folder"),
  [
    ("sd", "checkpoint/pixel_decoding/vae"),
    ("sdxl", "checkpoint/highres_pixel_decoding/vae"),
    ("sd", "extra/vae_deprecated_names"),
  ],
)
def test_recorded_images_and_latents_are_reproduced(kind, folder):
  if "LAVIT_SHARED" not in os.environ:
    pytest.skip("LAVIT_SHARED is not set: golden autoencoders")
  root = pathlib.Path(os.environ["LAVIT_SHARED"]) / "golden/a"
  fields = json.loads((root / folder / "config.json").read_text())
  config = config_lib.vae_config(fields)
  found = tensors.open_file(
    root / folder / "diffusion_pytorch_model.safetensors"
  )
  found = {name: tensor.read() for name, tensor in found.items()}
  table = pixel_names.vae(config, pixel_names.vae_generation(found))
  variables = {"params": names.to_flax(table, found)}
  with np.load(root / "vae.npz") as file:
    arrays = dict(file)
  model = vae.AutoencoderKL(config)
  mean, logvar = _jit("encode", model)(variables, _nhwc(arrays["in_image"]))
  decoded = _jit("decode", model)(variables, _nhwc(arrays["in_latents"]))
  assert _error(mean, arrays[f"out_mean_{kind}"]) < 1e-5
  assert _error(logvar, arrays[f"out_logvar_{kind}"]) < 1e-5
  assert _error(decoded, arrays[f"out_decoded_{kind}"]) < 1e-5


# A config.json, and the sides of the images.
CASES = {
  "three levels": (
    {"block_out_channels": [8, 12, 16], "layers_per_block": 2}
    | {"norm_num_groups": 4, "sample_size": 32, "latent_channels": 4},
    (48, 80),
  ),
  "two levels, grey, seven latent channels": (
    {"block_out_channels": [12, 12], "layers_per_block": 1}
    | {"in_channels": 1, "out_channels": 1, "latent_channels": 7}
    | {"norm_num_groups": 3, "sample_size": 16},
    (12, 42),
  ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_autoencoder_of_diffusers_is_reproduced(case):
  """Means, variances, images, and images decoded in tiles."""
  torch = pytest.importorskip("torch", reason="computes diffusers' side")
  diffusers = pytest.importorskip("diffusers", reason="a second autoencoder")
  fields, sides = CASES[case]
  levels = len(fields["block_out_channels"])
  fields = fields | {
    "down_block_types": ["DownEncoderBlock2D"] * levels,
    "up_block_types": ["UpDecoderBlock2D"] * levels,
  }
  torch.manual_seed(levels)
  theirs = diffusers.AutoencoderKL(**fields).eval()
  x = torch.rand(2, fields.get("in_channels", 3), *sides) * 2 - 1
  with torch.no_grad():
    for parameter in theirs.parameters():
      parameter += 0.1 * torch.randn_like(parameter)
    wanted = theirs.encode(x).latent_dist
    z = torch.randn_like(wanted.mean)
    whole = theirs.decode(z).sample
    theirs.enable_tiling()
    tiled = theirs.decode(z).sample
  config = config_lib.vae_config(fields)
  state = {name: value.numpy() for name, value in theirs.state_dict().items()}
  params = {"params": names.to_flax(pixel_names.vae(config), state)}
  model = vae.AutoencoderKL(config)
  mean, logvar = _jit("encode", model)(params, _nhwc(x))
  assert _error(mean, wanted.mean.numpy()) < 1e-5
  assert _error(logvar, wanted.logvar.numpy()) < 1e-5
  z = _nhwc(z)
  assert _error(_jit("decode", model)(params, z), whole.numpy()) < 1e-5
  ours = _jit_tiled(model)(params, z)
  assert _error(ours, tiled.numpy()) < 1e-5
  assert _error(ours, whole.numpy()) > 1e-3  # tiles do make a difference
