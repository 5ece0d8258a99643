"""Export of parts with U-Nets as folders in diffusers' format."""

import dataclasses
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch", reason="writes PyTorch files")
diffusers = pytest.importorskip("diffusers", reason="reads what was exported")
pytest.importorskip("safetensors", reason="reads safetensors files")

from lavit_jax.core import errors
from lavit_jax.core.storage import checkpoints
from lavit_jax.diffusion import schedules, solvers
from lavit_jax.models import lora
from lavit_jax.models.pixels import unet, vae
from lavit_jax.port import exporting, importing
from lavit_jax.port.reading import pixel_folders
from tests.golden import load
from tests.port import pixel_sources, sources

FOLDERS, STEM = pixel_sources.FOLDERS, pixel_sources.STEM
_QUICK = {"xla_backend_optimization_level": 0}


def imported(source, target, only=None):
  importing.run(source, target, only=only, quiet=True)
  return target


def exported(model, target, format="official"):
  return exporting.run(model, target, format=format, quiet=True)


def files(root):
  return sorted(
    path.relative_to(root).as_posix()
    for path in root.rglob("*")
    if path.is_file()
  )


def assert_comes_back(source, target):
  """Checks every file under `source`: tensors by bits, others by bytes."""
  assert files(target) == files(source)
  for name in files(source):
    if not name.endswith((".bin", ".safetensors")):
      assert (target / name).read_bytes() == (source / name).read_bytes(), name
      continue
    found, wanted = (pixel_sources.load(p / name) for p in (target, source))
    if isinstance(wanted, torch.Tensor):
      found, wanted = {"": found}, {"": wanted}
    sources.assert_same_state(found, wanted)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """Returns (source, model) with both pixel decoders."""
  root = tmp_path_factory.mktemp("pixels")
  for part in FOLDERS:
    pixel_sources.write_official(root / "source", part)
  top = root / "source" / FOLDERS["highres_pixels"] / "model_index.json"
  top.write_text('{ "_class_name": "Pipeline"}')
  return root / "source", imported(
    root / "source", root / "model", list(FOLDERS)
  )


def test_all_files_come_back(model, tmp_path):
  source, directory = model
  report = exported(directory, tmp_path / "back")
  assert_comes_back(source, tmp_path / "back")
  assert "no encoder, tokenizer, llm: import it again" in report["notes"][0]
  assert f"--only {','.join(FOLDERS)}" in report["notes"][0]
  imported(tmp_path / "back", tmp_path / "again", list(FOLDERS))


def test_older_names_shards_and_half_precision_come_back(tmp_path):
  source = pixel_sources.write_official(
    tmp_path / "source",
    generation="query",
    dtype=torch.bfloat16,
    files=(f"{STEM}.safetensors", f"{STEM}.bin"),
  )
  root = source / FOLDERS["lowres_pixels"]
  pixel_sources.shard(root / "unet" / f"{STEM}.safetensors", 3)
  imported(source, tmp_path / "model", ["lowres_pixels"])
  exported(tmp_path / "model", tmp_path / "back")
  assert_comes_back(source, tmp_path / "back")


def test_a_variant_keeps_its_name_only_in_half_precision(tmp_path):
  half = f"{STEM}.fp16.safetensors"
  source = pixel_sources.write_official(
    tmp_path / "source", dtype=torch.float16, files=(half, half)
  )
  only, part = ["lowres_pixels"], "lowres_pixels"
  model = imported(source, tmp_path / "model", only)
  exported(model, tmp_path / "back")
  assert_comes_back(source, tmp_path / "back")
  importing.run(
    source, tmp_path / "wide", only=only, dtype="float32", quiet=True
  )
  exported(tmp_path / "wide", tmp_path / "widened")
  root = tmp_path / "widened" / FOLDERS[part]
  assert (root / "unet" / f"{STEM}.bin").is_file()
  assert (root / "vae" / f"{STEM}.safetensors").is_file()


@pytest.mark.shared
@pytest.mark.skipif(
  "LAVIT_SHARED" not in os.environ, reason="LAVIT_SHARED: golden checkpoints"
)
def test_the_recorded_checkpoints_come_back_complete(tmp_path):
  root = pathlib.Path(os.environ["LAVIT_SHARED"]) / "golden"
  for source in sorted(root.glob("*/checkpoint")):
    target = tmp_path / source.parent.name
    imported(source, target / "model")
    exported(target / "model", target / "back")
    assert_comes_back(source, target / "back")
    older = source.parent / "extra" / "vae_deprecated_names"
    if older.is_dir():
      found = pixel_folders.open_network(older, "vae", "extra")
      assert found.generation == "query"


# What diffusers makes of it -------------------------------------------------


