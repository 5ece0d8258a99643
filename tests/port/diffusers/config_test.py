"""diffusers' config.json and names, against configs and tables here."""

import dataclasses
import inspect
import json
import os
import pathlib

import jax
import numpy as np
import pytest

from lavit_jax.core import errors
from lavit_jax.models.pixels import pixel_decoder, unet, vae
from lavit_jax.port.diffusers import config as config_lib
from lavit_jax.port.diffusers import weight_files
from lavit_jax.port.formats import official_layout, tensors
from lavit_jax.port.reading import plan
from lavit_jax.port.tables import names, pixel_names, rows

# What Stable Diffusion 1.5 and SDXL are published with.
SD15 = {
  "_class_name": "UNet2DConditionModel",
  "_diffusers_version": "0.6.0",
  "act_fn": "silu",
  "attention_head_dim": 8,
  "block_out_channels": [320, 640, 1280, 1280],
  "center_input_sample": False,
  "cross_attention_dim": 768,
  "down_block_types": [
    "CrossAttnDownBlock2D",
    "CrossAttnDownBlock2D",
    "CrossAttnDownBlock2D",
    "DownBlock2D",
  ],
  "downsample_padding": 1,
  "flip_sin_to_cos": True,
  "freq_shift": 0,
  "in_channels": 4,
  "layers_per_block": 2,
  "mid_block_scale_factor": 1,
  "norm_eps": 1e-05,
  "norm_num_groups": 32,
  "out_channels": 4,
  "sample_size": 64,
  "up_block_types": [
    "UpBlock2D",
    "CrossAttnUpBlock2D",
    "CrossAttnUpBlock2D",
    "CrossAttnUpBlock2D",
  ],
}
SDXL = {
  "addition_embed_type": "text_time",
  "addition_embed_type_num_heads": 64,
  "addition_time_embed_dim": 256,
  "attention_head_dim": [5, 10, 20],
  "block_out_channels": [320, 640, 1280],
  "class_embed_type": None,
  "cross_attention_dim": 2048,
  "down_block_types": [
    "DownBlock2D",
    "CrossAttnDownBlock2D",
    "CrossAttnDownBlock2D",
  ],
  "mid_block_only_cross_attention": None,
  "num_attention_heads": None,
  "only_cross_attention": False,
  "projection_class_embeddings_input_dim": 2816,
  "sample_size": 128,
  "transformer_layers_per_block": [1, 2, 10],
  "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
  "upcast_attention": None,
  "use_linear_projection": True,
}
VAE = {
  "_class_name": "AutoencoderKL",
  "act_fn": "silu",
  "block_out_channels": [128, 256, 512, 512],
  "down_block_types": ["DownEncoderBlock2D"] * 4,
  "in_channels": 3,
  "latent_channels": 4,
  "layers_per_block": 2,
  "norm_num_groups": 32,
  "out_channels": 3,
  "sample_size": 512,
  "up_block_types": ["UpDecoderBlock2D"] * 4,
}
UNETS = {
  "sd15": unet.SD15_UNET,
  # As files hold it: no layers stacked.
  "sdxl": dataclasses.replace(unet.SDXL_UNET, scan=False),
}
TINY = unet.UNetConfig(
  in_channels=4,
  out_channels=4,
  channels=(4, 8),
  layers_per_block=(1, 2),
  attention=(False, True),
  transformer_layers=(1, 2),
  num_heads=(1, 2),
  cross_dim=6,
  groups=2,
  details=unet.DiffusersQuirks(
    linear_projection=True,
    mask_bias=unet.MASK_BIAS,
    added_dim=10,
    added_time_dim=4,
  ),
)
TINY_VAE = vae.VaeConfig(channels=(4, 8), layers_per_block=1, groups=2)


def _for_inference(config):
  return dataclasses.replace(config, dtype="float32", remat="none", scan=False)


