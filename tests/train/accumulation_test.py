"""A batch in parts is the whole batch: gradients, metrics and all else."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from lavit_jax import errors
from lavit_jax.train import accumulation, averages, optimizer
from lavit_jax.train import state as state_lib
from tests.train import latent_micro, outlines

_MASKS = ("random", "gumbel", "sampled", "expected")
_SELECTING = dict(
  temperature=0.5, rate=0.33, rate_weight=30.0, entropy_weight=0.02
)
_CODES = dict(quantize=True, commitment=0.25, revive_below=0.05)


@pytest.fixture(scope="module", autouse=True)
def _quick():
  with latent_micro.quick():
    yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("latents")


def _tokenizer(mask, **settings):
  settings = _SELECTING | {"keep_range": (0.1, 0.9), "mask": mask} | settings
  objective = outlines.build("tokenizer", data__capacity=12)
  return objective, outlines.phase_of(objective, "codes", **settings)


def _stage(stage, **updates):
  objective = outlines.build(stage, **updates)
  return objective, outlines.phase_of(objective)


def _lora():
  updates = {
    "model__lora": {"rank": 2, "alpha": 4.0},
    "optimizer__groups": {"lora": 1.0, "visual": 1.0},
    "phases__train__train": {"lora": "lora", "merger": "visual"},
  }
  return _stage("pretrain", phases__train__word_dropout=0.5, **updates)


def _latents(folder, kind, **settings):
  objective = outlines.latents(folder, kind)
  return objective, outlines.phase_of(objective, **settings)


CASES = {
  **{f"tokenizer {m}": lambda _, m=m: _tokenizer(m, **_CODES) for m in _MASKS},
  "tokenizer without codes": lambda _: _tokenizer("gumbel", quantize=False),
  "autoencoder": lambda _: _stage("autoencoder"),
  "pixels": lambda _: _stage("pixels", phases__train__draws=3),
  "pretrain": lambda _: _stage("pretrain", phases__train__word_dropout=0.5),
  "pretrain, LoRA": lambda _: _lora(),
  "latents": lambda folder: _latents(
    folder, "lowres", sample_latents=True, selection="sampled", draws=2
  ),
  "latents, SDXL": lambda folder: _latents(folder, "highres"),
}


def _step(objective, phase, case, parts):
  """(new state, metrics, what gradients the update was made of) of a step."""
  config = ml_collections.ConfigDict(objective.config.to_dict())
  config.accumulate = parts
  config.optimizer.clip_norm = 1e9
  objective.config = config
  labels = objective.labels(phase, case.params)
  tx = optimizer.make(config.optimizer, phase, labels, case.boxed)
  state = state_lib.TrainState(
    step=jnp.int32(3),
    params=case.params,
    opt_state=tx.init(optimizer.select(case.params, labels)),
    extra=case.extra,
    rng=jax.random.key_data(jax.random.key(5)),
  )
  step = state_lib.make_step(objective, phase, labels, tx)
  state, metrics = jax.jit(step)(state, case.frozen, case.batch)
  moments = _first_moments(state.opt_state)
  return jax.device_get((state, metrics, moments))


def _first_moments(opt_state):
  """The gradients, scaled alike: the first moments after one step."""
  leaves = jax.tree_util.tree_leaves_with_path(opt_state)
  return [x for path, x in leaves if ".mu" in jax.tree_util.keystr(path)]


def _assert_same(a, b, tolerance=2e-5):
  """Trees are close, on the scale of each leaf or 1e-4 of the largest."""
  largest = lambda x: float(np.abs(x).max(initial=0))
  floor = 1e-4 * max(map(largest, jax.tree.leaves(b)), default=0)

  def close(path, a, b):
    name = jax.tree_util.keystr(path)
    scale = tolerance * max(largest(b), floor)
    np.testing.assert_allclose(a, b, atol=scale, rtol=1e-5, err_msg=name)

  jax.tree_util.tree_map_with_path(close, a, b)


@pytest.mark.parametrize("name", CASES)
def test_parts_are_the_whole_batch_in_every_stage(name, folder):
  """Gradients, every metric, mean weights, codebook, revival, moments."""
  objective, phase = CASES[name](folder)
  case = outlines.Case(objective)
  one = _step(objective, phase, case, 1)
  four = _step(objective, phase, case, 4)
  assert any(np.abs(x).max() > 0 for x in one[2])
  _assert_same(four[2], one[2])
  for name in one[1]:
    _assert_same(four[1][name], one[1][name])
  _assert_same(four[0].extra, one[0].extra)
  assert set(one[1]) >= {"loss", "grad_norm", "learning_rate"}
  changed = [
    np.abs(a - b).max() > 0
    for a, b in zip(
      jax.tree.leaves(case.extra), jax.tree.leaves(one[0].extra), strict=True
    )
  ]
  assert any(changed) or not changed or name == "tokenizer without codes"
  if "codes_revived" in one[1]:
    assert averages.value(one[1]["codes_revived"]) > 5


def test_mean_weights_move_once_a_step_and_after_the_update():
  """With a decay of 0 they are the newest model, whatever the parts."""
  objective, phase = _stage("pixels", phases__train__ema_decay=0.0)
  case = outlines.Case(objective)
  for parts in (1, 4):
    state, _, _ = _step(objective, phase, case, parts)
    assert state.extra["updates"] == 1
    jax.tree.map(
      np.testing.assert_array_equal, state.extra["ema"], state.params
    )
    moved = jax.tree.map(
      lambda a, b: np.abs(a - b).max(), state.params, case.params
    )
    assert max(jax.tree.leaves(moved)) > 0


def test_parts_hold_a_part_of_the_activations():
  """What accumulation is for: temporaries of a quarter of the rows."""
  objective, phase = _stage("pretrain", batch_size=32)
  case = outlines.Case(objective, 32)
  sizes = [
    _compiled(objective, phase, case, parts)
    .memory_analysis()
    .temp_size_in_bytes
    for parts in (1, 8)
  ]
  assert sizes[1] < 0.4 * sizes[0], sizes


def _compiled(objective, phase, case, parts):
  made = accumulation.value_and_grad(objective, phase, parts)
  run = lambda *args: made(lambda trainable: trainable, *args)
  return jax.jit(run).lower(*case.args, jax.random.key(0)).compile()


def test_one_part_is_one_pass():
  """Without parts nothing but loss and gradient is computed, as ever."""
  objective, phase = _stage("pretrain")
  case = outlines.Case(objective)

  def plain(params, frozen, extra, batch, rng):
    loss = lambda params: objective.loss(
      phase, params, frozen, extra, batch, rng
    )
    return jax.value_and_grad(loss, has_aux=True)(params)

  whole = _compiled(objective, phase, case, 1).cost_analysis()["flops"]
  lowered = jax.jit(plain).lower(*case.args, jax.random.key(0))
  assert whole <= 1.001 * lowered.compile().cost_analysis()["flops"]


def test_rows_of_a_device_stay_in_every_part():
  rows = accumulation.cut("x", jnp.arange(8), 2)
  np.testing.assert_array_equal(rows, [[0, 2, 4, 6], [1, 3, 5, 7]])


def test_a_batch_that_does_not_divide_is_an_error():
  with pytest.raises(errors.ConfigError, match="accumulate=3"):
    accumulation.cut("x", jnp.arange(8), 3)


def test_contrast_cannot_be_run_in_parts():
  objective, phase = _stage("encoder", accumulate=2)
  case = outlines.Case(objective)
  with pytest.raises(errors.ConfigError, match="among all pictures"):
    jax.eval_shape(
      lambda: accumulation.value_and_grad(objective, phase, 2)(
        lambda x: x, *case.args, jax.random.key(0)
      )
    )
