"""A run on several sources at once: its shares, its log, its resumption."""

import json

import numpy as np
import pytest

from lavit_jax.core import errors
from lavit_jax.train import loop
from lavit_jax.train.objectives.frozen import artifacts
from lavit_jax.train.telemetry import writers
from tests import micro

pytestmark = [
  pytest.mark.slow,
  pytest.mark.usefixtures("shared_programs"),
]


@pytest.fixture
def config(micro_codes, tmp_path):
  """Scenes with their codes, and texts of two files."""
  (tmp_path / "model").symlink_to(micro_codes / "model")
  (tmp_path / "codes").symlink_to(micro_codes / "codes")
  cfg = micro.config("pretrain", tmp_path)
  for name in ("prose", "verse"):
    rows = [{"text": f"{name} red circle {i} " * 3} for i in range(60)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / f"{name}.jsonl").write_text(text)
  texts = lambda name, weight: dict(
    kind="jsonl", path=str(tmp_path / f"{name}.jsonl"), weight=weight
  )
  cfg.data.sources = dict(
    scenes=dict(kind="shapes", weight=2.0),
    prose=texts("prose", 1.0),
    verse=texts("verse", 1.0),
  )
  cfg.phases.train.steps = 6
  cfg.data.window = 16
  return cfg


def test_a_mixture_is_trained_and_goes_on_as_it_was(config, tmp_path):
  with micro.one_device():
    loop.train(config, tmp_path / "straight", quiet=True)
    loop.train(config, tmp_path / "run", quiet=True, stop_at=3)
    loop.train(config, tmp_path / "run", quiet=True)
  crcs, rows = [], []
  for name in ("straight", "run"):
    lines = writers.read_json_lines(tmp_path / name / "batches.jsonl")
    crcs.append({line["step"]: line["crc32"] for line in lines})
    logged = writers.read_json_lines(tmp_path / name / "metrics.jsonl")
    rows.append([row for row in logged if "documents" in row][-1])
  assert crcs[0] == crcs[1]
  assert len(crcs[0]) == 6
  assert rows[0]["documents"] == rows[1]["documents"] > 16
  epochs = {k: v for k, v in rows[0].items() if k.startswith("epoch/")}
  assert {"epoch/prose/text", "epoch/verse/text"} < set(epochs)
  # A tenth of the sixty texts is held out.
  np.testing.assert_allclose(
    54 * epochs["epoch/prose/text"], rows[0]["documents"] / 4, rtol=0.1
  )


def test_weights_change_from_a_document_on_and_not_before(config, tmp_path):
  run = tmp_path / "run"

  def again(stop=3):
    with micro.one_device():
      loop.train(config, run, quiet=True, stop_at=stop)

  again(stop=2)
  config.data.reweighted = {"1": {"prose": 3.0}}
  with pytest.raises(errors.DataError, match="can change from document 48 on"):
    again()
  config.data.reweighted = {"48": {"prose": 3.0, "verse": 0}}
  again()
  config.data.reweighted = {"48": {"prose": 2.0}}
  with pytest.raises(errors.DataError, match="document 48 on, this run had"):
    again()
  config.data.reweighted = {"x": {"prose": 2.0}}
  with pytest.raises(errors.ConfigError, match="numbers of documents"):
    again()
  config.data.reweighted = {"80": {"poem": 2.0}}
  with pytest.raises(errors.ConfigError, match=r"names \['poem'\]"):
    again()
  for odd in ({"032": {"prose": 2}}, {"32": 3}, {"32": {"prose": "x"}}):
    config.data.reweighted = odd
    with pytest.raises(errors.ConfigError, match="numbers of documents"):
      again()
  config.data.reweighted = {}
  config.data.weight_by = "letters"
  with pytest.raises(errors.ConfigError, match="documents or tokens"):
    loop.train(config, tmp_path / "other", quiet=True)


def test_texts_alone_are_trained_and_missing_codes_are_named(config, tmp_path):
  del config.data.sources.scenes
  config.phases.train.steps = 1
  with micro.one_device():
    loop.train(config, tmp_path / "run", quiet=True)
  rows = writers.read_json_lines(tmp_path / "run" / "metrics.jsonl")
  assert any("epoch/verse/text" in row for row in rows)
  config.data.sources.scenes = dict(kind="shapes", cache_dir="")
  with pytest.raises(errors.ConfigError, match=r"sources\.scenes\.cache_dir"):
    loop.train(config, tmp_path / "other", quiet=True)


@pytest.mark.parametrize(
  "fields", [{"weight_by": "tokens"}, {"reweighted": {"9": {"a": 1.0}}}]
)
def test_stages_of_single_images_refuse_weights_of_rows(tmp_path, fields):
  cfg = micro.config("encoder", tmp_path)
  cfg.data.update(fields)
  with pytest.raises(errors.ConfigError, match="of stage pretrain alone"):
    artifacts.Artifacts().image_batches(cfg, ())
