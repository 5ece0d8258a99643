"""The pretrain stage."""

import dataclasses
import logging
import shutil

import flax.linen as nn
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lavit_jax.core import agreement, averages, errors, vocabulary
from lavit_jax.core.storage import checkpoints
from lavit_jax.models import llama
from lavit_jax.train import loop, objectives
from lavit_jax.train.objectives import pretrain, token_dropout
from tests import micro

pytestmark = pytest.mark.slow

_VOCAB = vocabulary.Vocabulary(text_size=20, num_codes=30)


def _drawn(share):
  return token_dropout.draws(_VOCAB, (64, 128), share, jax.random.key(1))


def test_dropout_replaces_its_share_of_visual_tokens_and_nothing_else():
  tokens = jax.random.randint(jax.random.key(0), (64, 128), 0, _VOCAB.size)
  out = token_dropout.apply(_VOCAB, tokens, _drawn(0.25))
  visual = _VOCAB.is_code(tokens)
  np.testing.assert_array_equal(out[~visual], tokens[~visual])
  assert _VOCAB.is_code(out[visual]).all()
  changed = (out != tokens)[visual].mean()
  # One in num_codes random tokens is the token that was there.
  expected = 0.25 * (1 - 1 / _VOCAB.num_codes)
  np.testing.assert_allclose(changed, expected, atol=0.02)
  assert len(np.unique(out[(out != tokens)])) == _VOCAB.num_codes
  same = token_dropout.apply(_VOCAB, tokens, _drawn(0.0))
  np.testing.assert_array_equal(same, tokens)


def _init(objective):
  """First parameters, drawn in one program."""
  init = lambda: nn.meta.unbox(objective.init(jax.random.key(0))[0])
  return jax.jit(init)()


def _loss(objective, params, batch):
  """The loss of the last phase, in one program."""

  @jax.jit
  def run(params, frozen, batch):
    key = jax.random.key(1)
    return objective.loss(objective.last_phase, params, frozen, {}, batch, key)[
      0
    ]

  return run(params, objective.load_frozen(), batch)


def test_dropout_changes_the_training_loss_but_not_the_held_out_one(
  micro_runs,
):
  losses = {}
  for share in (0.0, 0.9):
    objective = objectives.build(
      micro.config("pretrain", micro_runs, phases__train__word_dropout=share)
    )
    params, frozen = _init(objective), objective.load_frozen()
    batch = next(objective.batches(0))
    loss = _loss(objective, params, batch)
    measure = jax.jit(objective.held_out_metrics)
    held_out = measure(params, frozen, {}, batch)
    losses[share] = float(loss), averages.value(held_out["loss"])
  assert losses[0.0][1] == losses[0.9][1]
  assert losses[0.0][0] == pytest.approx(losses[0.0][1], rel=1e-5)
  assert abs(losses[0.9][0] - losses[0.0][0]) > 1e-4


def test_int8_products_are_near_and_of_training_alone(micro_runs):
  found = []
  for matmul in ("", "int8"):
    objective = objectives.build(
      micro.config("pretrain", micro_runs, model__llm__matmul=matmul)
    )
    start = checkpoints.load_part(micro_runs / "model", "llm").params
    batch = next(objective.batches(0))
    arguments = objective.load_frozen(), {}, batch, jax.random.key(1)

    def loss(params, objective=objective, arguments=arguments):
      return objective.loss(objective.last_phase, params, *arguments)[0]

    found.append(jax.jit(jax.value_and_grad(loss))(start))
    (_, meta), *_ = objective.export(start, {}).values()
    assert meta["llama"]["matmul"] == ""
  (plain, plain_grads), (int8, grads) = found
  assert 0 < abs(int8 - plain) < 0.01 * plain
  kernel = lambda tree: tree["llm"]["layers"]["mlp"]["down"]["kernel"]
  difference = np.linalg.norm(kernel(grads) - kernel(plain_grads))
  assert 0 < difference < 0.05 * np.linalg.norm(kernel(plain_grads))


def _lora(root, **updates):
  """Fine-tuning of what the micro run has made, in another directory."""
  cfg = micro.config(
    "pretrain",
    root,
    model__lora=dict(rank=2, alpha=4.0),
    model__frozen_dtype="float32",
    start_from=str(root / "model"),
    **updates,
  )
  cfg.optimizer.groups = dict(lora=1.0, visual=1.0)
  cfg.phases.train.train = dict(lora="lora", merger="visual")
  return cfg


