"""Stage `latents`: resume, devices, caches, LoRA, and what is refused."""

import dataclasses
import pathlib
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lavit_jax.core import errors, image_io, sharding
from lavit_jax.core.storage import checkpoints
from lavit_jax.data.caches import latents
from lavit_jax.diffusion import schedules
from lavit_jax.infer.pixels import decoders
from lavit_jax.jobs import latents as latents_lib
from lavit_jax.models import lora
from lavit_jax.models.pixels import unet, vae
from lavit_jax.train import loop, objectives
from lavit_jax.train import phases as phases_lib
from lavit_jax.train import step as step_lib
from lavit_jax.train.resilience import run_checkpoints
from lavit_jax.train.telemetry import writers
from tests import micro
from tests.train import (
  drawn,
  latent_micro,
  outlines,
  parts,
  programs,
  stubs,
)

pytestmark = pytest.mark.slow

PHOTOS = pathlib.Path(__file__).parents[2] / "data_files" / "coco"
_LORA = {
  "model__lora": {"rank": 2, "alpha": 4.0},
  "model__unet__remat": "full",
  "model__unet__scan": True,  # which a LoRA cannot have
  "data__buckets": ((24, 32),),  # each is compiled for by itself
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """A model directory with all parts, Stable Diffusion's as well."""
  root = tmp_path_factory.mktemp("source")
  latent_micro.save_model(root / "model")
  return root / "model"


def _branch(source, root, kind):
  """A model directory without the pixel decoder that is to be trained."""
  shutil.copytree(source, root / "model")
  shutil.rmtree(root / "model" / f"{kind}_pixels")
  return root


def _config(kind, root, source, **updates):
  """Trains on photographs from what is in `source`."""
  photos = {
    "data__kind": "jsonl",
    "data__path": str(PHOTOS / "index.jsonl"),
    "data__held_out_path": str(PHOTOS / "index.jsonl"),
    "start_from": str(source),
  }
  return latent_micro.config(kind, root, **photos | updates)


def _train(cfg, root, **kwargs):
  with micro.one_device(), programs.shared():
    return loop.train(cfg, root, quiet=True, **kwargs)


@pytest.fixture(scope="module")
def straight(source, tmp_path_factory):
  """A LoRA of lowres, trained without a stop."""
  root = _branch(source, tmp_path_factory.mktemp("straight"), "lowres")
  _train(_config("lowres", root, source, **_LORA), root / "run")
  return root


def _load(root, part):
  return checkpoints.load_part(root / "model", part)


def _equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def _state(run):
  """The newest checkpoint's arrays: parameters, moments, means, all."""
  manager = run_checkpoints.RunCheckpoints(run / "checkpoints")
  step = manager.latest_step()
  manager.close()
  path = run / "checkpoints" / str(step) / "state"
  return checkpoints.ocp.StandardCheckpointer().restore(path.absolute())


def test_resumed_equals_uninterrupted(straight, source, tmp_path):
  """Stopped at an odd step: means and LoRA, moments and batches too."""
  root = _branch(source, tmp_path, "lowres")
  for stop in (3, None):
    quiet = {"eval__sample_pictures": 0}  # drawing is no part of training
    cfg = _config("lowres", root, source, **_LORA, **quiet)
    _train(cfg, root / "run", stop_at=stop)
  _equal(_state(root / "run"), _state(straight / "run"))
  for part in ("lowres", "lowres_pixels"):
    _equal(_load(root, part).params, _load(straight, part).params)
  rows = [
    writers.read_json_lines(folder / "run" / "batches.jsonl")
    for folder in (root, straight)
  ]
  crcs = [{row["step"]: row["crc32"] for row in part} for part in rows]
  assert crcs[0] == crcs[1]
  assert len(crcs[0]) == 4


def test_a_lora_trains_everywhere_and_nothing_else_changes(straight, source):
  state = _state(straight / "run")
  trained = state["params"]["unet"]
  for path, leaf in jax.tree_util.tree_leaves_with_path(trained):
    assert np.abs(leaf).max() > 0, path  # `b` began at zero
  start = checkpoints.load_part(source, "lowres_pixels").params
  made = _load(straight, "lowres_pixels")
  _equal(made.params["vae"], start["vae"])
  merged = lora.merge(start["unet"], state["extra"]["ema"]["unet"], 2.0)
  _equal(made.params["unet"], merged)
  moved = jax.tree.map(
    lambda a, b: bool((a != b).any()), made.params["unet"], start["unet"]
  )
  for path, changed in jax.tree_util.tree_leaves_with_path(moved):
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    targeted = names[-1] == "kernel" and names[-2] in lora.ATTENTION
    assert changed == targeted, names


def test_a_trained_part_has_the_form_of_an_imported_one(straight, source):
  made, start = (
    _load(straight, "lowres_pixels"),
    checkpoints.load_part(source, "lowres_pixels"),
  )
  shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)
  assert shapes(made.params) == shapes(start.params)
  config = unet.UNetConfig(**made.meta["unet"])
  assert config == dataclasses.replace(
    latent_micro.unet_config("lowres"), remat="full"
  )
  assert vae.VaeConfig(**made.meta["vae"]) == latent_micro.VAE
  assert (
    schedules.NoiseSchedule(**made.meta["schedule"]).prediction == "velocity"
  )
  semantic = _load(straight, "lowres")
  old = checkpoints.load_part(source, "lowres")
  _equal(semantic.params["decoder"], old.params["decoder"])
  kernel = semantic.params["unet_proj"]["kernel"]
  assert (kernel != old.params["unet_proj"]["kernel"]).any()
  painter = decoders.load(straight / "model", "lowres")  # checks that all fit
  assert painter.schedule.prediction == "velocity"