def diffusers_networks(folder):
  """Loads U-Net, autoencoder and DDIM in diffusers, with all tensors used."""
  found = []
  for kind, name in (
    (diffusers.UNet2DConditionModel, "unet"),
    (diffusers.AutoencoderKL, "vae"),
  ):
    official = name == "unet" and (folder / name / f"{STEM}.bin").is_file()
    net, info = kind.from_pretrained(
      folder,
      subfolder=name,
      output_loading_info=True,
      use_safetensors=not official,
    )
    assert not any(info.values()), info
    found.append(net.eval())
  scheduler = diffusers.DDIMScheduler.from_pretrained(
    folder, subfolder="scheduler"
  )
  return (*found, scheduler)


def inputs(config):
  """Returns random inputs of a U-Net, NCHW."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape, np.float32)
  arguments = {
    "z": normal(2, 4, 4, 6),
    "condition": normal(2, 5, config.cross_dim),
  }
  details = config.details
  if details.added_dim:
    width = details.added_dim - 6 * details.added_time_dim
    arguments |= {"pooled": normal(2, width), "sizes": 100 * abs(normal(2, 6))}
  return arguments


def assert_computes_the_same(model, part, folder):
  """Compares diffusers with the exported files and the part here."""
  stored = checkpoints.load_part(model, part)
  config = unet.UNetConfig(**stored.meta["unet"])
  net, latent, scheduler = diffusers_networks(folder)
  arguments = inputs(config)
  to_torch = {k: torch.from_numpy(v) for k, v in arguments.items()}
  added = None
  if "pooled" in arguments:
    added = {"text_embeds": to_torch["pooled"], "time_ids": to_torch["sizes"]}
  with torch.inference_mode():
    out = net(
      to_torch["z"],
      401,
      to_torch["condition"],
      added_cond_kwargs=added,
    ).sample.numpy()
    image = latent.decode(to_torch["z"]).sample.numpy()
  z = jnp.asarray(arguments.pop("z").transpose(0, 2, 3, 1))

  @jax.jit
  def ours(params, z, arguments):
    t = jnp.full(len(z), 401)
    eps = unet.UNet(config).apply({"params": params["unet"]}, z, t, **arguments)
    decoder = vae.AutoencoderKL(vae.VaeConfig(**stored.meta["vae"]))
    made = decoder.apply({"params": params["vae"]}, z, method="decode")
    return eps, made

  ours = ours.lower(stored.params, z, arguments).compile(_QUICK)
  eps, made = ours(stored.params, z, arguments)
  for found, wanted in ((eps, out), (made, image)):
    found = np.asarray(found).transpose(0, 3, 1, 2)
    assert load.error(found, wanted) <= 1e-5
  schedule = schedules.NoiseSchedule(**stored.meta["schedule"])
  scheduler.set_timesteps(5)
  steps, numbers = solvers.OFFICIAL.plan(schedule, 5)
  np.testing.assert_array_equal(steps, scheduler.timesteps)
  now = {k: v[1] for k, v in numbers.items()}
  z, _ = solvers.OFFICIAL.step(schedule, eps, z, None, now)
  step = scheduler.step(
    torch.from_numpy(out), int(steps[1]), to_torch["z"]
  ).prev_sample
  assert load.error(np.asarray(z).transpose(0, 3, 1, 2), step.numpy()) <= 1e-5


@pytest.mark.parametrize("format", exporting.FORMATS)
@pytest.mark.parametrize("part", FOLDERS)
def test_diffusers_loads_an_imported_model(model, tmp_path, part, format):
  _, directory = model
  exported(directory, tmp_path / "out", format)
  folder = FOLDERS[part] if format == "official" else part
  assert_computes_the_same(directory, part, tmp_path / "out" / folder)


def test_hugging_face_files_are_safetensors_under_todays_names(tmp_path):
  source = pixel_sources.write_official(
    tmp_path / "source", generation="query", files=(f"{STEM}.bin",) * 2
  )
  model = imported(source, tmp_path / "model", ["lowres_pixels"])
  exported(model, tmp_path / "hf", "huggingface")
  root = tmp_path / "hf" / "lowres_pixels"
  assert files(root) == [
    "scheduler/scheduler_config.json",
    "uncond_embeddings.safetensors",
    "unet/config.json",
    f"unet/{STEM}.safetensors",
    "vae/config.json",
    f"vae/{STEM}.safetensors",
  ]
  (uncond,) = pixel_sources.load(
    root / "uncond_embeddings.safetensors"
  ).values()
  np.testing.assert_array_equal(uncond, pixel_sources.UNCOND)
  sources.assert_same_state(
    pixel_sources.load(root / "vae" / f"{STEM}.safetensors"),
    pixel_sources.state("lowres_pixels", "vae"),
  )


def trained(model, target, part, **meta):
  """Saves the part as training does, without traces of an import."""
  stored = checkpoints.load_part(model, part, dtype=None)
  kept = {name: stored.meta[name] for name in ("unet", "vae", "schedule")}
  checkpoints.save_part(target, part, stored.params, kept | meta)
  return stored


@pytest.mark.parametrize("part", FOLDERS)
def test_diffusers_loads_a_model_trained_here(model, tmp_path, part):
  schedule = dataclasses.asdict(
    schedules.NoiseSchedule(
      prediction="velocity", zero_snr=True, spacing="trailing"
    )
  )
  target = tmp_path / "trained"
  trained(model[1], target, part, schedule=schedule)
  exported(target, tmp_path / "out")
  assert_computes_the_same(target, part, tmp_path / "out" / FOLDERS[part])


def test_a_unet_with_merged_lora_is_exported_as_it_computes(model, tmp_path):
  part = "lowres_pixels"
  stored = checkpoints.load_part(model[1], part)
  config = unet.UNetConfig(**stored.meta["unet"])
  boxed = jax.eval_shape(
    lambda: unet.UNet(config).init(
      jax.random.key(0),
      jnp.zeros((1, 2, 2, 4)),
      jnp.zeros(1, jnp.int32),
      jnp.zeros((1, 1, 10)),
    )
  )["params"]
  change = jax.tree.map(
    lambda x: x + 0.1,
    jax.tree.map(
      lambda x: x.value,
      lora.init(jax.random.key(1), boxed, 2),
      is_leaf=lambda x: hasattr(x, "value"),
    ),
  )
  merged = lora.merge(stored.params["unet"], change, 0.5)
  meta = {k: stored.meta[k] for k in ("unet", "vae", "schedule", "port")}
  target = tmp_path / "trained"
  params = stored.params | {"unet": merged}
  checkpoints.save_part(target, part, params, meta)
  exported(target, tmp_path / "out")
  folder = tmp_path / "out" / FOLDERS[part]
  assert_computes_the_same(target, part, folder)
  changed = pixel_sources.load(folder / "unet" / f"{STEM}.bin")
  name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
  assert not torch.equal(changed[name], pixel_sources.state(part, "unet")[name])


def test_outdated_kept_files_are_replaced(model, tmp_path):
  """Training has changed the schedule but not the sizes."""
  part = "highres_pixels"
  source, _ = model
  imported(source, tmp_path / "model", [part])
  stored = checkpoints.load_part(tmp_path / "model", part, dtype=None)
  meta = {k: stored.meta[k] for k in ("unet", "vae", "schedule", "port")}
  meta["schedule"] = meta["schedule"] | {"prediction": "velocity"}
  checkpoints.save_part(tmp_path / "model", part, stored.params, meta)
  exported(tmp_path / "model", tmp_path / "out")
  root, before = tmp_path / "out" / FOLDERS[part], source / FOLDERS[part]
  read = lambda root, file: (root / file).read_bytes()
  for file in ("unet/config.json", "vae/config.json"):
    assert read(root, file) == read(before, file)
  scheduler = json.loads(read(root, pixel_folders.SCHEDULER))
  assert scheduler["prediction_type"] == "v_prediction"


def test_parts_that_diffusers_lacks_are_refused(model, tmp_path):
  part = "lowres_pixels"
  stored = trained(model[1], tmp_path / "other", part)
  for change, words in (
    ({"schedule": dataclasses.asdict(schedules.PIXELS)}, "'cosine'"),
    ({"unet": stored.meta["unet"] | {"ff_mult": 2}}, "ff_mult=2"),
  ):
    meta = {k: stored.meta[k] for k in ("unet", "vae", "schedule")} | change
    checkpoints.save_part(tmp_path / "other", part, stored.params, meta)
    with pytest.raises(errors.CheckpointError, match=words) as caught:
      exported(tmp_path / "other", tmp_path / "out")
    assert part in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_semantic_and_a_pixel_decoder_are_exported_alone(model, tmp_path):
  target = tmp_path / "model"
  importing.run(
    sources.write(tmp_path / "source"), target, only=["lowres"], quiet=True
  )
  stored = trained(model[1], target, "lowres_pixels")
  exported(target, tmp_path / "out")
  assert sources.FILES["lowres"] in files(tmp_path / "out")
  only = ["lowres", "lowres_pixels"]
  importing.run(tmp_path / "out", tmp_path / "back", only=only, heads=3)
  again = checkpoints.load_part(tmp_path / "back", "lowres_pixels", dtype=None)
  jax.tree.map(np.testing.assert_array_equal, again.params, stored.params)
  del stored.params["uncond"]
  meta = {k: stored.meta[k] for k in ("unet", "vae", "schedule")}
  checkpoints.save_part(target, "lowres_pixels", stored.params, meta)
  report = exported(target, tmp_path / "without")
  assert any("uncond_embeddings.bin" in note for note in report["notes"])
