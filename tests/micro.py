"""The tiny configs made smaller still: seconds a stage, the same code."""

import contextlib
import functools
import importlib
import pathlib
import shutil
from unittest import mock

import jax

from lavit_jax import quickstart, sharding

SCENES = 40


def config(stage, root, **updates):
  """The tiny config of a stage at width 16; `updates` are dotted fields."""
  module = importlib.import_module(f"lavit_jax.configs.tiny.{stage}")
  cfg = module.get_config()
  root = pathlib.Path(root)
  cfg.model_dir = str(root / "model")
  cfg.batch_size = 8
  cfg.data.train_size = SCENES
  cfg.data.held_out_size = SCENES
  cfg.data.text_vocab = 400
  cfg.data.threads = 0
  cfg.log.every = 2
  cfg.eval.every, cfg.eval.batches = 1000, 1
  cfg.checkpoint.every = 2
  small = dict(width=16, depth=1, num_heads=2, unroll=1)
  if stage == "encoder":
    cfg.model.vit.update(small | {"mlp_dim": 32})
    for text in (cfg.model.text, cfg.model.captioner):
      text.update(small | {"num_kv_heads": 2, "mlp_dim": 32})
    cfg.model.embed_dim = 8
  if stage == "tokenizer":
    parts = cfg.model.tokenizer
    parts.selector.width = 16
    parts.merger.update(small | {"mlp_dim": 32})
    parts.quantizer.update(dict(width=16, num_codes=32, code_dim=8))
    parts.decoder.update(small | {"mlp_dim": 32, "code_dim": 8, "out_dim": 16})
  if stage == "pixels":
    pixels = cfg.model.pixels
    pixels.feature_dim = 16
    pixels.grid_channels = 8
    pixels.unet.channels = (16, 16)
    pixels.unet.cross_dim = 16
    pixels.unet.in_channels = pixels.unet.out_channels + 8
  if stage == "pretrain":
    cfg.model.llm.update(small | {"num_kv_heads": 2, "mlp_dim": 32})
    cfg.model.lora, cfg.model.frozen_dtype = dict(rank=0, alpha=0.0), "float32"
    cfg.data.cache_dir = str(root / "codes" / "train")
    cfg.data.held_out_cache_dir = str(root / "codes" / "held_out")
    cfg.data.length, cfg.data.slots, cfg.data.window = 128, 6, 64
  for name in cfg.schedule:
    phase = cfg.phases[name]
    phase.steps = 2
    if "kmeans_batches" in phase:
      phase.kmeans_batches, phase.kmeans_iters = 4, 2
  for path, value in updates.items():
    node = cfg
    *parents, last = path.split("__")
    for parent in parents:
      node = node[parent]
    node[last] = value
  return cfg


def train_all(root):
  """Every stage in a row under `root`, as `lavit quickstart` trains them."""
  with one_device():
    quickstart.train(
      root, configs=lambda stage: config(stage, root), quiet=True
    )


@contextlib.contextmanager
def one_device():
  """Meshes of one device inside: eight take long to compile for."""
  first = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
  with mock.patch.object(sharding, "make_mesh", first):
    yield


def branch(root, tmp_path, count):
  """`count` new roots that start with the model and caches of `root`."""
  roots = []
  for number in range(count):
    new = pathlib.Path(tmp_path) / f"branch{number}"
    for folder in ("model", "codes"):
      shutil.copytree(root / folder, new / folder)
    roots.append(new)
  return roots