def test_an_evaluation_shows_real_and_drawn_images(straight):
  rows = writers.read_json_lines(straight / "run" / "metrics.jsonl")
  names = {name for row in rows for name in row}
  assert {"held_out/loss", "held_out/eps_mse", "held_out/picture_mse"} <= names
  (path,) = (straight / "run" / "pictures").iterdir()
  height, width = image_io.size_of(path)
  assert (height % 2, width % 2) == (0, 0)
  assert height >= 48


def _whole(kind, source, root, **updates):
  """(objective, phase) of a whole U-Net, from nothing."""
  root = _branch(source, root, kind)
  cfg = _config(kind, root, "", vae_from=str(source), **updates)
  return objectives.build(cfg), phases_lib.phases_of(cfg)[0]


@pytest.fixture(scope="module")
def highres(source, tmp_path_factory):
  """The SDXL kind."""
  return _whole("highres", source, tmp_path_factory.mktemp("highres"))


@pytest.fixture
def lowres(source, tmp_path):
  """The other, every second image conditioned on `uncond` alone."""
  dropout = {"phases__train__condition_dropout": 0.5}
  return _whole("lowres", source, tmp_path, **dropout)


def _one_step(objective, phase, first, sizes, count):
  """Metrics, parameters and their mean after one step; is any sharded?"""
  mesh = sharding.make_mesh(sizes, jax.devices()[:count])
  batch = next(objective.batches(0))
  with sharding.use(mesh):
    init = step_lib.init_fn(objective, 0)
    layout = sharding.param_shardings(jax.eval_shape(init), mesh)
    state = jax.device_put(first, layout)
    labels = objective.labels(phase, state.params)
    # Plain gradient steps: Adam's would turn rounding into whole steps.
    tx = optax.sgd(lambda _: 0.1)
    state = state.replace(opt_state=tx.init(state.params))
    frozen = jax.device_put(objective.load_frozen(), sharding.replicated(mesh))
    step = jax.jit(step_lib.make_step(objective, phase, labels, tx))
    state, metrics = step(state, frozen, sharding.put_batch(batch, mesh))
    split = any(
      not leaf.sharding.is_fully_replicated
      for leaf in jax.tree.leaves(state.params)
    )
    return jax.device_get((metrics, state.params, state.extra)), split


@pytest.mark.parametrize("kind", ["lowres", "highres"])
def test_eight_devices_update_as_one_does(kind, request):
  objective, phase = request.getfixturevalue(kind)
  abstract = jax.eval_shape(step_lib.init_fn(objective, 0))
  first = drawn.draw(abstract).replace(rng=np.array([0, 7], np.uint32))
  one, _ = _one_step(objective, phase, first, {}, 1)
  moved = jax.tree.map(
    lambda a, b: np.abs(a - b).max(), one[1]["unet"], first.params["unet"]
  )
  assert max(jax.tree.leaves(moved)) > 1e-3
  if kind == "lowres":
    assert np.abs(one[1]["uncond"] - first.params["uncond"]).max() > 0

  def close(path, a, b):
    scale = max(np.abs(a).max(), 1e-3)
    name = jax.tree_util.keystr(path)
    np.testing.assert_allclose(b, a, atol=2e-4 * scale, err_msg=name)

  meshes = {  # the U-Nets differ in their conditions alone
    "lowres": {"fsdp": 2, "tensor": 2, "context": 2},
    "highres": {"data": 2, "fsdp": 2, "tensor": 2},
  }
  eight, split = _one_step(objective, phase, first, meshes[kind], 8)
  assert split, "no parameter was sharded"
  jax.tree_util.tree_map_with_path(close, one, eight)


