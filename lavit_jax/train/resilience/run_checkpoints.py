"""Checkpoints of a run: written whole or not at all, and checked when read.

A checkpoint is the whole truth of a training run: parameters, optimizer, stage
state, rng, step, data position and config. Each is one folder, named by its
step. Once it is complete, `files.json` in it names its files and their sizes:
a truncated or missing one is then found without reading the arrays.

A damaged checkpoint is never deleted. It is moved to `damaged/` beside the
others, and only once an older one has been read in its place.
"""

import concurrent.futures
import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from lavit_jax.core import closing, errors, hosts
from lavit_jax.core.storage import checkpoints, files

_LOG = logging.getLogger(__name__)
_SEAL = "files.json"
_DAMAGED = "damaged"
_METRICS = "held_out"  # in the JSON part: what the best one is chosen by


@dataclasses.dataclass(frozen=True)
class Restored:
  """What `RunCheckpoints.restore_newest` found."""

  step: int
  state: Any
  meta: dict[str, Any]


class RunCheckpoints:
  """Keeps the last `keep` checkpoints of a run and the best one.

  `best` is a metric name of the held-out evaluation; `best_mode` is "min" or
  "max". A checkpoint that was not evaluated, or whose metric is not finite, is
  never the best one. Saving is asynchronous; `close` waits for it. With several
  processes all of them call every method, but for `seal`, which need not be in
  step.
  """

  def __init__(
    self, directory, *, keep: int = 2, best: str = "loss", best_mode="min"
  ):
    """Opens or makes the folder.

    Raises:
      errors.ConfigError: `keep` is less than 1.
      errors.CheckpointError: a name that Orbax cannot keep arrays under.
    """
    if keep < 1:
      raise errors.ConfigError(
        f"checkpoint.keep={keep}: a run resumes from its newest checkpoint, so"
        " at least 1 is kept. Set checkpoint.keep=1 or more."
      )
    files.check_arrays_folder(directory, write=True)
    self._unsealed: int | None = None
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "lavit_seal")
    self._sealing: concurrent.futures.Future | None = None
    self.directory = directory = files.absolute(directory)
    self._keep, self._best = keep, best
    self._sign = -1.0 if best_mode == "min" else 1.0
    self._manager = ocp.CheckpointManager(
      directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self, cleanup_tmp_directories=True
      ),
      item_names=("state", "meta"),
    )
    self._scores = {
      step: self._score(self._stored_metrics(step))
      for step in self._manager.all_steps()
    }

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    """Orbax's question which checkpoints stay.

    Not its BestN: that one keeps all that were not evaluated, and knows no
    metrics of before a restart unless a damaged file of them ends the run.
    """
    del context
    steps = [checkpoint.step for checkpoint in checkpoints]
    left = kept(steps, self._keep, self._scores)
    return [step in left for step in steps]

  def _score(self, metrics) -> float:
    """More is better; what is not there or not finite is the least of all."""
    value = (metrics or {}).get(self._best)
    value = math.nan if value is None else self._sign * float(value)
    return value if math.isfinite(value) else -math.inf

  def _stored_metrics(self, step):
    """Those that `save` was given; None if a checkpoint has none."""
    before = self.directory / str(step) / "metrics" / "metrics"
    try:
      found = self._stored_meta(step).get(_METRICS)
      if found is None and before.exists():  # where Orbax itself kept them
        found = json.loads(before.read_text())
    except (OSError, ValueError):  # damaged, which `restore_newest` tells
      return None
    return found if isinstance(found, dict) else None

  def latest_step(self) -> int | None:
    """The newest complete checkpoint's step, None for a new run."""
    return self._manager.latest_step()

  def save(self, step: int, state, meta: Mapping[str, Any], metrics=None):
    """Starts to write `state` (arrays) and `meta` (JSON) at `step`.

    Raises:
      errors.CheckpointError: this write, or the one before, failed. Complete
        checkpoints are untouched.
    """
    if step == self._manager.latest_step():
      return
    meta = dict(meta)
    if metrics:
      meta[_METRICS] = {
        name: float(value) if math.isfinite(value) else None
        for name, value in metrics.items()
      }
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
    )
    with checkpoints.writing(self.directory):
      self._manager.wait_until_finished()
      self.seal()
      self._sealed()
      self._scores[step] = self._score(metrics)
      self._manager.save(step, args=args, force=True)
      self._unsealed = step

  def seal(self) -> None:
    """Lists the files of a save that has become complete; cheap if none has.

    To be called often: a checkpoint without a list is as good, but damage to
    it is noticed only when its arrays are read. A thread asks for the sizes:
    in an object store that is hundreds of questions.
    """
    if self._unsealed is None or self._manager.is_saving_in_progress():
      return
    step, self._unsealed = self._unsealed, None
    self._sealed()
    if hosts.is_lead():
      self._sealing = self._thread.submit(_seal, self.directory / str(step))

  def _sealed(self) -> None:
    """Waits for the list: Orbax must not remove what is being listed.

    What making it met ends no run: a checkpoint without one is as good.
    """
    sealing, self._sealing = self._sealing, None
    if sealing is not None and (error := sealing.exception()):
      _LOG.warning(
        "a checkpoint in %s is left without %s: %s",
        self.directory,
        _SEAL,
        _first_line(error),
      )

  def meta(self, step: int) -> dict[str, Any]:
    """The JSON part of a checkpoint: config, data position, stage."""
    found = self._stored_meta(step)
    return {k: v for k, v in found.items() if k != _METRICS}

  def _stored_meta(self, step):
    handler = ocp.JsonCheckpointHandler()
    folder = self.directory / str(step) / "meta"
    return handler.restore(folder, args=ocp.args.JsonRestore())

  def restore(self, step: int, abstract_state):
    """State at `step`, laid out as `abstract_state` (shapes + shardings)."""
    try:
      return self._read(step, abstract_state)
    except Exception as e:
      raise errors.CheckpointError(self._misfit(step, e)) from e

  def _read(self, step, abstract_state):
    """Arrays of a step; without the manager, whose barriers would hang where
    one process alone finds damage.
    """
    handler = ocp.StandardCheckpointHandler()
    args = ocp.args.StandardRestore(abstract_state)
    return handler.restore(self.directory / str(step) / "state", args=args)

  def _misfit(self, step, error):
    return (
      f"Checkpoint {self.directory / str(step)} does not fit the model of this"
      f" config: {_first_line(error)} Train in another --workdir, or use the"
      " config that wrote it."
    )

  def restore_newest(
    self, abstract_at: Callable[[int], Any], before: int | None = None
  ) -> Restored | None:
    """The newest checkpoint that can be read whole; None if there is none.

    Damaged ones are named in the log, and moved aside once an older one has
    been read.

    Args:
      abstract_at: from a step to its abstract state (shapes + shardings).
      before: only checkpoints of earlier steps, if given.

    Raises:
      errors.CheckpointError: checkpoints are there, but all are damaged; or
        one is whole and does not fit the model.
    """
    damaged: dict[int, str] = {}
    for step in sorted(self._steps(), reverse=True):
      if before is not None and step >= before:
        continue
      found = self._try(step, abstract_at(step))
      if isinstance(found, Restored):
        self._move_aside(damaged)
        return found
      damaged[step] = found
      _LOG.warning(
        "checkpoint %s is damaged (%s): the one before it is used",
        self.directory / str(step),
        found,
      )
    if damaged:
      listed = "; ".join(f"{step}: {why}" for step, why in damaged.items())
      raise errors.CheckpointError(
        f"Every checkpoint in {self.directory} is damaged ({listed}). Bring one"
        " of them back from a copy; or, to train from the start, give another"
        " --workdir. Nothing was deleted."
      )
    return None

  def _steps(self):
    """Steps that have a folder, as the first process sees them."""
    steps = sorted(self._manager.all_steps())
    count = hosts.broadcast_from_lead(len(steps))
    padded = (steps + [0] * count)[:count]
    return [hosts.broadcast_from_lead(step) for step in padded]

  def _try(self, step, abstract) -> Restored | str:
    """The checkpoint, or what is wrong with it: the same on all processes."""
    why = fault(self.directory / str(step)) if hosts.is_lead() else None
    if not hosts.all_agree(why is None):
      return why or "the first process found damage"
    error = found = None
    try:
      found = Restored(step, self._read(step, abstract), self.meta(step))
    except Exception as e:  # whatever Orbax and TensorStore call it
      error = e
    if hosts.all_agree(error is None):
      return found
    if error is not None and self._differs(step, abstract):
      raise errors.CheckpointError(self._misfit(step, error)) from error
    return _first_line(error) if error else "another process cannot read it"

  def _differs(self, step, abstract) -> bool:
    """Whether a whole checkpoint is of other arrays than those asked for."""
    try:
      folder = self.directory / str(step) / "state"
      stored = ocp.StandardCheckpointHandler().metadata(folder)
      tree = getattr(stored, "tree", stored)
      theirs = sorted(tuple(x.shape) for x in jax.tree.leaves(tree))
    except Exception:  # its description cannot be read either
      return False
    return theirs != sorted(tuple(x.shape) for x in jax.tree.leaves(abstract))

  def _move_aside(self, damaged) -> None:
    """Out of the way of the steps that will be saved again."""
    if not damaged:
      return
    if hosts.is_lead():
      for step in damaged:
        name = f"{self.directory.name}-{step}-{int(time.time())}"
        target = self.directory.parent / _DAMAGED / name
        files.move_folder(self.directory / str(step), target)
        _LOG.warning("it was moved to %s", target)
    hosts.barrier("lavit_damaged_moved")
    self._manager.reload()

  def wait(self):
    """Returns once everything saved so far is on disk."""
    with checkpoints.writing(self.directory):
      self._manager.wait_until_finished()
      self.seal()
      self._sealed()

  def close(self):
    """Waits for pending saves and closes."""
    closing.each([self.wait, self._manager.close, self._thread.shutdown])


