"""The U-Net against recordings of the official code, and against diffusers."""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.models.pixels import unet
from lavit_jax.port.diffusers import config as config_lib
from lavit_jax.port.formats import tensors
from lavit_jax.port.tables import names, pixel_names

pytestmark = pytest.mark.slow

pytest.importorskip("torch", reason="reads and computes PyTorch's U-Nets")

_BLOCKS = ("down_blocks_0", "down_blocks_1", "mid_block")
_BLOCKS += ("up_blocks_0", "up_blocks_1")
# Quick to compile; these programs are too small for optimizing to pay.
_QUICK = {"xla_backend_optimization_level": 0}


def _error(ours, theirs):
  """Largest difference over the largest value; ours is NHWC."""
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  ours = np.moveaxis(ours, -1, 1) if ours.ndim == 4 else ours
  assert ours.shape == theirs.shape
  return np.abs(ours - theirs).max() / np.abs(theirs).max()


def _nhwc(x):
  return jnp.asarray(np.moveaxis(np.asarray(x), 1, -1))


def _jitted(config):
  """Maps parameters and inputs to the output and that of submodules."""
  net = unet.UNet(config)
  wanted = ("time_embedding", "add_embedding", "conv_in", *_BLOCKS)

  def apply(params, *args, **kwargs):
    variables = {"params": params}
    chosen = lambda module, method: module.name in wanted
    return net.apply(variables, *args, capture_intermediates=chosen, **kwargs)

  return jax.jit(apply, compiler_options=_QUICK)


def _recorded(kind, folder):
  """Recorded arrays, config and parameters of an official U-Net."""
  if "LAVIT_SHARED" not in os.environ:
    pytest.skip("LAVIT_SHARED is not set: golden U-Nets")
  root = pathlib.Path(os.environ["LAVIT_SHARED"]) / "golden/a"
  with np.load(root / f"unet_{kind}.npz") as file:
    arrays = dict(file)
  place = root / "checkpoint" / folder / "unet"
  fields = json.loads((place / "config.json").read_text())
  config = config_lib.unet_config(fields)
  found = tensors.open_file(place / "diffusion_pytorch_model.bin")
  found = {name: tensor.read() for name, tensor in found.items()}
  return arrays, config, names.to_flax(pixel_names.unet(config), found)


def _errors(arrays, out, seen):
  """{recorded array: error} of an output and what lies before it."""
  seen = seen["intermediates"]
  seen = {name: value["__call__"][0] for name, value in seen.items()}
  ours = {"out_eps": out, "out_time_emb": seen["time_embedding"]}
  ours |= {"out_conv_in": seen["conv_in"]}
  if "out_add_emb" in arrays:
    ours["out_add_emb"] = seen["add_embedding"]
  for i, name in enumerate(_BLOCKS):
    block = seen[name]
    ours[f"out_block_{i}"] = block[0] if isinstance(block, tuple) else block
  return {name: _error(value, arrays[name]) for name, value in ours.items()}


@pytest.mark.shared
def test_the_recorded_stable_diffusion_unet_is_reproduced():
  arrays, config, params = _recorded("sd", "pixel_decoding")
  t = jnp.full(len(arrays["in_sample"]), int(arrays["in_t"]))
  args = _nhwc(arrays["in_sample"]), t, jnp.asarray(arrays["in_encoder"])
  mask = jnp.asarray(arrays["in_mask"], bool)
  apply = _jitted(config)
  found = _errors(arrays, *apply(params, *args, mask))
  out, _ = apply(params, *args, jnp.ones_like(mask))
  found["out_eps_nomask"] = _error(out, arrays["out_eps_nomask"])
  assert set(found) == {name for name in arrays if name.startswith("out_")}
  assert max(found.values()) < 1e-5, found


@pytest.mark.shared
def test_the_recorded_sdxl_unet_is_reproduced():
  arrays, config, params = _recorded("sdxl", "highres_pixel_decoding")
  t = jnp.full(len(arrays["in_sample"]), int(arrays["in_t"]))
  args = _nhwc(arrays["in_sample"]), t, jnp.asarray(arrays["in_encoder"])
  added = {
    "pooled": jnp.asarray(arrays["in_text_embeds"]),
    "sizes": jnp.asarray(arrays["in_time_ids"]),
  }
  found = _errors(arrays, *_jitted(config)(params, *args, **added))
  assert set(found) == {name for name in arrays if name.startswith("out_")}
  assert max(found.values()) < 1e-5, found


_SD = {"cross_attention_dim": 12, "norm_num_groups": 4, "layers_per_block": 1}
_SDXL = {
  **_SD,
  "use_linear_projection": True,
  "addition_embed_type": "text_time",
  "addition_time_embed_dim": 6,
  "projection_class_embeddings_input_dim": 7 + 6 * 6,
}