@pytest.mark.parametrize("kind", ["lowres", "highres"])
def test_parts_are_the_whole_batch(kind, source, tmp_path):
  """Latents, the selection and noise are drawn; mean weights move once."""
  settings = {"sample_latents": True, "selection": "sampled", "draws": 2}
  updates = {f"phases__train__{name}": x for name, x in settings.items()}
  objective, phase = _whole(kind, source, tmp_path, **updates)
  case = outlines.Case(stubs.with_small_unet(objective))
  extra, metrics = parts.assert_parts_are_the_whole(objective, phase, case)
  assert extra["updates"] == 1
  assert metrics["loss"].count == 2 * case.batch["valid"].sum()


def test_highres_draws_images_and_is_written_as_imported(source, tmp_path):
  root = _branch(source, tmp_path, "highres")
  objective = objectives.build(_config("highres", root, source))
  shapes = sharding.unbox(jax.eval_shape(step_lib.init_fn(objective, 0)))
  state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  batch = next(objective.batches(0))
  height, width = batch["target"].shape[1:3]
  metrics = jax.eval_shape(
    objective.held_out_metrics,
    state.params,
    objective.load_frozen(),
    state.extra,
    batch,
  )
  assert metrics["images"].shape == (2, 2 * height, width, 3)
  assert {"loss", "eps_mse", "latent_mse", "picture_mse"} <= set(metrics)
  phase = phases_lib.phases_of(objective.config)[0]
  started = objective.begin_phase(phase, state)
  middle = started[0]["unet"]["mid_block"]["attentions_0"]
  assert "transformer_blocks" in middle  # its layers are one scan here
  made = objective.export(*started)
  assert set(made) == {"highres", "highres_pixels"}
  for part, (params, meta) in made.items():
    stored = checkpoints.load_part(source, part)
    jax.tree.map(np.testing.assert_array_equal, params, stored.params)
    assert set(meta) <= set(stored.meta)


def test_every_axis_of_every_network_has_a_rule(highres):
  objective, _ = highres
  init = step_lib.init_fn(objective, 0)
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  boxed = jax.eval_shape(init)
  sharding.param_shardings(boxed, mesh)  # an axis without a rule would raise
  boxes = jax.tree.leaves(
    boxed.params["unet"],
    is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned),
  )
  assert all(isinstance(box, nn.LogicallyPartitioned) for box in boxes)
  net = vae.AutoencoderKL(latent_micro.VAE)
  boxed = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
  sharding.param_shardings(boxed, mesh)


def test_a_share_of_bad_images_is_judged_however_few_there_are(
  source, tmp_path
):
  """Too few to be judged as they come: all of them, before the cache is."""
  photos = shutil.copytree(PHOTOS, tmp_path / "photos")
  for path in sorted(photos.rglob("*.jpg"))[::2]:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  data = _config("lowres", tmp_path, source).data.to_dict()
  data["path"] = data["held_out_path"] = str(photos / "index.jsonl")
  with pytest.raises(errors.DataError, match="images are unusable"):
    latents_lib.write_cache(
      source, "lowres", data, tmp_path / "cache", batch=4, quiet=True
    )
  assert not (tmp_path / "cache").exists()


def test_training_from_cached_latents_is_training_without(source, tmp_path):
  """Cut from the centre, means: the loss is the same to float16's rounding."""
  root = _branch(source, tmp_path, "lowres")
  cfg = _config("lowres", root, source)
  out = tmp_path / "cache"
  summary = latents_lib.write_cache(
    source, "lowres", cfg.data.to_dict(), out, batch=4, quiet=True
  )
  assert summary["images"] == 8
  assert summary["bad"] == 0
  assert sum(p.stat().st_size for p in out.iterdir()) == summary["bytes"]
  again = latents_lib.write_cache(
    source, "lowres", cfg.data.to_dict(), out, quiet=True
  )
  assert again == summary
  plain = objectives.build(cfg)
  cached = objectives.build(
    _config("lowres", root, source, data__latents_dir=str(out))
  )
  for k in range(3):
    left, right = next(plain.batches(k)), next(cached.batches(k))
    for name in ("index", "image", "sizes", "valid"):
      np.testing.assert_array_equal(left[name], right[name])
    assert "target" not in right
  x = jax.jit(plain.networks.latents)(plain.load_frozen(), left)
  y = cached.networks.latents(cached.load_frozen(), right)
  np.testing.assert_allclose(x, y, atol=2e-3 * np.abs(x).max())
  made = cached.provenance()
  frozen = {"encoder", "tokenizer", "semantic_decoder", "autoencoder"}
  data = {"train_data", "held_out_data", "train_cache"}
  assert set(made) == frozen | data
  assert {n: v for n, v in made.items() if n != "train_cache"} == (
    plain.provenance()
  )
  _refuses_other_caches(root, source, out)


