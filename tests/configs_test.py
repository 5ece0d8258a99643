"""Every config file loads; those at full size fit together, by shapes alone."""

import importlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.core import errors, sharding
from lavit_jax.core.storage import checkpoints
from lavit_jax.data.records import filters
from lavit_jax.data.sources import kinds
from lavit_jax.diffusion import stable_diffusion
from lavit_jax.models import lora
from lavit_jax.train import objectives
from lavit_jax.train import phases as phases_lib
from lavit_jax.train import step as step_lib
from lavit_jax.train.objectives.frozen import artifacts

_ROOT = pathlib.Path(__file__).parents[1] / "configs"
CONFIGS = sorted(
  str(path.relative_to(_ROOT))
  for path in _ROOT.glob("*/*.py")
  if path.stem not in ("__init__", "common")
)


def _module(name):
  dotted = name.removesuffix(".py").replace("/", ".")
  return importlib.import_module(f"lavit_jax.configs.{dotted}")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_loads_and_says_how_it_is_launched(name):
  module = _module(name)
  cfg = module.get_config()
  assert f"lavit train --config configs/{name} --workdir" in module.__doc__
  assert cfg.stage in objectives.STAGES
  phases = phases_lib.phases_of(cfg)
  assert phases[-1].stop == sum(phase.steps for phase in phases)
  for phase in phases:
    assert set(phase.train.values()) <= set(cfg.optimizer.groups)
  json.loads(cfg.to_json_best_effort())
  assert set(cfg.mesh) == set(sharding.MESH_AXES)


def test_buckets_of_the_highres_decoder_are_the_six_official_ratios():
  buckets = _module("lavit_7b/pixels_sdxl.py").get_config().data.buckets
  assert buckets == tuple(stable_diffusion.RATIOS.values())
  buckets = _module("lavit_7b/pixels_sd15.py").get_config().data.buckets
  assert buckets == ((512, 512),)


class _Squares:
  """A source of which only the number of images is asked."""

  image_size, num_images, name = 224, 4096, "squares"


_COUNTS = {"pixels_sd15": 859_520_964, "pixels_sdxl": 2_567_463_684}
_VAE_COUNT = 83_653_863


def _batch(size):
  """Abstract arrays of two images of a bucket."""
  shapes = {
    "image": ((2, 224, 224, 3), np.uint8),
    "target": ((2, *size, 3), np.uint8),
    "sizes": ((2, 6), np.float32),
    "valid": ((2,), np.float32),
  }
  return {k: jax.ShapeDtypeStruct(*v) for k, v in shapes.items()}


@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("name", sorted(_COUNTS))
def test_full_size_pixel_decoders_fit_together(name, rank, capsys):
  cfg = _module(f"lavit_7b/{name}.py").get_config()
  cfg.model.lora = dict(rank=rank, alpha=float(rank))
  objective = objectives.build(cfg, artifacts.AbstractArtifacts(cfg))
  init = step_lib.init_fn(objective, 0)
  boxed = jax.eval_shape(init)
  mesh = sharding.make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
  sharding.param_shardings(boxed, mesh)
  state = sharding.unbox(boxed)
  (phase,) = phases_lib.phases_of(cfg)
  objective.labels(phase, state.params)
  net = objective.load_frozen()["unet"] if rank else state.params["unet"]
  count = checkpoints.count_params(net)
  assert count == _COUNTS[name]
  assert checkpoints.count_params(objective.load_frozen()["vae"]) == _VAE_COUNT
  trained = checkpoints.count_params(state.params)
  with capsys.disabled():
    print(f"\n{name}, rank {rank}: U-Net {count:,}, trained {trained:,}")
  if rank:
    assert trained < count / 50
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(net)}
    assert dtypes == {jnp.dtype("bfloat16")}
    assert {p[-1] for p in _layers(state.params["unet"])} == set(lora.ATTENTION)
    return
  loss, (extra, metrics) = jax.eval_shape(
    lambda *args: objective.loss(phase, *args, jax.random.key(0)),
    state.params,
    objective.load_frozen(),
    state.extra,
    _batch(cfg.data.buckets[-1]),
  )
  assert (loss.shape, loss.dtype) == ((), jnp.float32)
  assert jax.tree.structure(extra) == jax.tree.structure(state.extra)
  assert set(metrics) == {"loss", "eps_mse", "eps_mse_noisy"}


def _layers(tree, path=()):
  """Paths of the layers that a LoRA changes."""
  if "a" in tree:
    return {path}
  return set().union(*(_layers(v, (*path, k)) for k, v in tree.items()))


@pytest.mark.parametrize("name", sorted(_COUNTS))
def test_a_full_size_run_without_weights_to_start_from_says_what_to_do(
  name, monkeypatch
):
  pair = (_Squares(), _Squares())
  monkeypatch.setattr(kinds, "pair", lambda _: pair)
  cfg = _module(f"lavit_7b/{name}.py").get_config()
  with pytest.raises(errors.ConfigError, match=r"--config\.start_from=DIR"):
    objectives.build(cfg)
  cfg.start_from = "nowhere"
  with pytest.raises(
    errors.ConfigError, match="start_from=nowhere has no part"
  ):
    objectives.build(cfg)


def test_the_web_s_pairs_and_texts_have_the_paper_s_shares():
  data = _module("lavit_7b/pretrain_web.py").get_config().data
  weights = {name: source.weight for name, source in data.sources.items()}
  pairs = sum(weights.values()) - weights["text"]
  assert weights["text"] == pytest.approx(2 * pairs)
  assert weights["laion"] == pytest.approx(pairs / 2)  # it is written
  parts = kinds.parts_of(data)
  for name, part in parts.items():
    assert not filters.Filters.of(part["filters"]).keep_all
    assert set(part["mixture"]) == {
      "text": {"text"},
      "laion": {"text_image"},
    }.get(name, {"image_text"})
