"""Runs of one config in this process share what is compiled for them."""

import contextlib
import json
import pathlib
from unittest import mock

import jax

from lavit_jax.train import step as step_lib
from lavit_jax.train.objectives import evaluation

_MADE = {
  "jit_init": step_lib.jit_init,
  "jit_step": step_lib.jit_step,
  "jit_metrics": evaluation.jit_metrics,
}
_PROGRAMS: dict[tuple, object] = {}


@contextlib.contextmanager
def shared():
  """Inside, a run takes the programs of an earlier one of its config.

  Folders may differ, and what no program depends on. Not for tests that
  replace a part of a program.
  """
  with contextlib.ExitStack() as stack:
    for name, make in _MADE.items():
      module = evaluation if name == "jit_metrics" else step_lib
      stack.enter_context(mock.patch.object(module, name, _kept(name, make)))
    yield


def _kept(name, make):
  def kept(objective, *args):
    key = (name, _key(objective), *map(_hashable, args))
    if key not in _PROGRAMS:
      _PROGRAMS[key] = make(objective, *args)
    return _PROGRAMS[key]

  return kept


def _key(objective):
  config = json.loads(objective.config.to_json_best_effort())
  for name in ("log", "checkpoint"):
    del config[name]
  root = pathlib.Path(config["model_dir"]).parent
  text = json.dumps(config, sort_keys=True).replace(str(root), "")
  shapes = objective.init_shapes, objective.frozen_shapes()
  return type(objective), text, str(jax.tree.map(str, shapes))


def _hashable(argument):
  """An argument as a part of a key; an optimizer is told by the config."""
  if hasattr(argument, "update") and hasattr(argument, "init"):
    return "optimizer"
  if isinstance(argument, jax.sharding.Mesh | int | None):
    return argument
  return str(argument)