def _refuses_other_caches(root, source, out):
  """Of other buckets, another autoencoder, or with random crops."""

  def build(message, error=errors.DataError, **updates):
    updates = {"data__latents_dir": str(out)} | updates
    with pytest.raises(error, match=message):
      objectives.build(_config("lowres", root, source, **updates))

  build("another buckets", data__buckets=((24, 32),))
  scenes = dict(data__kind="shapes", data__path="", data__held_out_path="")
  build("another source", data__image_size=32, **scenes)
  build("random", errors.ConfigError, data__crop="random")
  build("samples new", errors.ConfigError, phases__train__sample_latents=True)
  meta = latents.LatentCache.load(out).meta
  with pytest.raises(errors.DataError, match="another vae"):
    latents.LatentCache.load(out, vae="other", source=meta.source)


_WRONG = {
  "kind": ({"model__kind": "midres"}, errors.LavitError, "midres"),
  "no start": ({"start_from": None}, errors.ConfigError, "not set"),
  "weighting": (
    {"phases__train__weighting": "snr"},
    errors.ConfigError,
    "weighting='snr'",
  ),
  "selection": (
    {"phases__train__selection": "best"},
    errors.ConfigError,
    "selection='best'",
  ),
  "buckets": (
    {"data__buckets": ((32, 31),)},
    errors.ConfigError,
    "multiples",
  ),
  "image size": ({"data__image_size": 48}, errors.ConfigError, "takes 32"),
  "unet width": (
    {"model__unet__cross_dim": 13, "start_from": ""},
    errors.ConfigError,
    "cross_dim=13",
  ),
  "condition": (
    {"model__condition": {"dims": (8, 12), "pooled": 10}},
    errors.ConfigError,
    "one width",
  ),
  "other unet": (
    {"model__unet__details__freq_shift": 1.0},
    errors.ConfigError,
    "freq_shift",
  ),
  "other prediction": (
    {
      "model__schedule__prediction": "sample",
      "phases__train__weighting": "none",
    },
    errors.ConfigError,
    r"schedule\.prediction is 'velocity' there, 'sample' here",
  ),
  "alpha": (
    {"model__lora": {"rank": 2, "alpha": 0.0}},
    errors.ConfigError,
    "alpha",
  ),
  "lora of nothing": (
    {"model__lora": {"rank": 2, "alpha": 1.0}, "start_from": ""},
    errors.ConfigError,
    "start_from",
  ),
  "start": ({"start_from": "nowhere"}, errors.ConfigError, "has no part"),
  "vae": (
    {"start_from": "", "vae_from": ""},
    errors.CheckpointError,
    "no part 'lowres_pixels'",
  ),
  "model": (
    {"model_dir": "nowhere"},
    errors.CheckpointError,
    "nowhere has no part",
  ),
}


@pytest.mark.parametrize("name", _WRONG)
def test_what_does_not_fit_is_refused_before_anything_is_trained(
  name, source, tmp_path
):
  updates, error, message = _WRONG[name]
  root = _branch(source, tmp_path, "lowres")
  cfg = _config("lowres", root, source)
  cfg.unlock()
  for path, value in updates.items():
    *parents, last = path.split("__")
    node = cfg
    for parent in parents:
      node = node[parent]
    del node[last]
    node[last] = value
  with pytest.raises(error, match=message):
    objectives.build(cfg)


def test_a_result_never_overwrites_its_start(source):
  cfg = _config("lowres", source.parent, source)
  with pytest.raises(errors.ConfigError, match="both"):
    objectives.build(cfg)


def test_a_model_without_a_semantic_decoder_is_refused(source, tmp_path):
  root = _branch(source, tmp_path, "lowres")
  shutil.rmtree(root / "model" / "lowres")
  with pytest.raises(errors.CheckpointError, match="no semantic decoder"):
    objectives.build(_config("lowres", root, source))
