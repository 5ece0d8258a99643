"""A batch in parts is the whole batch: gradients, metrics and all else."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from lavit_jax.core import averages, errors, sharding
from lavit_jax.train import loop, lowering, objectives, optimizer
from lavit_jax.train import step as step_lib
from tests import micro
from tests.train import outlines, stubs
from tests.train import parts as parts_lib

_MASKS = ("random", "gumbel", "sampled", "expected")
_SELECTING = dict(
  temperature=0.5, rate=0.33, rate_weight=30.0, entropy_weight=0.02
)
_CODES = dict(quantize=True, commitment=0.25, revive_below=0.05)


def _tokenizer(mask, **settings):
  objective = stubs.tokenizer(data__capacity=12)
  settings = _SELECTING | {"keep_range": (0.1, 0.9), "mask": mask} | settings
  return objective, outlines.phase_of(objective, "codes", **settings)


def _stage(make, **updates):
  objective = make(**updates)
  return objective, outlines.phase_of(objective)


_HIDDEN = {"phases__train__word_dropout": 0.5}
CASES = {
  **{f"tokenizer {m}": lambda m=m: _tokenizer(m, **_CODES) for m in _MASKS},
  "tokenizer without codes": lambda: _tokenizer("gumbel", quantize=False),
  "autoencoder": lambda: _stage(stubs.autoencoder),
  "pixels": lambda: _stage(stubs.pixels, phases__train__draws=3),
  "pretrain": lambda: _stage(stubs.pretrain, **_HIDDEN),
  "pretrain, LoRA": lambda: _stage(stubs.pretrain, lora=True, **_HIDDEN),
}


def _step(objective, phase, case, parts):
  """The state after a step."""
  config = objective.config
  config.accumulate = parts
  labels = objective.labels(phase, case.params)
  tx = optimizer.make(config.optimizer, phase, labels, case.boxed)
  state = step_lib.TrainState(
    step=jnp.int32(3),
    params=case.params,
    opt_state=jax.jit(tx.init)(optimizer.select(case.params, labels)),
    extra=case.extra,
    rng=jax.random.key_data(jax.random.key(5)),
  )
  made = step_lib.make_step(objective, phase, labels, tx)
  return jax.device_get(jax.jit(made)(state, case.frozen, case.batch)[0])


@pytest.mark.parametrize("name", CASES)
def test_parts_are_the_whole_batch_in_every_stage(name):
  objective, phase = CASES[name]()
  case = outlines.Case(objective)
  extra, metrics = parts_lib.assert_parts_are_the_whole(objective, phase, case)
  if phase.get("quantize"):
    assert 3 < averages.value(metrics["codes_revived"]) < stubs.CODES
    before, after = case.extra["codebook"], extra["codebook"]
    assert (after["counts"] != before["counts"]).mean() > 0.5


def test_parts_on_eight_devices_are_the_whole_batch_on_one():
  """Rows of parts are split over devices, and so is what is random."""
  objective, phase = _tokenizer("gumbel", **_CODES)
  case = outlines.Case(objective, 16)
  one = parts_lib.outcome(objective, phase, case, 1)
  mesh = sharding.make_mesh({"data": 4, "fsdp": 2})
  with sharding.use(mesh):
    case.batch = sharding.put_batch(case.batch, mesh)
    eight = parts_lib.outcome(objective, phase, case, 2)
  parts_lib.assert_outcomes_same(eight, one)


def test_mean_weights_move_once_a_step_and_after_the_update():
  """With a decay of 0 they are the newest model, whatever the parts."""
  objective, phase = _stage(stubs.pixels, phases__train__ema_decay=0.0)
  case = outlines.Case(objective)
  for parts in (1, 4):
    state = _step(objective, phase, case, parts)
    assert state.extra["updates"] == 1
    for name, before in case.params.items():
      after = state.params[name]
      np.testing.assert_array_equal(state.extra["ema"][name], after)
      assert np.abs(after - before).max() > 0


def test_parts_hold_a_part_of_the_activations():
  """What accumulation is for; and real networks agree as those above do."""
  objective, phase = _stage(outlines.build, stage="pretrain", batch_size=32)
  case, args = outlines.Case(objective, 32), (jax.random.key(0),)
  one, eight = (_lower(objective, phase, case, n).compile() for n in (1, 8))
  size = lambda made: made.memory_analysis().temp_size_in_bytes
  assert size(eight) < 0.4 * size(one), (size(eight), size(one))
  one, eight = (jax.device_get(f(*case.args, *args)) for f in (one, eight))
  parts_lib.assert_same(eight, one)


def _lower(objective, phase, case, parts):
  made = step_lib.value_and_grad(objective, phase, parts)
  run = lambda *args: made(lambda trainable: trainable, *args)
  return jax.jit(run).lower(*case.args, jax.random.key(0))


def test_one_part_is_one_pass():
  """Without parts nothing but loss and gradient is computed, as ever."""
  objective, phase = _tokenizer("gumbel", **_CODES)
  case = outlines.Case(objective)

  def plain(params, *args):
    loss = lambda params: objective.loss(phase, params, *args)
    return jax.value_and_grad(loss, has_aux=True)(params)

  whole = _lower(objective, phase, case, 1).cost_analysis()["flops"]
  lowered = jax.jit(plain).lower(*case.args, jax.random.key(0))
  assert whole <= 1.001 * lowered.cost_analysis()["flops"]


def test_rows_of_a_device_stay_in_every_part():
  rows = step_lib.split_batch("x", jnp.arange(8), 2)
  np.testing.assert_array_equal(rows, [[0, 2, 4, 6], [1, 3, 5, 7]])


def test_a_batch_that_does_not_divide_is_an_error():
  with pytest.raises(errors.ConfigError, match="accumulate=3"):
    step_lib.split_batch("x", jnp.arange(8), 3)


def _config(rows, parts):
  return ml_collections.ConfigDict(
    {"batch_size": rows, "accumulate": parts, "seed": 0}
  )


@pytest.mark.parametrize(
  ("rows", "parts", "said"),
  [
    (8, 2, "batch_size=16"),
    (16, 4, "accumulate=2"),
    (24, 2, "accumulate=3"),
    (8, 0, "accumulate=0"),
    (8, -1, "accumulate=-1"),
    (8, 1.5, "accumulate=1.5"),
    (8, True, "accumulate=True"),
    (0, 2, "global batch of 0"),
  ],
)
def test_every_part_has_a_row_for_every_device(rows, parts, said):
  """Asked before a step is made; what passes is split over all devices."""
  mesh, config = (
    sharding.make_mesh({"data": 4, "fsdp": 2}),
    _config(rows, parts),
  )
  with pytest.raises(errors.ConfigError) as caught:
    lowering.arguments(None, config, None, mesh)
  assert said in str(caught.value), caught.value


@pytest.mark.parametrize(("rows", "parts"), [(8, 1), (16, 2), (48, 3)])
def test_what_passes_is_cut_into_parts_on_all_devices(rows, parts):
  mesh, config = (
    sharding.make_mesh({"data": 4, "fsdp": 2}),
    _config(rows, parts),
  )
  step_lib.check_accumulation(config, mesh)
  with sharding.use(mesh):
    x = sharding.put_batch({"x": np.zeros((rows, 3))}, mesh)["x"]
    made = jax.jit(lambda x: step_lib.split_batch("x", x, parts))(x)
  assert made.sharding.shard_shape(made.shape) == (parts, rows // parts // 8, 3)


def test_a_run_and_its_report_ask_before_anything_is_read(
  tmp_path, monkeypatch
):
  """Neither images nor weights; so a mistake costs no minutes."""
  read = lambda *args: pytest.fail("read")
  monkeypatch.setattr(objectives, "build", read)
  cfg = micro.config("encoder", tmp_path, accumulate=2)
  with pytest.raises(errors.ConfigError, match="accumulate=2"):
    loop.train(cfg, tmp_path / "run", quiet=True)


def test_contrast_cannot_be_run_in_parts():
  objective, phase = _stage(outlines.build, stage="encoder", accumulate=2)
  case = outlines.Case(objective)
  with pytest.raises(errors.ConfigError, match="among all images"):
    jax.eval_shape(
      lambda: step_lib.value_and_grad(objective, phase, 2)(
        lambda x: x, *case.args, jax.random.key(0)
      )
    )
