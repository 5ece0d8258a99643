"""Checkpoints of a run: written whole or not at all, and checked when read.

A checkpoint has everything that a training run needs to go on: parameters,
optimizer, stage state, rng, step, data position and config. Each is one folder,
named by its step. Once it is complete, `files.json` in it lists its files and
their sizes: a truncated or missing one is then found without reading arrays.

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
_METRICS = "held_out"  # in the JSON part; the best checkpoint is chosen by it


@dataclasses.dataclass(frozen=True)
class Restored:
  """A checkpoint that was read.

  Attributes:
    step: of the checkpoint.
    state: its arrays.
    meta: its JSON part.
  """

  step: int
  state: Any
  meta: dict[str, Any]


class RunCheckpoints:
  """Keeps the last `keep` checkpoints of a run and the best one.

  A checkpoint that was not evaluated, or whose metric is not finite, is never
  the best. Saving is asynchronous; `close` waits for it. With several processes
  all of them call every method in step, but for `seal`.
  """

  def __init__(
    self,
    directory: str | epath.Path,
    *,
    keep: int = 2,
    best: str = "loss",
    best_mode: str = "min",
  ):
    """Opens or makes the folder.

    Args:
      directory: of the checkpoints.
      keep: number of the newest that are kept.
      best: held-out metric that the best one is chosen by.
      best_mode: "min" or "max".

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
    self._unsealed: int | None = None  # step that is saved, but not yet listed
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "lavit_seal")
    self._sealing: concurrent.futures.Future | None = None
    self.directory = files.absolute(directory)
    self._keep, self._best = keep, best
    self._sign = -1.0 if best_mode == "min" else 1.0
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self, cleanup_tmp_directories=True
      ),
      item_names=("state", "meta"),
    )
    self._scores = {
      step: self._score(self._stored_metrics(step))
      for step in self._manager.all_steps()
    }

  def should_preserve(
    self, checkpoints: Sequence[Any], *, context: Any
  ) -> list[bool]:
    """Tells Orbax which checkpoints stay.

    Orbax's own BestN would keep all that were not evaluated, and a damaged file
    of metrics would end the run.
    """
    del context
    steps = [checkpoint.step for checkpoint in checkpoints]
    stay = kept(steps, self._keep, self._scores)
    return [step in stay for step in steps]

  def _score(self, metrics: Mapping[str, Any] | None) -> float:
    """Returns a score, more is better; -inf if missing or not finite."""
    value = (metrics or {}).get(self._best)
    value = math.nan if value is None else self._sign * float(value)
    return value if math.isfinite(value) else -math.inf

  def _stored_metrics(self, step: int) -> dict[str, Any] | None:
    """Returns the metrics that were saved with a checkpoint, if any."""
    by_orbax = self.directory / str(step) / "metrics" / "metrics"
    try:
      metrics = self._stored_meta(step).get(_METRICS)
      if metrics is None and by_orbax.exists():  # of an earlier version
        metrics = json.loads(by_orbax.read_text())
    except (OSError, ValueError):  # damaged, which `restore_newest` reports
      return None
    return metrics if isinstance(metrics, dict) else None

  def latest_step(self) -> int | None:
    """Returns the newest complete checkpoint's step; None for a new run."""
    return self._manager.latest_step()

  def save(
    self,
    step: int,
    state: Any,
    meta: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Starts to write a checkpoint.

    Args:
      step: of the state.
      state: tree of arrays.
      meta: written as JSON.
      metrics: held-out metrics of this step, if it was evaluated.

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
      self._wait_for_seal()
      self._scores[step] = self._score(metrics)
      self._manager.save(step, args=args, force=True)
      self._unsealed = step

  def seal(self) -> None:
    """Lists the files of a save that has become complete; cheap if none has.

    To be called often: until then damage to the checkpoint is noticed only when
    its arrays are read. A thread asks for the sizes: in an object store that is
    hundreds of requests.
    """
    if self._unsealed is None or self._manager.is_saving_in_progress():
      return
    step, self._unsealed = self._unsealed, None
    self._wait_for_seal()
    if hosts.is_lead():
      self._sealing = self._thread.submit(_seal, self.directory / str(step))

  def _wait_for_seal(self) -> None:
    """Waits for the list: Orbax must not remove what is being listed.

    Its errors are logged: a checkpoint without a list can be restored too.
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
    """Returns a checkpoint's JSON part: config, data position, stage."""
    stored = self._stored_meta(step)
    return {k: v for k, v in stored.items() if k != _METRICS}

  def _stored_meta(self, step: int) -> dict[str, Any]:
    handler = ocp.JsonCheckpointHandler()
    folder = self.directory / str(step) / "meta"
    return handler.restore(folder, args=ocp.args.JsonRestore())

  def _read(self, step: int, abstract_state: Any) -> Any:
    """Reads the arrays of a step.

    Not by Orbax's manager, whose barriers would hang if one process alone finds
    damage.
    """
    handler = ocp.StandardCheckpointHandler()
    args = ocp.args.StandardRestore(abstract_state)
    return handler.restore(self.directory / str(step) / "state", args=args)

  def _misfit(self, step: int, error: BaseException) -> str:
    return (
      f"Checkpoint {self.directory / str(step)} does not fit the model of this"
      f" config: {_first_line(error)} Train in another --workdir, or use the"
      " config that wrote it."
    )

  def restore_newest(
    self, abstract_at: Callable[[int], Any], before: int | None = None
  ) -> Restored | None:
    """Reads the newest checkpoint that is undamaged; None if there is none.

    Damaged ones are named in the log, and moved aside once an older one has
    been read.

    Args:
      abstract_at: maps a step to its abstract state (shapes + shardings).
      before: only checkpoints of earlier steps, if given.

    Raises:
      errors.CheckpointError: all checkpoints are damaged, or an undamaged one
        does not fit the model.
    """
    damaged: dict[int, str] = {}
    for step in sorted(self._steps(), reverse=True):
      if before is not None and step >= before:
        continue
      restored = self._try(step, abstract_at(step))
      if isinstance(restored, Restored):
        self._move_aside(damaged)
        return restored
      damaged[step] = restored
      _LOG.warning(
        "checkpoint %s is damaged (%s): the one before it is used",
        self.directory / str(step),
        restored,
      )
    if damaged:
      listed = "; ".join(f"{step}: {why}" for step, why in damaged.items())
      raise errors.CheckpointError(
        f"Every checkpoint in {self.directory} is damaged ({listed}). Bring one"
        " of them back from a copy; or, to train from the start, give another"
        " --workdir. Nothing was deleted."
      )
    return None

  def _steps(self) -> list[int]:
    """Returns steps that have a folder, as the lead process sees them."""
    steps = sorted(self._manager.all_steps())
    count = hosts.broadcast_from_lead(len(steps))
    padded = (steps + [0] * count)[:count]
    return [hosts.broadcast_from_lead(step) for step in padded]

  def _try(self, step: int, abstract: Any) -> Restored | str:
    """Reads a checkpoint, or says what is damaged; all processes agree."""
    why = fault(self.directory / str(step)) if hosts.is_lead() else None
    if not hosts.all_agree(why is None):
      return why or "the first process found damage"
    restored, error = None, None
    try:
      restored = Restored(step, self._read(step, abstract), self.meta(step))
    except Exception as e:  # Orbax and TensorStore raise many kinds
      error = e
    if hosts.all_agree(error is None) and restored is not None:
      return restored
    if error is None:
      return "another process cannot read it"
    if self._has_other_shapes(step, abstract):
      raise errors.CheckpointError(self._misfit(step, error)) from error
    return _first_line(error)

  def _has_other_shapes(self, step: int, abstract: Any) -> bool:
    """Returns whether a checkpoint is of other arrays than those expected.

    False if even its description cannot be read: then it is damaged.
    """
    try:
      folder = self.directory / str(step) / "state"
      description = ocp.StandardCheckpointHandler().metadata(folder)
      tree = getattr(description, "tree", description)
      stored = sorted(tuple(x.shape) for x in jax.tree.leaves(tree))
    except Exception:
      return False
    return stored != sorted(tuple(x.shape) for x in jax.tree.leaves(abstract))

  def _move_aside(self, damaged: Mapping[int, str]) -> None:
    """Moves damaged checkpoints away from steps that will be saved again."""
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

  def wait(self) -> None:
    """Returns once everything saved so far is on disk."""
    with checkpoints.writing(self.directory):
      self._manager.wait_until_finished()
      self.seal()
      self._wait_for_seal()

  def close(self) -> None:
    """Waits for pending saves and closes."""
    closing.each([self.wait, self._manager.close, self._thread.shutdown])


def kept(
  steps: Sequence[int], keep: int, scores: Mapping[int, float]
) -> set[int]:
  """Returns the last `keep` of steps, and the one of the highest score.

  Of equals the latest; a step without a score, or with -inf, is never best.
  """
  scored = [s for s in steps if scores.get(s, -math.inf) > -math.inf]
  best = sorted(scored, key=lambda s: (scores[s], s))[-1:]
  return {*sorted(steps)[-keep:], *best}


def _first_line(error: BaseException) -> str:
  lines = str(error).splitlines() or [""]
  return f"{type(error).__name__}: {lines[0][:300]}"


def sizes(folder: str | epath.Path) -> dict[str, int]:
  """Returns {path in a checkpoint: bytes} of all files but the list."""
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


def _seal(folder: epath.Path) -> None:
  """Writes the list of a complete checkpoint's files."""
  if folder.exists():
    text = json.dumps(sizes(folder), indent=0, sort_keys=True)
    files.write_whole(folder / _SEAL, text.encode())


def fault(folder: str | epath.Path) -> str | None:
  """Says what is wrong with a checkpoint's files; None if nothing is.

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
      return None  # other damage shows when its arrays are read
    expected = json.loads((folder / _SEAL).read_text())
  except (OSError, ValueError) as e:
    return _first_line(e)
  found = sizes(folder)
  for name, size in sorted(expected.items()):
    if name not in found:
      return f"{name} is missing"
    if found[name] != size:
      return f"{name} has {found[name]} bytes in place of {size}"
  return None
