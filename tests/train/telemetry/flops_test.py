"""Model FLOPs of the steps of every config, and what judges them."""

import dataclasses
import types

import flax.linen as nn
import jax
import pytest

from lavit_jax.core import sharding
from lavit_jax.cost import jaxpr
from lavit_jax.models import llama
from lavit_jax.train import optimizer, phases
from lavit_jax.train.objectives.frozen import artifacts
from lavit_jax.train.telemetry import flops
from tests import outlines

pytestmark = pytest.mark.slow

# FLOPs of a step by phase, as formulas from the configs had them, before they
# were counted in the jaxpr. They differ by up to 0.8 %, where the formulas
# - had a gradient of what needs none: pixels, and frozen features before a
#   projection (encoder, autoencoder, latents);
# - halved the merger's soft form, whose causal mask is data (tokenizer).
_BY_FORMULA = {
  "tiny.encoder": {"train": 27082653696},
  "tiny.tokenizer": {
    "random": 7097647104,
    "select": 6578362368,
    "joint": 8860981248,
    "codes": 7181027328,
  },
  "tiny.pixels": {"train": 33951089664},
  "tiny.autoencoder": {"train": 22696464384},
  "tiny.latents": {"train": 38896321536},
  "tiny.pretrain": {"train": 25008685056},
  "lavit_7b.tokenizer": {
    "random": 3377482883399680,
    "select": 2831019631706112,
    "joint": 3721770079092736,
    "codes": 3381273930235904,
  },
  "lavit_7b.pretrain": {"train": 2.304682829545472e16},
  "lavit_7b.finetune": {"train": 567673558269952},
  "lavit_7b.pixels_sd15": {"train": 1161679315402752},
  "lavit_7b.pixels_sdxl": {"train": 6842557693820928},
}
# Those that the formulas had right.
_EXACT = ("pretrain", "finetune")


@pytest.fixture
def outline(monkeypatch):
  """Makes the objective of a config; see `outlines`."""
  text = types.SimpleNamespace(size=512)
  for kind in (artifacts.Artifacts, artifacts.AbstractArtifacts):
    monkeypatch.setattr(kind, "text_tokenizer", lambda *unused: text)
  return outlines.objective


@pytest.mark.parametrize("name", _BY_FORMULA)
def test_steps_of_every_config_cost_what_formulas_say(outline, name):
  objective = outline(name)
  found = {
    phase.name: sum(flops.of_step(objective, phase).values())
    for phase in phases.phases_of(objective.config)
  }
  exact = name.endswith(_EXACT)
  assert found == pytest.approx(_BY_FORMULA[name], rel=1e-6 if exact else 0.01)


def _gradient(objective, phase):
  """Value and gradient of a phase's loss, and its abstract arguments."""
  params, extra = sharding.unbox(
    jax.eval_shape(objective.init, jax.random.key(0))
  )
  labels = objective.labels(phase, params)

  def run(params, frozen, extra, batch):
    def loss(chosen):
      whole = optimizer.merge(chosen, params)
      key = jax.random.key(0)
      return objective.loss(phase, whole, frozen, extra, batch, key)[0]

    return jax.value_and_grad(loss)(optimizer.select(params, labels))

  frozen = sharding.unbox(objective.frozen_shapes())
  return run, (params, frozen, extra, objective.batch_shapes())


_RANK = {"model__lora": {"rank": 4, "alpha": 4.0}}


@pytest.mark.parametrize(
  ("name", "changes"),
  [
    ("encoder", {}),
    ("tokenizer", {}),
    ("autoencoder", {}),
    ("latents", _RANK),
    ("pretrain", {}),
    (
      "pretrain",
      _RANK
      | {
        "model__frozen_dtype": "float32",
        "phases__train__train": {"lora": "llm", "merger": "visual"},
      },
    ),
  ],
)
def test_gradients_cost_what_jax_makes_of_them(outline, name, changes):
  """Product by product: nothing here is rematerialized."""
  objective = outline(f"tiny.{name}", **changes)
  for phase in phases.phases_of(objective.config):
    run, args = _gradient(objective, phase)
    counted = sum(flops.by_scope(objective, phase).values())
    assert counted == sum(jaxpr.count(run, *args).values()), phase.name


