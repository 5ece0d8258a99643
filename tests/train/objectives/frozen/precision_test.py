"""A step is the same program, whatever the parts on disk say of dtypes."""

import copy
import dataclasses
import importlib
import json
import re
import shutil
import types
from unittest import mock

import jax
import numpy as np
import pytest
from lavit_jax.configs.lavit_7b import pretrain as pretrain_7b

from lavit_jax.core import errors, sharding
from lavit_jax.core.storage import checkpoints
from lavit_jax.data.batching import pipeline
from lavit_jax.models import llama
from lavit_jax.models.pixels import vae
from lavit_jax.models.tokenizer import decoder
from lavit_jax.port.tables import names, sizes
from lavit_jax.train import lowering, objectives, phases
from lavit_jax.train.objectives import latents, pretrain
from lavit_jax.train.objectives.frozen import (
  abstract_params,
  artifacts,
  precision,
)
from tests import micro
from tests.train import latent_micro, outlines

pytestmark = pytest.mark.slow

_MESH = {"data": -1, "fsdp": 2, "context": 1, "tensor": 2}
_TEXT = 300  # pieces
_HOW = ("dtype", "remat", "unroll", "scan", "force_upcast")


def _jaxpr(cfg, where=None, phase=None):
  """The step of a phase (the last one) for eight devices, as text."""
  mesh = sharding.make_mesh(_MESH)
  objective = objectives.build(cfg, where)
  found = phases.phases_of(cfg)
  phase = next(p for p in found if p.name == (phase or found[-1].name))
  traced, arguments = lowering.trace(objective, cfg, phase, mesh)
  specs = jax.tree.map(lambda x: x.sharding.spec, arguments)
  text = f"{traced.jaxpr}\n{jax.tree.structure(arguments)}\n{specs}"
  return re.sub(r"0x[0-9a-f]+", "0x", text)


@pytest.fixture
def _no_data(monkeypatch):
  """Objectives of weights alone: no source, no cache, no tokenizer.model."""
  nothing = lambda *_, **__: None
  pieces = lambda *unused: types.SimpleNamespace(size=_TEXT)
  monkeypatch.setattr(artifacts.Artifacts, "sources", lambda *_: (None, None))
  monkeypatch.setattr(artifacts.Artifacts, "text_tokenizer", pieces)
  monkeypatch.setattr(pipeline, "image_batches", nothing)
  monkeypatch.setattr(latents.LatentsObjective, "_batches", nothing)
  monkeypatch.setattr(pretrain.PretrainObjective, "_use_rows", nothing)
  monkeypatch.setattr(
    pretrain.PretrainObjective, "_open_caches", lambda self: 12
  )


# An imported model ------------------------------------------------------------


_WORDS = dataclasses.replace(
  latent_micro.TOKENIZER,
  vit=dataclasses.replace(latent_micro.TOKENIZER.vit, head_dim_out=4),
  merger_form="reference",
  llm_width=16,
)
_LLAMA = llama.LlamaConfig(
  vocab_size=_TEXT + 2 + _WORDS.quantizer.num_codes,
  width=16,
  depth=2,
  num_heads=2,
  num_kv_heads=2,
  mlp_dim=32,
)


def _official(table, tree):
  """Shapes by official name."""
  return {k: x.shape for k, x in names.to_official(table, tree).items()}


def _as_imported():
  """What an import writes of each part: sizes read off the tensors."""
  vit, tokens = _WORDS.vit, sizes.abstract_tokenizer(_WORDS)
  del tokens["params"]["decoder"]
  heads, shapes_of = vit.num_heads, _official
  encoder = shapes_of(names.ENCODER, sizes.abstract_encoder(vit))
  vit = sizes.vit(encoder, heads, with_head=True)
  whole = shapes_of(names.TOKENIZER, tokens)
  low, high = (latent_micro.SIZES[kind] for kind in ("lowres", "highres"))
  made = {
    "lowres": decoder.LowresDecoder(_WORDS.decoder, *low["dims"]),
    "highres": decoder.HighresDecoder(
      _WORDS.decoder, high["dims"], high["pooled"]
    ),
  }
  low, high = (sizes.abstract_decoder(net) for net in made.values())
  low = sizes.lowres_meta(shapes_of(names.LOWRES, low), heads)
  high = sizes.highres_meta(shapes_of(names.HIGHRES, high), heads)
  words = decoder.DecoderConfig(**low["decoder"])
  words = sizes.visual_tokenizer(whole, vit, heads, words)
  return {
    "encoder": {"vit": dataclasses.asdict(vit)},
    "tokenizer": {"tokenizer": dataclasses.asdict(words)},
    "lowres": low,
    "highres": high,
  }


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
  """A model directory that says what an import says; weights are random."""
  model = tmp_path_factory.mktemp("imported") / "model"
  with mock.patch.object(latent_micro, "TOKENIZER", _WORDS):
    latent_micro.save_model(model)
  for part, meta in _as_imported().items():
    path = model / part / "part.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | meta))
  llm = sharding.unbox(abstract_params.llm(_LLAMA))
  llm = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), llm)
  meta = {"llama": dataclasses.asdict(_LLAMA)}
  checkpoints.save_part(model, "llm", {"llm": llm}, meta)
  (model / "tokenizer.model").touch()
  return model


