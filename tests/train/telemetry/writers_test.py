"""Metric writers: files as TensorBoard reads them, and after a kill."""

import json
import struct

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing import (
  event_file_loader,
  plugin_event_accumulator,
)
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.util import tensor_util

from lavit_jax.train.telemetry import event_files, writers


def events(directory):
  found = []
  for path in sorted(directory.glob("events.out.tfevents.*")):
    found += event_file_loader.EventFileLoader(str(path)).Load()
  return found


def accumulate(directory):
  accumulator = plugin_event_accumulator.EventAccumulator(str(directory))
  accumulator.Reload()
  return accumulator


def tensors(directory, tag):
  return [
    (e.step, tensor_util.make_ndarray(e.tensor_proto))
    for e in accumulate(directory).Tensors(tag)
  ]


def test_tensorboard_reads_every_scalar_back(tmp_path):
  writer = event_files.TensorBoardWriter(tmp_path)
  for step in (0, 1, 300, 70_000):
    writer.write_scalars(step, {"loss": step / 7, "train/α": np.float32(-2.5)})
  writer.write_scalars(1, {"huge": 1e300})  # beyond float32
  writer.close()
  assert tensors(tmp_path, "huge") == [(1, np.inf)]
  for tag, expected in (("loss", lambda s: s / 7), ("train/α", lambda s: -2.5)):
    rows = tensors(tmp_path, tag)
    assert [step for step, _ in rows] == [0, 1, 300, 70_000]
    for step, value in rows:
      np.testing.assert_allclose(value, expected(step), rtol=1e-6)


def test_tensorboard_reads_images_back_bit_by_bit(tmp_path):
  import io

  images = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
  writer = event_files.TensorBoardWriter(tmp_path)
  writer.write_images(3, {"masks": images})
  writer.close()
  ((step, value),) = tensors(tmp_path, "masks")
  assert step == 3
  assert value[:2].tolist() == [b"7", b"5"]  # width, height
  read = [np.asarray(Image.open(io.BytesIO(png))) for png in value[2:]]
  np.testing.assert_array_equal(read, images)
  plugin = accumulate(tmp_path).SummaryMetadata("masks").plugin_data
  assert plugin.plugin_name == "images"


def test_images_of_another_type_are_refused_by_name(tmp_path):
  writer = event_files.TensorBoardWriter(tmp_path)
  with pytest.raises(ValueError, match=r"'masks'.*float64\[1, 2, 2, 3\]"):
    writer.write_images(0, {"masks": np.zeros((1, 2, 2, 3))})
  writer.close()


def test_tensorboard_reads_hyperparameters_back(tmp_path):
  writer = event_files.TensorBoardWriter(tmp_path)
  hparams = {"lr": 0.5, "steps": 7, "ema": True, "name": "tiny"}
  writer.write_hparams(hparams | {"order": [1, 2], "missing": None})
  writer.close()
  (value,) = (v for e in events(tmp_path) for v in e.summary.value)
  session = hparams_metadata.parse_session_start_info_plugin_data(
    value.metadata.plugin_data.content
  )
  assert session.hparams["lr"].number_value == 0.5
  assert session.hparams["steps"].number_value == 7
  assert session.hparams["ema"].bool_value is True
  assert session.hparams["name"].string_value == "tiny"
  assert session.hparams["order"].string_value == "[1, 2]"
  assert session.hparams["missing"].string_value == "None"
  assert value.metadata.plugin_data.plugin_name == "hparams"


def test_on_resume_tensorboard_drops_the_later_steps_of_the_killed_run(
  tmp_path,
):
  first = event_files.TensorBoardWriter(tmp_path)
  for step in range(6):
    first.write_scalars(step, {"loss": 100.0})
  first.flush()  # and killed: never closed
  second = event_files.TensorBoardWriter(tmp_path, resume_step=3)
  second.write_scalars(4, {"loss": 1.0})
  second.close()
  rows = [(step, float(value)) for step, value in tensors(tmp_path, "loss")]
  assert rows == [(0, 100), (1, 100), (2, 100), (3, 100), (4, 1)]


def test_a_half_record_hides_nothing_before_it(tmp_path):
  writer = event_files.TensorBoardWriter(tmp_path)
  writer.write_scalars(1, {"loss": 2.0})
  writer.close()
  (path,) = tmp_path.glob("events*")
  path.write_bytes(path.read_bytes() + struct.pack("<Q", 99) + b"torn")
  assert [step for step, _ in tensors(tmp_path, "loss")] == [1]


def write_steps(path, steps, resume_step=None):
  writer = writers.JsonLinesWriter(path, resume_step=resume_step)
  for step in steps:
    writer.write_scalars(step, {"loss": 1 / (step + 1)})
  writer.close()


def test_json_lines_come_back_as_written(tmp_path):
  path = tmp_path / "a" / "metrics.jsonl"
  writer = writers.JsonLinesWriter(path)
  writer.write_hparams({"lr": 1e-3, "limit": float("inf"), "path": tmp_path})
  writer.write_scalars(2, {"loss": np.float32(0.5), "bad": float("nan")})
  rows = writers.read_json_lines(path)  # before close: nothing is held back
  writer.close()
  (row,) = rows  # and no row of settings: config.json holds them
  assert row.pop("time") > 1e9
  assert row == {"step": 2, "loss": 0.5, "bad": None}
  assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_line_cut_by_a_kill_is_left_out_and_then_written_over(tmp_path):
  path = tmp_path / "metrics.jsonl"
  write_steps(path, [1, 2])
  path.write_bytes(path.read_bytes() + b'{"step": 3, "lo')
  assert [row["step"] for row in writers.read_json_lines(path)] == [1, 2]
  write_steps(path, [3])
  assert [row["step"] for row in writers.read_json_lines(path)] == [1, 2, 3]


def test_on_resume_later_lines_are_dropped_and_others_are_kept(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"note": "of another program"}\n')
  write_steps(path, range(5))
  write_steps(path, [3], resume_step=2)
  rows = writers.read_json_lines(path)
  assert [row.get("step") for row in rows] == [None, 0, 1, 2, 3]
  write_steps(path, [0], resume_step=-1)
  rows = writers.read_json_lines(path)
  assert [row.get("step") for row in rows] == [None, 0]
  assert list(tmp_path.iterdir()) == [path]  # no partial file is left


def test_curves_hold_the_finite_numbers_of_each_metric():
  rows = [
    {"hparams": {"lr": 1.0}},
    {"step": 0, "time": 1.0, "loss": 2.0, "text": "no", "flag": True},
    {"step": 5, "time": 2.0, "loss": None, "eval/loss": 3},
    {"step": 6, "time": 3.0, "loss": 1.0},
  ]
  assert writers.curves(rows) == {
    "loss": [(0, 2.0), (6, 1.0)],
    "eval/loss": [(5, 3.0)],
  }


def test_create_writes_both_kinds(tmp_path):
  writer = writers.create(tmp_path / "run")
  writer.write_hparams({"lr": 1.0})
  writer.write_scalars(1, {"loss": 4.0})
  writer.write_images(1, {"masks": np.zeros((1, 2, 2, 3), np.uint8)})
  writer.flush()
  writer.close()
  writer.close()
  rows = writers.read_json_lines(tmp_path / "run" / "metrics.jsonl")
  assert writers.curves(rows) == {"loss": [(1, 4.0)]}
  tags = accumulate(tmp_path / "run").Tags()["tensors"]
  assert {"loss", "masks"} <= set(tags)