@pytest.mark.parametrize(
  ("name", "phase"), [("tokenizer", "codes"), ("pretrain", "train")]
)
def test_xla_counts_as_many_in_the_compiled_step(outline, name, phase):
  """XLA counts loops once and element-wise work too: unrolled, and wide."""
  wide = dict(width=256, depth=2, num_heads=4, mlp_dim=512, unroll=2)
  changes = {"batch_size": 2}
  if name == "pretrain":
    changes |= {"model__llm": dict(wide, num_kv_heads=4)}
  else:
    changes |= {
      f"model__tokenizer__{part}__{field}": value
      for part in ("merger", "decoder")
      for field, value in (("mlp_dim", 1024), ("unroll", 2))
    }
  objective = outline(f"tiny.{name}", **changes)
  (chosen,) = [p for p in phases.phases_of(objective.config) if p.name == phase]
  run, args = _gradient(objective, chosen)
  executed = jax.jit(run).lower(*args).compile().cost_analysis()["flops"]
  counted = sum(flops.by_scope(objective, chosen).values())
  assert counted == pytest.approx(executed, rel=0.12)


def test_a_short_document_costs_its_own_keys(outline):
  objective = outline("tiny.pretrain")
  config, phase = objective.llama_config, objective.last_phase
  rows, length = objective.batch_shapes()["tokens"].shape
  whole = flops.of_step(objective, phase)
  short = flops.of_step(objective, phase, segment=10)
  per_key = 3 * 4 * config.width * config.depth * rows * length
  assert whole["llm"] - short["llm"] == per_key * (length - 10) / 2
  assert {k: v for k, v in whole.items() if k != "llm"} == {
    k: v for k, v in short.items() if k != "llm"
  }


def test_a_frozen_llm_passes_gradients_on(outline):
  objective = outline("lavit_7b.finetune")
  parts = flops.of_step(objective, objective.last_phase)
  config = objective.llama_config
  tokens = objective.batch_shapes()["tokens"].size
  assert parts["head"] == 2 * (2 * tokens * config.width * config.vocab_size)
  assert 0 < parts["lora"] < 0.02 * parts["llm"]


def test_the_llm_costs_six_flops_a_parameter_and_token(outline):
  objective = outline("lavit_7b.pretrain")
  parts = flops.of_step(objective, objective.last_phase, segment=1)
  config = objective.llama_config
  assert config.width == llama.LLAMA2_7B.width
  kernels = 6_476_005_376  # parameters of 32 layers, norms apart
  tokens = objective.batch_shapes()["tokens"].size
  attention = 3 * 4 * tokens * config.width * config.depth  # of one key
  assert parts["llm"] == 6 * kernels * tokens + attention


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_chips_and_number_formats_change_nothing(outline, platform):
  """Within a run's mesh neither kernels nor shares of a device are traced."""
  objective = outline("lavit_7b.pretrain")
  phase = objective.last_phase
  expected = flops.of_step(objective, phase)
  mesh = jax.sharding.AbstractMesh(
    (4, 8, 1, 2),
    sharding.MESH_AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * 4,
    abstract_device=jax.sharding.AbstractDevice(platform, 1, platform),
  )
  with (
    jax.sharding.use_abstract_mesh(mesh),
    nn.logical_axis_rules(sharding.RULES),
  ):
    assert flops.of_step(objective, phase) == expected
  llm = dataclasses.replace(objective.llama_config, matmul="int8")
  objective.model = objective.model.clone(llama_config=llm)
  assert flops.of_step(objective, phase) == expected