def _small(ours, theirs):
  """Fields as imported, but dtype, remat and the like as ours."""
  kept = {name: ours[name] for name in _HOW if name in ours}
  return {
    name: _small(ours.get(name, {}), value)
    if isinstance(value, dict)
    else kept.get(name, value)
    for name, value in theirs.items()
  }


def _full_size(name, model):
  """A config at full size, made as small as an imported model."""
  module = importlib.import_module(f"lavit_jax.configs.lavit_7b.{name}")
  cfg = module.get_config()
  read = lambda part: checkpoints.read_meta(model, part)
  words = read("tokenizer")["tokenizer"]
  cfg.model_dir = cfg.start_from = str(model)
  cfg.batch_size, cfg.data.image_size = 8, words["vit"]["image_size"]
  cfg.data.capacity = cfg.assumed.capacity = 12
  cfg.assumed.text_size = _TEXT
  _shrink(cfg.assumed, "tokenizer", words)
  if cfg.stage == "tokenizer":
    cfg.model.tokenizer = _small(cfg.model.tokenizer.to_dict(), words)
    del cfg.model.tokenizer.vit
    cfg.model.tokenizer.merger_form = "compact"
  if cfg.stage == "pretrain":
    cfg.data.length, cfg.data.slots = 128, 2
    _shrink(cfg.model, "llm", read("llm")["llama"])
    del cfg.model.llm.vocab_size
  if cfg.stage == "latents":
    kind, meta = cfg.model.kind, read(cfg.model.kind)
    pixels = read(f"{kind}_pixels")
    _shrink(cfg.model, "unet", pixels["unet"])
    _shrink(cfg.assumed, "decoder", meta["decoder"])
    _shrink(cfg.assumed, "vae", pixels["vae"])
    _one_level(cfg)
    cfg.data.buckets, cfg.model.uncond_tokens = ((32, 32),), 3
    cfg.model.condition.dims = tuple(
      meta.get("condition_dims") or (meta["condition_dim"],)
    )
    cfg.model.condition.pooled = meta.get("pooled_dim", 0)
    cfg.start_from = ""  # of an objective alone nothing is written
    cfg.vae_from = str(model)
  return cfg


def _one_level(cfg):
  """A U-Net of one level, which is traced in a third of the time."""
  one = {"channels": (16,), "attention": (True,), "transformer_layers": (1,)}
  cfg.model.unet.update(one | {"num_heads": (2,)})


def _shrink(node, name, theirs):
  node[name] = _small(node[name].to_dict(), theirs)


@pytest.mark.usefixtures("_no_data")
@pytest.mark.parametrize(
  ("name", "phase"),
  [
    ("tokenizer", "codes"),
    ("pixels_sd15", "train"),
    ("pixels_sdxl", "train"),
    ("pretrain", "train"),
    ("finetune", "train"),
  ],
)
def test_what_is_compiled_ahead_is_what_an_imported_model_trains(
  name, phase, imported
):
  cfg = _full_size(name, imported)
  meta = checkpoints.read_meta(imported, "tokenizer")["tokenizer"]
  for part in ("vit", "merger"):  # or there were nothing to see here
    assert (meta[part]["dtype"], meta[part]["remat"]) == ("float32", "none")
  real = _jaxpr(cfg, None, phase)
  ahead = copy.deepcopy(cfg)
  ahead.model_dir = ahead.start_from = ahead.vae_from = "nowhere"
  if ahead.stage == "latents":
    ahead.start_from = ""
  assert _jaxpr(ahead, artifacts.AbstractArtifacts(ahead), phase) == real
  if name != "tokenizer":
    assert "bf16" in real


# Parts that say something else ------------------------------------------------


def _distort(node):
  """Other values in every field of how a network is computed."""
  for value in node.values():
    if isinstance(value, dict):
      _distort(value)
  other = {"dtype": "float16", "remat": "dots", "unroll": 2}
  other |= {"force_upcast": False}
  node |= {name: value for name, value in other.items() if name in node}


