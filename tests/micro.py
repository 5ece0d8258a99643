"""The tiny configs made smaller still: seconds a stage, the same code."""

import contextlib
import copy
import dataclasses
import functools
import importlib
import json
import math
import pathlib
import shutil
from unittest import mock

import jax
from jax.experimental.compilation_cache import compilation_cache

from lavit_jax.core import image_io, sharding
from lavit_jax.core.storage import checkpoints
from lavit_jax.data.sources import shapes
from lavit_jax.jobs import quickstart
from lavit_jax.models.tokenizer import tokenizer
from lavit_jax.train import objectives

SCENES = 40
_CACHE = (
  "jax_enable_compilation_cache",
  "jax_compilation_cache_dir",
  "jax_persistent_cache_min_compile_time_secs",
)


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
    # One level: what takes long is to compile it, not to run it.
    pixels.unet.update(
      channels=(16,), attention=(True,), transformer_layers=(1,), num_heads=(4,)
    )
    pixels.unet.cross_dim = 16
    pixels.unet.in_channels = pixels.unet.out_channels + 8
  if stage == "pretrain":
    cfg.model.llm.update(small | {"num_kv_heads": 2, "mlp_dim": 32})
    cfg.model.lora, cfg.model.frozen_dtype = dict(rank=0, alpha=0.0), "float32"
    cfg.data.cache_dir = str(root / "codes" / "train")
    cfg.data.held_out_cache_dir = str(root / "codes" / "held_out")
    cfg.data.length, cfg.data.slots, cfg.data.window = 128, 6, 64
  for network in cfg.model.get("compute", {}).values():
    network.unroll = 1
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


def assuming(cfg):
  """The config with `assumed` in place of its model and data."""
  real = objectives.build(cfg)
  meta = checkpoints.read_meta(cfg.model_dir, "tokenizer")
  config = tokenizer.config_from_dict(meta["tokenizer"])
  words = cfg.stage == "pretrain"
  cfg = copy.deepcopy(cfg)
  cfg.assumed = dict(
    tokenizer=json.loads(json.dumps(dataclasses.asdict(config))),
    text_size=real.text.size if words else 0,
    capacity=real.capacity if words else 0,
  )
  cfg.model_dir = cfg.data.path = "nowhere"
  return cfg


def assumed_tokenizer():
  """The config of the tokenizer where no encoder is: all told by shapes."""
  cfg = config("tokenizer", "nowhere")
  vit = config("encoder", "nowhere").model.vit.to_dict()
  sizes = cfg.model.tokenizer.to_dict() | {"vit": vit}
  cfg.assumed = dict(tokenizer=sizes, text_size=0, capacity=0)
  return cfg


def train_all(root):
  """Every stage in a row under `root`, as `lavit quickstart` trains them."""
  with one_device():
    quickstart.train(
      root, configs=lambda stage: config(stage, root), quiet=True
    )


def train_tokenizer(root):
  """The first stages of `train_all`, up to the caches of codes."""
  configs = {
    stage: config(stage, root) for stage in ("encoder", "tokenizer", "pretrain")
  }
  root.mkdir()
  with one_device():
    for stage in ("encoder", "tokenizer", "codes"):
      run = functools.partial(quickstart._run_stage, stage, configs, quiet=True)
      quickstart._once(root, stage, run)


@contextlib.contextmanager
def devices(count):
  """Meshes of the first devices inside: eight take long to compile for."""
  some = functools.partial(sharding.make_mesh, devices=jax.devices()[:count])
  with mock.patch.object(sharding, "make_mesh", some):
    yield


def one_device():
  """Meshes of one device inside."""
  return devices(1)


@contextlib.contextmanager
def own_cache():
  """What is told inside of JAX's cache of programs holds inside alone."""
  before = {name: getattr(jax.config, name) for name in _CACHE}
  compilation_cache.reset_cache()  # it reads the settings once
  try:
    yield
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()


def images(folder, count=SCENES):
  """A jsonl file of `count` images with captions, written to a folder."""
  source = shapes.ShapesSource(size=count)
  rows = []
  for i in range(count):
    image_io.to_pil(source.image(i)).save(folder / f"{i}.png")
    rows.append({"image": f"{i}.png", "caption": source.captions(i)[0]})
  path = folder / "my.jsonl"
  path.write_text("\n".join(map(json.dumps, rows)) + "\n")
  return path


def perturb(model, name):
  """Writes a part anew, one of its arrays a little changed."""
  part = checkpoints.load_part(model, name, dtype=None)
  leaves, tree = jax.tree.flatten(part.params)
  leaves[0] = leaves[0] + 0.5
  params = jax.tree.unflatten(tree, leaves)
  checkpoints.save_part(model, name, params, part.meta)


def largest_array(jaxpr) -> int:
  """Elements of the largest array that a jaxpr makes, inner ones too."""
  largest = 0
  for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    for made in equation.outvars:
      largest = max(largest, math.prod(getattr(made.aval, "shape", ())))
    for inner in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
    ):
      if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
        largest = max(largest, largest_array(inner))
  return largest


def branch(root, tmp_path, count):
  """`count` new roots that start with the model and caches of `root`."""
  roots = []
  for number in range(count):
    new = pathlib.Path(tmp_path) / f"branch{number}"
    for folder in ("model", "codes"):
      shutil.copytree(root / folder, new / folder)
    roots.append(new)
  return roots
