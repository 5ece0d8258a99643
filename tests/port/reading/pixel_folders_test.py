"""Import of the official pixel decoders' folders."""

import json
import shutil

import numpy as np
import pytest

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch", reason="reads PyTorch files")
pytest.importorskip("safetensors", reason="reads safetensors files")

from lavit_jax.core import errors
from lavit_jax.core.storage import checkpoints
from lavit_jax.diffusion import schedules
from lavit_jax.models.pixels import unet, vae
from lavit_jax.port import importing
from lavit_jax.port.tables import names, pixel_names
from tests.port import pixel_sources, sources

FOLDERS, STEM = pixel_sources.FOLDERS, pixel_sources.STEM
LOWRES = ["lowres_pixels"]


def imported(source, target, only=LOWRES):
  return importing.run(source, target, only=only, quiet=True)


def params(model, part):
  loaded = checkpoints.load_part(model, part, dtype=None)
  return {k: np.asarray(v) for k, v in sources.flatten(loaded.params).items()}


def wanted(part, dtype=torch.float32):
  """Returns the arrays that a part should hold, by path."""
  found = {}
  for kind in ("unet", "vae"):
    tensors = pixel_sources.state(part, kind, dtype=dtype)
    table = pixel_names.table_of(pixel_sources.config(part, kind), "to_q")
    ours = names.to_flax(table, {k: v.numpy() for k, v in tensors.items()})
    found |= sources.flatten({kind: ours})
  if part == "lowres_pixels":
    found["uncond"] = pixel_sources.UNCOND
  return found


def assert_equal(found, wanted):
  assert set(found) == set(wanted)
  for path, value in wanted.items():
    assert found[path].dtype == value.dtype, path
    np.testing.assert_array_equal(found[path], value, err_msg=path)


def refusal(source, tmp_path, only=LOWRES):
  """Returns the error of a refused import, which leaves no files."""
  before = set(tmp_path.iterdir())
  with pytest.raises(errors.LavitError) as caught:
    imported(source, tmp_path / "model", only)
  assert isinstance(caught.value, errors.CheckpointError)
  assert set(tmp_path.iterdir()) == before
  return str(caught.value)


@pytest.fixture
def source(tmp_path):
  return pixel_sources.write_official(tmp_path / "source")


def lowres_path(source, *names):
  return source.joinpath(FOLDERS["lowres_pixels"], *names)


@pytest.mark.parametrize("part", FOLDERS)
def test_a_pixel_part_is_the_files_converted_by_the_tables(tmp_path, part):
  source = pixel_sources.write_official(tmp_path / "source", part)
  report = imported(source, tmp_path / "model", [part])
  assert list(report["parts"]) == [part]
  assert report["notes"] == []
  assert_equal(params(tmp_path / "model", part), wanted(part))
  meta = checkpoints.read_meta(tmp_path / "model", part)
  assert unet.UNetConfig(**meta["unet"]) == pixel_sources.UNETS[part]
  assert vae.VaeConfig(**meta["vae"]) == pixel_sources.VAE
  schedule = schedules.NoiseSchedule(**meta["schedule"])
  assert schedule == schedules.STABLE_DIFFUSION
  assert str(tmp_path) not in json.dumps(meta)


def test_all_parts_of_a_source_are_imported(tmp_path):
  source = sources.write(tmp_path / "source")
  for part in FOLDERS:
    pixel_sources.write_official(source, part)
  report = imported(source, tmp_path / "model", None)
  parts = {"encoder", "tokenizer", "lowres", "highres", "llm", *FOLDERS}
  assert set(report["parts"]) == parts


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_older_names_shards_and_half_precision(tmp_path, suffix):
  half = f"{STEM}.fp16{suffix}"
  source = pixel_sources.write_official(
    tmp_path / "source",
    generation="query",
    dtype=torch.float16,
    files=(f"{STEM}{suffix}", half),
  )
  pixel_sources.shard(lowres_path(source, "unet", f"{STEM}{suffix}"), 3)
  report = imported(source, tmp_path / "model")
  assert_equal(
    params(tmp_path / "model", "lowres_pixels"),
    wanted("lowres_pixels", torch.float16),
  )
  assert report["notes"] == [
    f"pixel_decoding/vae: {half}, as there is no other"
  ]


def test_of_several_files_the_official_choice_is_read(source, tmp_path):
  """The others are named as ignored."""
  for kind, other in (("unet", ".safetensors"), ("vae", ".bin")):
    tensors = pixel_sources.state("lowres_pixels", kind)
    changed = {name: tensor + 1 for name, tensor in tensors.items()}
    pixel_sources.save(lowres_path(source, kind, f"{STEM}{other}"), changed)
  report = imported(source, tmp_path / "model")
  found = params(tmp_path / "model", "lowres_pixels")
  assert_equal(found, wanted("lowres_pixels"))
  notes = " ".join(report["notes"])
  assert f"unet: {STEM}.bin read, {STEM}.safetensors ignored" in notes
  assert f"vae: {STEM}.safetensors read, {STEM}.bin ignored" in notes