def kept(
  steps: Sequence[int], keep: int, scores: Mapping[int, float]
) -> set[int]:
  """The last `keep` of steps, and the one of the highest score.

  Of equals the latest; a step without a score, or with -inf, is never best.
  """
  scored = [s for s in steps if scores.get(s, -math.inf) > -math.inf]
  best = sorted(scored, key=lambda s: (scores[s], s))[-1:]
  return {*sorted(steps)[-keep:], *best}


def _first_line(error) -> str:
  lines = str(error).splitlines() or [""]
  return f"{type(error).__name__}: {lines[0][:300]}"


def sizes(folder) -> dict[str, int]:
  """Bytes of every file of a checkpoint by its path there; the list's apart."""
  folder = epath.Path(folder)
  found, todo = {}, [folder]
  while todo:
    for path in todo.pop().iterdir():
      if path.is_dir():
        todo.append(path)
      elif not path.name.startswith(_SEAL):
        name = str(path)[len(str(folder)) :].lstrip("/")
        found[name] = path.stat().length
  return found


def _seal(folder) -> None:
  """Lists the files of a complete checkpoint in it."""
  if folder.exists():
    text = json.dumps(sizes(folder), indent=0, sort_keys=True)
    files.write_whole(folder / _SEAL, text.encode())


def fault(folder) -> str | None:
  """What is wrong with a checkpoint as far as its files tell; None: nothing.

  Args:
    folder: of one checkpoint.
  """
  folder = epath.Path(folder)
  try:
    meta = folder / "meta" / "metadata"
    json.loads(meta.read_text())
    if not (folder / "state" / "_METADATA").exists():
      return "state/_METADATA is missing"
    if not (folder / _SEAL).exists():
      return None  # what else is wrong shows when its arrays are read
    wanted = json.loads((folder / _SEAL).read_text())
  except (OSError, ValueError) as e:
    return _first_line(e)
  found = sizes(folder)
  for name, size in sorted(wanted.items()):
    if name not in found:
      return f"{name} is missing"
    if found[name] != size:
      return f"{name} has {found[name]} bytes in place of {size}"
  return None
