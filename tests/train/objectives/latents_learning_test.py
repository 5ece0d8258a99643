"""Autoencoder and pixel decoder learn from real photographs, in seconds."""

import importlib
import json
import os
import pathlib

import jax
import numpy as np
import pytest

from lavit_jax.core import image_io, sharding
from lavit_jax.core.storage import checkpoints
from lavit_jax.models.pixels import vae
from lavit_jax.train import loop, objectives
from lavit_jax.train import step as step_lib
from lavit_jax.train.objectives import evaluation
from lavit_jax.train.objectives.frozen import conditioning
from tests import micro
from tests.train import latent_micro, programs


def _save_photographs(root):
  """Copies at 32 px: most of the time would be that of decoding, 16 a step."""
  source = pathlib.Path(os.environ["LAVIT_SHARED"]) / "data/A_coco"
  (root / "images").mkdir()
  rows = [json.loads(line) for line in (source / "index.jsonl").open()]
  for row in rows:
    image = image_io.load(source / row["image"])
    image.thumbnail((32, 32))
    row["image"] = str(pathlib.Path(row["image"]).with_suffix(".png"))
    image.save(root / row["image"])
  text = "".join(json.dumps(row) + "\n" for row in rows)
  (root / "index.jsonl").write_text(text)


def _photographs(cfg, root):
  cfg.data.kind, cfg.data.path = "jsonl", str(root / "index.jsonl")
  return cfg


def _autoencoder(root):
  module = importlib.import_module("lavit_jax.configs.tiny.autoencoder")
  cfg = _photographs(module.get_config(), root)
  cfg.model_dir, cfg.batch_size = str(root / "model"), 16
  cfg.model.vae.update({"channels": (8, 16), "groups": 4})
  cfg.data.image_size = 16
  cfg.eval.every = cfg.checkpoint.every = 1000
  cfg.eval.batches, cfg.phases.train.steps = 2, 90
  return cfg


def _decoder(root):
  buckets = ((16, 16),)  # each is compiled for by itself
  cfg = _photographs(latent_micro.config("lowres", root), root)
  cfg.data.buckets, cfg.batch_size = buckets, 16
  cfg.model.unet.update({"channels": (16, 32), "num_heads": (2, 4)})
  cfg.eval.batches, cfg.eval.sample_pictures, cfg.eval.sample_steps = 2, 16, 10
  cfg.checkpoint.every = 1000
  cfg.phases.train.update({"steps": 80, "lr": 4e-3})
  return cfg


def _untrained(cfg):
  """Held-out metrics before the first step."""
  objective, mesh = objectives.build(cfg), sharding.make_mesh({})
  abstract = sharding.abstract(step_lib.abstract_state(objective), mesh)
  layout = sharding.layout_of(abstract)
  with sharding.use(mesh):
    state = step_lib.jit_init(objective, cfg.seed, layout)()
    frozen = objective.load_frozen()
    evaluator = evaluation.Evaluator(objective, mesh)
    return evaluator.evaluate(state.params, frozen, state.extra).metrics


@pytest.mark.slow
@pytest.mark.shared
def test_photographs_are_learnt(tmp_path):
  """Errors of eps and of drawn images fall, on photographs held out."""
  _save_photographs(tmp_path)
  with micro.one_device(), programs.shared():
    latent_micro.save_model(tmp_path / "model", kinds=())
    made = loop.train(_autoencoder(tmp_path), tmp_path / "vae", quiet=True)
    assert made["picture_mse"] < 0.35 * _check_autoencoder(tmp_path)
    before = _untrained(_decoder(tmp_path))
    after = loop.train(_decoder(tmp_path), tmp_path / "unet", quiet=True)
  assert after["eps_mse"] < 0.85 * before["eps_mse"]
  assert after["latent_mse"] < 0.8 * before["latent_mse"]
  assert after["picture_mse"] < 0.8 * before["picture_mse"]
  assert {"lowres", "lowres_pixels"} <= set(
    checkpoints.parts_in(tmp_path / "model")
  )


def _check_autoencoder(root):
  """Latents times its factor have unit variance; that of the images."""
  part = checkpoints.load_part(root / "model", "lowres_pixels")
  net = vae.AutoencoderKL(vae.VaeConfig(**part.meta["vae"]))
  paths = sorted((root / "images").iterdir())[:32]
  images = np.stack([image_io.to_uint8(image_io.load(p), 16) for p in paths])
  x = conditioning.to_unit(images)
  encode = jax.jit(lambda p, x: net.apply({"params": p}, x, method="encode"))
  mean, _ = encode(part.params["vae"], x)
  np.testing.assert_allclose(np.std(mean) * net.config.scaling_factor, 1, 0.15)
  return float(np.var(x))