def _types(attention):
  down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention]
  up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attention[::-1]]
  return {"down_block_types": down, "up_block_types": up}


# name: (fields of config.json, sides of the latents, whether masked).
CASES = {
  "sd, one head count, masked": (
    _SD
    | _types([True, True, False])
    | {"block_out_channels": [8, 16, 16], "attention_head_dim": 2},
    (8, 12),
    True,
  ),
  "sd, odd sides, sines first, shifted, two layers a block": (
    _SD
    | _types([True, False])
    | {"block_out_channels": [16, 8], "attention_head_dim": [4, 2]}
    | {"layers_per_block": 2, "flip_sin_to_cos": False, "freq_shift": 1}
    | {"norm_eps": 1e-6},
    (7, 5),
    False,
  ),
  "sd 2, four levels, matrices, more input channels": (
    _SD
    | _types([True, True, True, False])
    | {"block_out_channels": [8, 8, 16, 24], "in_channels": 9}
    | {"attention_head_dim": [1, 2, 4, 3], "use_linear_projection": True},
    (9, 13),
    True,
  ),
  "sdxl, transformers of one, two and three layers": (
    _SDXL
    | _types([False, True, True])
    | {"block_out_channels": [8, 16, 16], "attention_head_dim": [1, 2, 4]}
    | {"transformer_layers_per_block": [1, 2, 3]},
    (8, 8),
    False,
  ),
  "sdxl, depths by level, convolutions, five sizes, masked": (
    _SDXL
    | _types([True, True])
    | {"block_out_channels": [12, 24], "attention_head_dim": 3}
    | {"layers_per_block": [1, 2], "transformer_layers_per_block": [2, 1]}
    | {"use_linear_projection": False, "upcast_attention": True}
    | {"projection_class_embeddings_input_dim": 7 + 5 * 6},
    (5, 6),
    True,
  ),
  "sdxl, a plain coarsest level, a large eps": (
    _SDXL
    | _types([False, True, False])
    | {"block_out_channels": [8, 16, 8], "attention_head_dim": [2, 4, 2]}
    | {"transformer_layers_per_block": 2, "norm_eps": 1e-2}
    | {"layers_per_block": [2, 1, 1]},
    (6, 11),
    False,
  ),
}


def _inputs(fields, sides, masked, rng):
  """Arguments of both sides, as float32 and bool arrays of PyTorch's shapes."""
  normal = lambda *shape: rng.standard_normal(shape, np.float32)
  given = {
    "x": normal(2, fields.get("in_channels", 4), *sides),
    "t": np.array([7, 981]),
    "condition": normal(2, 5, fields["cross_attention_dim"]),
  }
  if masked:
    given["mask"] = np.array([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]], bool)
  if "addition_embed_type" in fields:
    width = fields["projection_class_embeddings_input_dim"] - 7
    given["pooled"] = normal(2, 7)
    sizes = rng.integers(0, 1344, (2, width // 6))
    given["sizes"] = sizes.astype(np.float32)
  return given


def _diffusers(fields, given, seed):
  """Random parameters (by official name) and the output of diffusers' U-Net."""
  import torch

  diffusers = pytest.importorskip("diffusers", reason="a second U-Net")
  torch.manual_seed(seed)
  model = diffusers.UNet2DConditionModel(**fields).eval()
  given = {name: torch.from_numpy(value) for name, value in given.items()}
  added = None
  if "pooled" in given:
    added = {"text_embeds": given["pooled"], "time_ids": given["sizes"]}
  with torch.no_grad():
    for parameter in model.parameters():
      parameter += 0.1 * torch.randn_like(parameter)
    out = model(
      given["x"],
      given["t"],
      given["condition"],
      encoder_attention_mask=given.get("mask"),
      added_cond_kwargs=added,
    ).sample
  state = {name: x.numpy() for name, x in model.state_dict().items()}
  return state, out.numpy()


@pytest.mark.parametrize("case", CASES)
def test_a_unet_of_diffusers_is_reproduced(case):
  fields, sides, masked = CASES[case]
  seed = list(CASES).index(case)
  given = _inputs(fields, sides, masked, np.random.default_rng(seed))
  state, theirs = _diffusers(fields, given, seed)
  config = config_lib.unet_config(fields)
  params = names.to_flax(pixel_names.unet(config), state)
  out, _ = _jitted(config)(
    params,
    _nhwc(given["x"]),
    given["t"],
    given["condition"],
    given.get("mask"),
    given.get("pooled"),
    given.get("sizes"),
  )
  assert _error(out, theirs) < 1e-5