def test_all_files_that_are_missing_are_listed(source, tmp_path):
  for file in ("unet/config.json", "uncond_embeddings.bin"):
    lowres_path(source, file).unlink()
  lowres_path(source, "vae", f"{STEM}.safetensors").unlink()
  shutil.rmtree(lowres_path(source, "scheduler"))
  message = refusal(source, tmp_path)
  for file in (
    "unet/config.json",
    "uncond_embeddings.bin",
    f"vae/{STEM}.safetensors",
    "scheduler/scheduler_config.json",
  ):
    assert f"pixel_decoding/{file}" in message


def test_all_tensors_that_do_not_fit_are_listed(source, tmp_path):
  unet_file = lowres_path(source, "unet", f"{STEM}.bin")
  tensors = pixel_sources.load(unet_file)
  del tensors["conv_in.bias"]
  tensors["new.weight"] = torch.zeros(2)
  pixel_sources.save(unet_file, tensors)
  vae_file = lowres_path(source, "vae", f"{STEM}.safetensors")
  tensors = pixel_sources.load(vae_file)
  tensors["quant_conv.bias"] = torch.zeros(3)
  pixel_sources.save(vae_file, tensors)
  torch.save(
    torch.zeros(1, 3, 11), lowres_path(source, "uncond_embeddings.bin")
  )
  message = refusal(source, tmp_path)
  for words in (
    f"missing: pixel_decoding/unet/{STEM}.bin: conv_in.bias",
    f"not used: pixel_decoding/unet/{STEM}.bin: new.weight",
    f"vae/{STEM}.safetensors: quant_conv.bias [3] instead of [8]",
    "uncond_embeddings.bin [1, 3, 11] instead of [1, any, 10]",
  ):
    assert words in message


def test_a_shard_that_an_index_names_and_is_missing_is_named(source, tmp_path):
  index = pixel_sources.shard(lowres_path(source, "unet", f"{STEM}.bin"), 3)
  lost = f"{STEM}-00002-of-00003.bin"
  index.with_name(lost).unlink()
  message = refusal(source, tmp_path)
  assert f"pixel_decoding/unet lacks {lost}" in message


@pytest.mark.parametrize("kind", ["unet", "vae"])
def test_truncated_weights_are_named(source, tmp_path, kind):
  (path,) = lowres_path(source, kind).glob(f"{STEM}.*")
  path.write_bytes(path.read_bytes()[:5000])
  message = refusal(source, tmp_path)
  assert f"pixel_decoding/{kind}/{path.name}" in message
  assert "truncated" in message


@pytest.mark.parametrize(
  ("file", "fields", "words"),
  [
    ("unet/config.json", {"act_fn": "mish"}, "act_fn"),
    (
      "unet/config.json",
      {"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]},
      "down_block_types",
    ),
    ("vae/config.json", {"act_fn": "mish"}, "act_fn"),
    (
      "scheduler/scheduler_config.json",
      {"_class_name": "ScoreSdeVeScheduler"},
      "ScoreSdeVeScheduler",
    ),
  ],
)
def test_networks_and_schedulers_of_other_kinds_are_named(
  source, tmp_path, file, fields, words
):
  path = lowres_path(source, file)
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))
  message = refusal(source, tmp_path)
  assert words in message
  assert f"pixel_decoding/{file}" in message


def test_a_unet_of_the_other_decoder_is_named(tmp_path):
  source = tmp_path / "source"
  pixel_sources.write(source / FOLDERS["highres_pixels"], "lowres_pixels")
  pixel_sources.write(
    source / FOLDERS["lowres_pixels"],
    "highres_pixels",
    uncond=np.zeros((1, 2, 18), np.float32),
  )
  message = refusal(source, tmp_path, list(FOLDERS))
  without = "highres_pixel_decoding/unet is a U-Net without SDXL's additional"
  assert without in message
  assert "pixel_decoding/unet is a U-Net with SDXL's additional" in message


def test_networks_that_do_not_fit_each_other_are_named(tmp_path):
  """U-Net and autoencoder, and semantic decoder and U-Net."""
  source = pixel_sources.write_official(tmp_path / "source")
  only = ["lowres", "lowres_pixels"]
  decoder = sources.state()[sources.FILES["lowres"]]
  for name in ("weight", "bias"):
    wide = decoder[f"unet_proj.{name}"]
    decoder[f"unet_proj.{name}"] = np.concatenate([wide, wide[:2]])
  sources.save(source / sources.FILES["lowres"], decoder)
  (source / "variant_config.json").write_text('{"heads": 3}')
  long = np.zeros((1, 10, 10), np.float32)
  torch.save(
    torch.from_numpy(long), lowres_path(source, "uncond_embeddings.bin")
  )
  path = lowres_path(source, "vae", "config.json")
  fields = json.loads(path.read_text()) | {"latent_channels": 6}
  path.write_text(json.dumps(fields))
  message = refusal(source, tmp_path, only)
  for words in (
    "lowres makes conditions of width 12 and an additional 0 numbers,"
    " pixel_decoding/unet expects 10 and 0",
    "has 10 tokens, more than the 9 of lowres",
    "pixel_decoding/unet has 4 input and 4 output channels, the latents of"
    " pixel_decoding/vae have 6",
  ):
    assert words in message


def test_a_single_folder_is_imported_with_its_unconditional_embeddings(
  source, tmp_path
):
  report = imported(lowres_path(source), tmp_path / "model", None)
  assert report["source"] == "diffusers"
  assert_equal(params(tmp_path / "model", "lowres_pixels"), wanted(*LOWRES))