def test_published_configs_are_the_presets():
  for fields, preset in ((SD15, unet.SD15_UNET), (SDXL, unet.SDXL_UNET)):
    assert config_lib.unet_config(fields) == _for_inference(preset)
  assert config_lib.vae_config(VAE) == vae.SD15_VAE
  xl = VAE | {"sample_size": 1024, "scaling_factor": 0.13025}
  xl |= {"force_upcast": True}
  assert config_lib.vae_config(xl) == vae.SDXL_VAE


def test_the_dtype_of_the_computation_is_an_argument():
  config = config_lib.unet_config(SD15, dtype="bfloat16")
  assert config.dtype == "bfloat16"
  config = config_lib.vae_config(VAE, dtype="bfloat16")
  assert (config.dtype, config.compute_dtype) == ("bfloat16", "float32")


def test_num_attention_heads_precedes_attention_head_dim():
  config = config_lib.unet_config(SD15 | {"num_attention_heads": 4})
  assert config.num_heads == (4, 4, 4, 4)


def test_one_number_for_all_levels_is_repeated():
  fields = SDXL | {"transformer_layers_per_block": 3, "layers_per_block": 1}
  fields |= {"cross_attention_dim": [64, 64, 64], "freq_shift": 1}
  config = config_lib.unet_config(fields)
  assert config.transformer_layers == (3, 3, 3)
  assert config.depths == (1, 1, 1)
  assert config.cross_dim == 64
  assert config.details.freq_shift == 1


@pytest.mark.parametrize("config", [TINY, unet.SD15_UNET, unet.SDXL_UNET])
def test_a_unets_fields_are_written_and_read_again(config):
  fields = json.loads(json.dumps(config_lib.unet_fields(config)))
  assert config_lib.unet_config(fields) == _for_inference(config)


def test_an_autoencoders_fields_are_written_and_read_again():
  fields = json.loads(json.dumps(config_lib.vae_fields(TINY_VAE)))
  assert config_lib.vae_config(fields) == TINY_VAE


def test_a_unet_that_diffusers_lacks_is_refused():
  with pytest.raises(errors.ConfigError, match="ff_mult=2"):
    config_lib.unet_fields(pixel_decoder.TINY.unet)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"act_fn": "gelu"}, "act_fn is 'gelu', expected 'silu' or 'swish'"),
    ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type"),
    ({"mid_block_type": None}, "mid_block_type is null"),
    ({"class_embed_type": "timestep"}, "class_embed_type"),
    ({"only_cross_attention": [False, True, False]}, "only_cross_attention"),
    ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
    ({"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type"),
    ({"addition_embed_type": "image"}, "'text_time' or null"),
    ({"addition_time_embed_dim": None}, "addition_time_embed_dim is null"),
    ({"dropout": 0.1}, "dropout is 0.1"),
    ({"attention_head_dim": [5, 10]}, "a list of 3, one a level"),
    ({"transformer_layers_per_block": [1, [2, 2], 3]}, "layers_per_block"),
    ({"cross_attention_dim": [1, 2, 3]}, "one width for all levels"),
    ({"down_block_types": ["AttnDownBlock2D"] * 3}, "down_block_types"),
    ({"up_block_types": ["UpBlock2D"] * 3}, "those that mirror the way down"),
    ({"block_out_channels": []}, "block_out_channels"),
    ({"in_channels": "4"}, "in_channels is '4'"),
    ({"norm_eps": 0}, "norm_eps is 0, expected a number above 0"),
    ({"norm_eps": 10**400}, "norm_eps is 1000.*a number above 0"),
    ({"norm_eps": float("inf")}, "norm_eps is inf"),
    ({"out_channels": 10**400}, "out_channels is 1000.*whole number"),
    ({"freq_shift": -1}, "freq_shift"),
    ({"use_linear_projection": 1}, "expected true or false"),
    ({"norm_num_groups": 48}, "groups=48"),
    ({"attention_heads_dim": 8}, r"did you mean attention_head_dim\?"),
    ({"_class_name": "UNet2DModel"}, "expected 'UNet2DConditionModel'"),
  ],
)
def test_unsupported_fields_of_a_unet_are_named(change, words):
  with pytest.raises(errors.CheckpointError, match=words) as error:
    config_lib.unet_config(SDXL | change, "unet/config.json")
  assert str(error.value).startswith("unet/config.json")


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"act_fn": "relu"}, "act_fn is 'relu'"),
    ({"shift_factor": 0.1}, "shift_factor"),
    ({"use_quant_conv": False}, "use_quant_conv"),
    ({"latents_mean": [0.1]}, "latents_mean"),
    ({"down_block_types": ["DownEncoderBlock2D"]}, "one for each width"),
    ({"up_block_types": ["AttnUpDecoderBlock2D"] * 4}, "up_block_types"),
    ({"scaling_factor": "x"}, "scaling_factor is 'x'"),
    ({"sample_size": [512, 512]}, "sample_size"),
    ({"norm_num_groups": 48}, "groups=48"),
    ({"scale": 1}, "scale is no field"),
  ],
)
def test_unsupported_fields_of_an_autoencoder_are_named(change, words):
  with pytest.raises(errors.CheckpointError, match=words):
    config_lib.vae_config(VAE | change)


