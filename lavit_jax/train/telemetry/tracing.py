"""A `jax.profiler` trace of some steps of a run."""

import os
from typing import Any

import jax
import ml_collections
from etils import epath

from lavit_jax.core import errors

FOLDER = "profile"


class Tracer:
  """Traces steps `first` to `last` of config.log.profile, both included.

  TensorBoard's profile plugin and xprof open the trace in WORKDIR/profile.
  Without the field, or with an empty one, nothing is traced.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
  ):
    """Reads the steps from the config.

    Args:
      config: of the run.
      workdir: of the run.

    Raises:
      errors.ConfigError: first and last are not two steps in order.
    """
    steps: tuple[int, ...] = tuple(config.log.get("profile", ()) or ())
    self._folder = epath.Path(workdir) / FOLDER
    self._first, self._last = steps if len(steps) == 2 else (0, -1)
    self._is_running = False
    if steps and not (len(steps) == 2 and 0 <= steps[0] <= steps[1]):
      raise errors.ConfigError(
        f"log.profile={steps}: expected the first and the last step to trace,"
        " such as (10, 12), or () for no trace."
      )

  def before(self, step: int) -> None:
    """Starts the trace if `step` is to be traced; called before every step."""
    if not self._is_running and self._first <= step <= self._last:
      jax.profiler.start_trace(str(self._folder))
      self._is_running = True

  def after(self, step: int, outputs: Any) -> None:
    """Ends the trace after its last step; called after every step.

    Args:
      step: that is over.
      outputs: some arrays of the step, to wait for.
    """
    if self._is_running and step >= self._last:
      jax.block_until_ready(outputs)
      self.close()

  def close(self) -> None:
    """Ends a trace that is still running."""
    if self._is_running:
      self._is_running = False
      jax.profiler.stop_trace()
