"""How the parameters of the full-size runs are split, as text to compare.

  python -m tests.specs      writes tests/golden/specs/*.txt anew

Read the difference before you commit it: a parameter that lost its axes costs
memory on every chip.
"""

import importlib
import pathlib

import jax

from lavit_jax.core import sharding
from lavit_jax.train import lowering, objectives, optimizer, phases
from lavit_jax.train import step as step_lib
from lavit_jax.train.objectives.frozen import artifacts

FOLDER = pathlib.Path(__file__).parent / "golden" / "specs"
NAMES = ("tokenizer", "pixels_sd15", "pixels_sdxl", "pretrain", "finetune")
DEVICES = {"finetune": 8, "pixels_sd15": 256, "pixels_sdxl": 256}


def trees(name: str):
  """(config, mesh, abstract trees with shardings) of a full-size run."""
  module = importlib.import_module(f"lavit_jax.configs.lavit_7b.{name}")
  cfg = module.get_config()
  objective = objectives.build(cfg, artifacts.AbstractArtifacts(cfg))
  mesh = _mesh(cfg.mesh.to_dict(), DEVICES.get(name, 256))
  boxed = jax.eval_shape(step_lib.init_fn(objective, 0))
  state = sharding.abstract(boxed, mesh)
  phase = phases.phases_of(cfg)[-1]
  labels = objective.labels(phase, state.params)
  tx = optimizer.make(cfg.optimizer, phase, labels, boxed.params)
  return (
    cfg,
    mesh,
    {
      "params": state.params,
      "extra": state.extra,
      "optimizer": lowering.optimizer_state(tx, boxed.params, labels, mesh),
      "frozen": sharding.abstract(objective.frozen_shapes(), mesh),
    },
  )


def lines(name: str, made=None) -> list[str]:
  """One line a parameter, trained or frozen: path, shape, spec."""
  cfg, mesh, found = made or trees(name)
  told = [f"# {cfg.stage} on {dict(mesh.shape)}"]
  kept = {branch: found[branch] for branch in ("params", "frozen")}
  for path, leaf in jax.tree_util.tree_leaves_with_path(kept):
    place = jax.tree_util.keystr(path, simple=True, separator="/")
    spec = ", ".join(map(str, leaf.sharding.spec))
    told.append(f"{place} {list(leaf.shape)} ({spec})")
  return told


def _mesh(sizes, count):
  """The mesh of so many devices, without devices."""
  known = 1
  for size in sizes.values():
    known *= max(size, 1)
  shape = [sizes[a] if sizes[a] > 0 else count // known for a in _AXES]
  return jax.sharding.AbstractMesh(tuple(shape), _AXES)


_AXES = sharding.MESH_AXES

if __name__ == "__main__":
  FOLDER.mkdir(exist_ok=True)
  for one in NAMES:
    (FOLDER / f"{one}.txt").write_text("\n".join(lines(one)) + "\n")