def _distorted(model, target):
  shutil.copytree(model, target)
  for path in target.glob("*/part.json"):
    meta = json.loads(path.read_text())
    _distort(meta)
    path.write_text(json.dumps(meta))
  return str(target)


def _latents(root):
  latent_micro.save_model(root / "model", ("lowres",))
  cfg = latent_micro.config("lowres", root, vae_from=str(root / "model"))
  _one_level(cfg)
  return cfg


@pytest.mark.parametrize(
  "stage", ["tokenizer", "pixels", "pretrain", "latents"]
)
def test_the_stored_dtype_of_a_part_changes_no_step(stage, request, tmp_path):
  """Nor of remat and unroll."""
  if stage == "latents":
    cfg = _latents(tmp_path)
  else:
    cfg = micro.config(stage, request.getfixturevalue("micro_codes"))
  base_text = _jaxpr(cfg)
  cfg.model_dir = _distorted(cfg.model_dir, tmp_path / "distorted")
  if stage == "latents":
    cfg.vae_from = cfg.model_dir
  assert _jaxpr(cfg) == base_text


# The function itself ----------------------------------------------------------


def test_every_part_of_a_tokenizer_is_computed_alike():
  cfg = pretrain_7b.get_config()
  cfg.model.compute = {"tokenizer": {"dtype": "float16", "remat": "dots"}}
  before = latent_micro.TOKENIZER
  made = precision.applied(cfg, tokenizer=before)["tokenizer"]
  for name in ("selector", "merger", "quantizer", "decoder"):
    assert getattr(made, name).dtype == "float16"
  assert made.merger.remat == made.decoder.remat == "dots"
  assert made.vit == before.vit  # a network of its own


def test_an_autoencoder_is_computed_as_the_run_says_not_as_stored():
  cfg = pretrain_7b.get_config()
  cfg.model.compute = {"vae": {"dtype": "bfloat16"}}
  for upcast in (True, False):
    config = dataclasses.replace(vae.SD15_VAE, force_upcast=upcast)
    made = precision.applied(cfg, vae=config)["vae"]
    assert made.compute_dtype == "bfloat16"


def test_missing_fields_have_their_default():
  cfg = pretrain_7b.get_config()
  del cfg.model.compute
  vit = dataclasses.replace(
    latent_micro.TOKENIZER.vit, dtype="bfloat16", remat="full", unroll=3
  )
  made = precision.applied(cfg, encoder=vit)["encoder"]
  assert (made.dtype, made.remat, made.unroll) == ("float32", "none", 1)


@pytest.mark.parametrize(
  ("compute", "message"),
  [
    ({"encodr": {}}, r"names \['encodr'\].*'encoder', 'merger', 'vae'"),
    ({"encoder": {"type": "float32"}}, r"encoder has \['type'\]"),
    ({"encoder": {"dtype": "float31"}}, r"encoder\.dtype='float31'"),
    ({"merger": {"remat": "all"}}, r"merger\.remat='all'.*'dots'"),
    ({"merger": {"unroll": 0}}, r"merger\.unroll=0"),
    ({"merger": {"unroll": 1.5}}, r"merger\.unroll=1\.5"),
    ({"encoder": {"unroll": True}}, r"encoder\.unroll=True"),
    ({"vae": {"remat": "full"}}, r"vae has \['remat'\].*\['dtype'\]"),
    ({"vae": {"unroll": 0}}, r"vae has \['unroll'\]"),
    ({"merger": {"dtype": "float16"}}, r"merger\.dtype='float16'.*trains"),
  ],
)
def test_a_wrong_entry_is_refused(compute, message):
  cfg = pretrain_7b.get_config()
  cfg.model.compute = compute
  words = latent_micro.TOKENIZER
  with pytest.raises(errors.ConfigError, match=message):
    precision.applied(
      cfg,
      trained=("merger",),
      encoder=words.vit,
      merger=words.merger,
      vae=vae.SD15_VAE,
    )


@pytest.mark.parametrize("stage", ["encoder", "autoencoder"])
def test_a_stage_that_reads_no_network_takes_no_entry(stage):
  entry = {"vae": {"dtype": "bfloat16"}}
  with pytest.raises(errors.ConfigError, match=r"names \['vae'\]"):
    outlines.build(stage, model__compute=entry)


def test_trained_networks_are_not_computed_in_float16():
  """The merger of pretraining; where it is frozen it may be."""
  half = {"merger": {"dtype": "float16"}}
  with pytest.raises(errors.ConfigError, match="float16"):
    outlines.build("pretrain", model__compute=half)
  frozen = {"projection": "visual", "llm": "llm"}
  built = outlines.build(
    "pretrain", model__compute=half, phases__train__train=frozen
  )
  assert built.tokenizer_config.merger.dtype == "float16"
