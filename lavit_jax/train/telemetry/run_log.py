"""Everything that a run reports: metrics, images, time, batches, a trace."""

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath
from flax import traverse_util

from lavit_jax.core import averages, closing, hosts, image_io, sharding
from lavit_jax.cost import chips
from lavit_jax.train.telemetry import batch_log, meter, tracing, writers


class RunLog:
  """The logs of one process of a run; the lead process alone writes files.

  Attributes:
    meter: where the time goes.
    batches: `batches.jsonl`, a line for each step's batch.
    tracer: profiles the steps of config.log.profile.
  """

  meter: meter.Meter
  batches: batch_log.BatchLog

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    workdir: epath.Path,
    mesh: jax.sharding.Mesh,
  ):
    """Checks config.log; `open` opens the files."""
    self._config, self._workdir, self._mesh = config, workdir, mesh
    self.tracer = tracing.Tracer(config, workdir)
    self._writer: Any = None
    self._open: list[Any] = []

  def open(self, step: int) -> None:
    """Opens the logs of a run that goes on from a step, and drops later rows.

    Logs that are open are closed before.
    """
    self._close_files()
    rows = sharding.rows_of_process(self._mesh, self._config.batch_size)
    self._writer = (
      writers.create(self._workdir, resume_step=step)
      if hosts.is_lead()
      else writers.MultiWriter([])
    )
    self._open.append(self._writer)
    if step == 0:
      settings = json.loads(self._config.to_json_best_effort())
      # {"optimizer.b1": 0.9}
      self._writer.write_hparams(traverse_util.flatten_dict(settings, sep="."))
    self.meter = meter.Meter(
      self._workdir,
      resume_step=step,
      chip=chips.of_device(self._mesh.devices.flat[0]),
      num_devices=self._mesh.size,
      num_shares=self._config.batch_size // len(rows),
      write=hosts.is_lead(),
    )
    self._open.insert(0, self.meter)
    # Batch s leads from step s to step s + 1.
    self.batches = batch_log.BatchLog(
      self._workdir / "batches.jsonl",
      self._mesh,
      self._config.batch_size,
      resume_step=step - 1,
    )
    self._open.append(self.batches)

  def close(self) -> None:
    """Ends a trace and closes all files, whatever one of them meets."""
    closing.each([self.tracer.close, self._close_files])

  def _close_files(self) -> None:
    files, self._open = self._open, []
    closing.each(file.close for file in files)

  def write_steps(
    self,
    step: int,
    window: Sequence[averages.Metrics],
    rates: Mapping[str, float],
  ) -> None:
    """Writes one row of metrics of the steps since the last row.

    Args:
      step: the number of steps done.
      window: metrics of each step.
      rates: of the progress bar; those of the meter are added.
    """
    values = averages.merged(window, finite=True)
    values |= dict(rates) | self.meter.rates()
    self._writer.write_scalars(step, values)
    self._writer.flush()

  def write_evaluation(
    self,
    step: int,
    metrics: Mapping[str, float],
    images: np.ndarray | None,
  ) -> None:
    """Writes held-out metrics, and images if there are any.

    Args:
      step: the number of steps done.
      metrics: {name: value}.
      images: uint8[N, H, W, 3], written as events and as one row in a file.
    """
    self._writer.write_scalars(
      step, {f"held_out/{name}": value for name, value in metrics.items()}
    )
    if images is not None and len(images):
      self._writer.write_images(step, {"held_out/pictures": images})
      if hosts.is_lead():
        _write_png(self._workdir / "pictures" / f"{step:06d}.png", images)
    self._writer.flush()


def _write_png(path: epath.Path, images: np.ndarray) -> None:
  """Writes images uint8[N, H, W, 3] side by side."""
  path.parent.mkdir(exist_ok=True)
  file = io.BytesIO()
  row = np.concatenate(list(images), axis=1)
  image_io.to_pil(row).save(file, format="PNG")
  path.write_bytes(file.getvalue())