def test_all_problems_are_in_one_error():
  fields = SDXL | {"act_fn": "mish", "conv_in_kernel": 5, "norm_eps": "x"}
  with pytest.raises(errors.CheckpointError) as error:
    config_lib.unet_config(fields)
  for name in ("act_fn", "conv_in_kernel", "norm_eps"):
    assert f"{name} is " in str(error.value)


def _tables(part):
  """Returns (table, abstract params) of a full-size network."""
  if part in UNETS:
    config = UNETS[part]
    return pixel_names.unet(config), config_lib.abstract_unet(config)
  tree = config_lib.abstract_vae(vae.SD15_VAE)
  return pixel_names.vae(vae.SD15_VAE), tree


def _shapes(part):
  """Returns {official name: shape} of a full-size network."""
  found = names.to_official(*_tables(part))
  return {name: value.shape for name, value in found.items()}


@pytest.mark.shared
@pytest.mark.parametrize(
  ("part", "file", "count"),
  [
    ("sd15", "pixel_decoding/unet/diffusion_pytorch_model.bin", 859.5),
    ("sdxl", "highres_pixel_decoding/unet/diffusion_pytorch_model.bin", 2567.5),
    ("vae", "pixel_decoding/vae/diffusion_pytorch_model.safetensors", 83.7),
  ],
)
def test_full_size_names_and_shapes_are_those_of_the_manifest(
  part, file, count
):
  if "LAVIT_SHARED" not in os.environ:
    pytest.skip("LAVIT_SHARED is not set: the manifest of the official release")
  root = pathlib.Path(os.environ["LAVIT_SHARED"]) / "golden"
  manifest = json.loads((root / "manifest_full.json").read_text())
  wanted = {name: tuple(shape) for name, shape in manifest[file].items()}
  found = _shapes(part)
  assert found == wanted
  assert list(found) == list(wanted)  # the order of the file
  numbers = sum(np.prod(shape) for shape in found.values())
  assert round(numbers / 1e6, 1) == count
  if part == "vae":
    assert manifest[f"highres_{file}"] == manifest[file]


@pytest.mark.shared
def test_the_official_layout_has_exactly_the_published_files():
  """Every file of the release belongs to a part."""
  if "LAVIT_SHARED" not in os.environ:
    pytest.skip("LAVIT_SHARED is not set: the manifest of the official release")
  root = pathlib.Path(os.environ["LAVIT_SHARED"]) / "golden"
  manifest = json.loads((root / "manifest_full.json").read_text())
  known = {*official_layout.FILES.values()}
  known.add(f"{official_layout.LLM_FOLDER}/pytorch_model-*.bin")
  for part, folder in official_layout.PIXEL_FOLDERS.items():
    for kind in ("unet", "vae"):
      known.add(f"{folder}/{kind}/{weight_files.candidates(kind)[0]}")
    if part == "lowres_pixels":
      known.add(f"{folder}/{official_layout.UNCOND}")
  assert known == set(manifest)
  uncond = manifest[f"pixel_decoding/{official_layout.UNCOND}"]
  assert [row.official for row in names.UNCOND] == list(uncond)
  assert uncond[""][-1] == unet.SD15_UNET.cross_dim


