"""Objectives of the configs by shapes alone: no data, no weights."""

import functools
import importlib

from lavit_jax.train import objectives
from lavit_jax.train.objectives.frozen import artifacts


def config(name, **changes):
  """The config of a run, "tiny.pretrain"; `a__b=1` sets its field a.b.

  It assumes of the stages before it what their configs say.
  """
  module = importlib.import_module(f"lavit_jax.configs.{name}")
  cfg = module.get_config()
  if name.startswith("tiny"):
    cfg.assumed = _assumed()
  for path, value in changes.items():
    *parents, last = path.split("__")
    functools.reduce(lambda node, key: node[key], parents, cfg)[last] = value
  return cfg


def objective(name, **changes):
  """The objective of a run; arguments as of `config`."""
  cfg = config(name, **changes)
  return objectives.build(cfg, artifacts.AbstractArtifacts(cfg))


@functools.cache
def _assumed():
  tiny = "lavit_jax.configs.tiny"
  model = lambda stage: (
    importlib.import_module(f"{tiny}.{stage}").get_config().model.to_dict()
  )
  sizes = model("tokenizer")["tokenizer"] | {"vit": model("encoder")["vit"]}
  return dict(
    tokenizer=sizes,
    text_size=512,
    capacity=20,
    decoder=sizes["decoder"],
    vae=model("autoencoder")["vae"],
  )