def test_a_lora_starts_as_the_llm_it_changes_and_exports_one_llm(
  micro_runs, tmp_path
):
  (branch,) = micro.branch(micro_runs, tmp_path, 1)
  cfg = _lora(branch)
  cfg.model_dir = str(branch / "tuned")
  shutil.copytree(branch / "model", cfg.model_dir)
  objective = objectives.build(cfg)
  start = checkpoints.load_part(branch / "model", "llm").params
  batch = next(objective.batches(0))
  params = _init(objective)
  params |= {name: start[name] for name in ("merger", "projection")}
  loss = _loss(objective, params, batch)
  plain = objectives.build(micro.config("pretrain", branch))
  whole = {name: start[name] for name in ("llm", "merger", "projection")}
  expected = _loss(plain, whole, batch)
  np.testing.assert_allclose(loss, expected, rtol=1e-6)

  with micro.one_device():
    loop.train(cfg, tmp_path / "run", quiet=True)
  tuned = checkpoints.load_part(cfg.model_dir, "llm").params
  assert jax.tree.structure(tuned) == jax.tree.structure(start)
  kernel = lambda tree: tree["llm"]["layers"]["attention"]["query"]["kernel"]
  assert np.abs(kernel(tuned) - kernel(start)).max() > 0
  np.testing.assert_array_equal(tuned["llm"]["head"], start["llm"]["head"])
  # The exported LLM says what LLM and changes said together.
  state_params = _last_params(tmp_path / "run")
  both = _loss(objective, state_params, batch)
  merged = _loss(plain, tuned, batch)
  np.testing.assert_allclose(merged, both, rtol=1e-5)


def _last_params(workdir):
  """Parameters of the newest checkpoint of a run."""
  steps = sorted(
    int(path.name)
    for path in (workdir / "checkpoints").iterdir()
    if path.name.isdigit()
  )
  path = workdir / "checkpoints" / str(steps[-1]) / "state"
  with ocp.PyTreeCheckpointer() as checkpointer:
    return checkpointer.restore(path.absolute())["params"]


def test_a_lora_without_an_llm_to_change_is_an_error(micro_runs):
  cfg = _lora(micro_runs)
  cfg.start_from = ""
  with pytest.raises(errors.ConfigError, match="start_from"):
    objectives.build(cfg)


_FIELDS = {
  "rope_theta": dict(rope_theta=1e6),
  "norm_eps": dict(norm_eps=1e-6),
  "num_heads": dict(num_heads=4, num_kv_heads=4),
  "num_kv_heads": dict(num_kv_heads=1),
  "depth": dict(depth=2),
  "mlp_dim": dict(mlp_dim=48),
}


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("name", _FIELDS)
def test_a_start_must_have_the_fields_it_was_trained_with(
  name, rank, micro_runs
):
  cfg = _lora(micro_runs)
  cfg.model.lora.rank = rank
  cfg.model.llm.update(_FIELDS[name])
  meta = checkpoints.read_meta(micro_runs / "model", "llm")["llama"]
  with pytest.raises(errors.ConfigError) as caught:
    objectives.build(cfg)
  assert f"model.llm.{name} is {meta[name]} there" in str(caught.value)
  assert f"give --config.model.llm.{name}={meta[name]}" in str(caught.value)


def test_a_longer_max_len_is_accepted(micro_runs, caplog):
  cfg = _lora(micro_runs)
  cfg.model.llm.rope_theta, cfg.accept = 1e6, "model.llm.rope_theta"
  cfg.model.llm.update(max_len=2048, remat="full", unroll=1)
  objective = objectives.build(cfg)
  assert objective.llama_config.rope_theta == 1e6
  assert "model.llm.rope_theta is 10000.0 there" in caplog.text


def test_every_field_of_the_llm_is_compared_or_known_to_be_free():
  """A new field must be put on one side or the other."""
  free = {*agreement.COMPUTED, "max_len", "vocab_size", "width"}
  names = {field.name for field in dataclasses.fields(llama.LlamaConfig)}
  assert names == free | set(_FIELDS)


def test_a_lora_is_drawn_with_a_key_of_its_own(micro_runs, monkeypatch):
  """Not with that of the parameters that are drawn beside it."""
  objective, keys = objectives.build(_lora(micro_runs)), []
  make = pretrain.lora.init

  def init(key, *args):
    keys.append(key)
    return make(key, *args)

  monkeypatch.setattr(pretrain.lora, "init", init)
  key = jax.random.key(3)
  with jax.ensure_compile_time_eval():
    jax.eval_shape(lambda: objective.init(key))
  (used,) = keys
  assert (jax.random.key_data(used) != jax.random.key_data(key)).any()


def test_a_run_warns_if_config_assumed_has_other_sizes(micro_runs, caplog):
  """By field and value; nothing where it assumes what is there, or nothing."""
  cfg = micro.config("pretrain", micro_runs)
  real = objectives.build(cfg)
  right = {"capacity": real.capacity, "text_size": real.text.size}
  for name, value in right.items():
    cfg.assumed = right | {name: value + 8}
    caplog.clear()
    objectives.build(cfg)
    (line,) = (r.getMessage() for r in caplog.records)
    assert f"config.assumed.{name}={value + 8}" in line
    assert f"--config.assumed.{name}={value}" in line
    assert "lavit compile" in line
  caplog.clear()
  cfg.assumed = right
  objectives.build(cfg)
  del cfg["assumed"]
  objectives.build(cfg)
  assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