@pytest.mark.parametrize("part", ["sd15", "sdxl", "vae"])
def test_full_size_names_and_shapes_are_those_of_diffusers(part):
  torch = pytest.importorskip("torch", reason="holds diffusers' side")
  diffusers = pytest.importorskip("diffusers", reason="the names' origin")
  with torch.device("meta"):
    if part == "vae":
      fields = config_lib.vae_fields(vae.SD15_VAE)
      model = diffusers.AutoencoderKL.from_config(fields)
    else:
      fields = config_lib.unet_fields(UNETS[part])
      model = diffusers.UNet2DConditionModel.from_config(fields)
  wanted = {name: tuple(x.shape) for name, x in model.state_dict().items()}
  assert _shapes(part) == wanted


def test_every_field_of_diffusers_is_known_with_its_default():
  diffusers = pytest.importorskip("diffusers", reason="the fields' origin")
  for kind, read in (
    (diffusers.UNet2DConditionModel, config_lib.unet_config),
    (diffusers.AutoencoderKL, config_lib.vae_config),
  ):
    defaults = {
      name: parameter.default
      for name, parameter in inspect.signature(kind.__init__).parameters.items()
      if parameter.default is not inspect.Parameter.empty
    }
    assert len(defaults) > 15
    assert read(defaults) == read({})


@pytest.fixture(scope="module", params=["unet", *pixel_names.GENERATIONS])
def tiny(request):
  """Returns (table, abstract params, random tensors by official name)."""
  if request.param == "unet":
    table = pixel_names.unet(TINY)
    tree = config_lib.abstract_unet(TINY)
  else:
    table = pixel_names.vae(TINY_VAE, request.param)
    tree = config_lib.abstract_vae(TINY_VAE)
  rng = np.random.default_rng(0)
  official = {
    name: rng.standard_normal(value.shape, np.float32)
    for name, value in names.to_official(table, tree).items()
  }
  return table, tree, official


def test_names_and_paths_occur_once(tiny):
  for side in ("official", "path"):
    found = [getattr(row, side) for row in tiny[0]]
    assert len(set(found)) == len(found)


def test_conversion_there_and_back_changes_nothing(tiny):
  table, tree, official = tiny
  ours = names.to_flax(table, official)
  shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)
  assert shapes(ours) == shapes(tree)
  back = names.to_official(table, ours)
  assert list(back) == list(official)
  for name, value in official.items():
    np.testing.assert_array_equal(back[name], value, err_msg=name)


def test_a_plan_lists_every_problem(tiny):
  table, tree, official = tiny
  found = {
    name: tensors.Tensor(name, "x.bin", value.shape, value.dtype, None)
    for name, value in official.items()
  }
  problems = plan.Problems("x")
  arrays = plan.arrays_of(table, found, tree, problems, label="x.bin")
  problems.check()
  assert len(arrays) == len(official)
  lost, turned = list(found)[:2]
  del found[lost]
  found[turned] = dataclasses.replace(found[turned], shape=(1, 2, 3))
  found["more"] = found[turned]
  plan.arrays_of(table, found, tree, problems, label="x.bin")
  with pytest.raises(errors.CheckpointError) as error:
    problems.check()
  for part in (lost, f"{turned} [1, 2, 3]", "x.bin: more"):
    assert part in str(error.value)


def test_the_generation_of_names_is_recognized():
  table = pixel_names.vae(TINY_VAE, "query")
  official = [row.official for row in table]
  assert "encoder.mid_block.attentions.0.proj_attn.weight" in official
  assert pixel_names.vae_generation(official) == "query"
  new = [row.official for row in pixel_names.vae(TINY_VAE)]
  assert pixel_names.vae_generation(new) == "to_q"
  assert {row.path for row in table} == {
    row.path for row in pixel_names.vae(TINY_VAE)
  }


def test_tables_without_stacked_rows_have_no_layers():
  assert rows.depth_of(pixel_names.unet(TINY), {"conv_in.weight": 0}) == 0
