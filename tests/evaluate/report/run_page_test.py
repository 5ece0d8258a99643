"""`lavit report`: the page of a workdir holds what its files say."""

import html.parser
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from lavit_jax.commands import main
from lavit_jax.core import errors
from lavit_jax.evaluate.report import run_page
from lavit_jax.train.telemetry import writers
from tests import micro


def _write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def workdir(tmp_path):
  """What a run leaves that was started twice."""
  folder = tmp_path / "run"
  (folder / "pictures").mkdir(parents=True)
  config = {
    "stage": "pretrain",
    "batch_size": 8,
    "mesh": {"data": -1, "fsdp": 4, "tensor": 1},
    "model": {"llm": {"width": 16}, "note": "<b>"},
  }
  (folder / "config.json").write_text(json.dumps(config))
  begin = 1.7e9
  rows = [
    {
      "step": step,
      "time": begin + 6 * step,
      "loss": 5.0 - 0.2 * step,
      "text_loss": 4.0,
      "learning_rate": 1e-3,
      "time/step_s": 0.5,
      "time/data_wait_s": 0.1,
      "tokens_per_second": 1000.0,
      "tokens_per_second_per_chip": 125.0,
      "mfu": 0.61,
      "goodput": 0.9,
      "data_wait_share": 0.1,
      "memory/host_gb": 1.5,
    }
    for step in range(2, 13, 2)
  ]
  rows.append({"step": 12, "time": begin + 75, "held_out/loss": 2.875})
  _write(folder / "metrics.jsonl", rows)
  base = {"first_start": begin, "data_wait_s": 6.0, "compile_s": 12.0}
  _write(
    folder / writers.GOODPUT,
    [
      {"step": 0, "time": begin, "kept_s": 0, "starts": 1} | base,
      {"step": 6, "time": begin + 36, "kept_s": 15, "starts": 1} | base,
      {"step": 6, "time": begin + 40, "kept_s": 15, "starts": 2} | base,
      {"step": 12, "time": begin + 78, "kept_s": 30, "starts": 2} | base,
    ],
  )
  for step in (6, 12):
    checkpoint = folder / "checkpoints" / str(step)
    checkpoint.mkdir(parents=True)
    (checkpoint / "arrays").write_bytes(bytes(2_000_000))
    image = np.full((4, 8, 3), 20 * step, np.uint8)
    Image.fromarray(image).save(folder / "pictures" / f"{step:06d}.png")
  return folder


class _Words(html.parser.HTMLParser):
  """The texts of a page, and whether anything is fetched."""

  def __init__(self, text):
    super().__init__()
    self.words, self.sources = [], []
    self.feed(text)

  def handle_data(self, data):
    self.words.append(data.strip())

  def handle_starttag(self, tag, attrs):
    for name, value in attrs:
      if name in ("src", "href"):
        self.sources.append(value)


def test_the_page_says_how_the_run_went(workdir, tmp_path):
  path = run_page.write(workdir, tmp_path / "new" / "page.html")
  page = _Words(path.read_text())
  expected = {
    "Run run",
    "Where the time went",
    "Checkpoints",
    "Evaluation images",
    "Config",
    "held-out loss, last",
    "2.875",
    "MFU",
    "0.610",
    "125.000",
    "seconds per step",
    "host GB",
    "loss",
    "learning_rate",
    "model.llm.width",
    '"<b>"',
    "data the rest, fsdp 4",
    "starts",
    "2023-11-14 22:13 UTC",  # the first start
    "1m18s",
    "step 12",
  }
  assert expected <= set(page.words)
  assert all(s.startswith(("#", "data:image/")) for s in page.sources)
  assert "data_wait_share" not in page.words


def test_times_add_up_to_the_wall_clock(workdir):
  (section,) = [
    section
    for section in run_page.report(workdir).sections
    if section.title == "Where the time went"
  ]
  chart, starts = section.blocks
  # 78 s: 30 kept, 12 compilation, 6 data; 30 lost.
  for label in ("0.5 min", "0.2 min", "0.1 min"):
    assert f">{label}</text>" in chart.image
  assert [row[:2] for row in starts.rows] == [[1, 0], [2, 6]]


def test_training_and_held_out_loss_share_a_chart(workdir):
  curves = run_page.report(workdir).curves
  assert list(curves["Losses"]) == [
    "held_out/loss",
    "loss",
    "text_loss",
    "learning_rate",
  ]
  assert len(curves["Losses"]["loss"]) == 6
  assert set(curves["Speed"]) >= {"step/seconds per step", "MFU", "goodput"}
  assert "Other metrics" not in curves


def test_the_command_writes_into_the_workdir(workdir, capsys):
  assert main.main(["report", str(workdir), "--json"]) == 0
  document = json.loads(capsys.readouterr().out)
  assert document["metrics"]["MFU"] == 0.61
  assert document["facts"]["starts"] == 2
  assert pathlib.Path(document["report"]) == workdir / "report.html"
  assert (workdir / "report.html").stat().st_size > 5000


def test_a_folder_that_is_no_workdir_says_what_is(workdir, tmp_path, capsys):
  out = tmp_path / "page.html"
  assert main.main(["report", str(tmp_path), "--out", str(out)]) == 2
  said = capsys.readouterr().err
  assert "no config.json" in said
  assert "Give one of the runs in it: run." in said
  with pytest.raises(errors.UsageError, match="nowhere is no directory"):
    run_page.write(tmp_path / "nowhere", out)
  with pytest.raises(errors.UsageError, match=r"--out .* is a folder"):
    run_page.write(workdir, tmp_path)
  (workdir / "metrics.jsonl").write_text("")
  with pytest.raises(errors.UsageError, match="no metrics yet"):
    run_page.write(workdir, out)
  assert not out.exists()


def test_a_workdir_of_a_real_run_is_read(micro_runs, tmp_path):
  workdir = micro_runs / "pretrain"
  text = run_page.write(workdir, tmp_path / "page.html").read_text()
  words = set(_Words(text).words)
  assert {"Where the time went", "seconds per step", "visual_loss"} <= words
  assert micro.config("pretrain", micro_runs).stage in text
