"""Parts of a model directory that were not trained with one another."""

import json

import pytest

from lavit_jax.core import errors
from lavit_jax.core.storage import checkpoints, fingerprints
from lavit_jax.infer import pipeline
from lavit_jax.infer.loading import made_of, parts
from lavit_jax.infer.pixels import decoders
from lavit_jax.jobs import tokenize
from tests import micro


@pytest.fixture
def model(micro_runs, tmp_path):
  """A model directory of its own."""
  (root,) = micro.branch(micro_runs, tmp_path, 1)
  return root / "model"


def test_parts_that_belong_together_pass(model):
  lavit = pipeline.LaVIT.load(model)
  parts.Language(model, lavit.visual)
  assert decoders.load(model, "pixels")


def test_words_of_another_encoder_are_refused(model, tmp_path):
  micro.perturb(model, "encoder")
  with pytest.raises(errors.CheckpointError) as caught:
    _ = pipeline.LaVIT.load(model).visual
  for words in (
    "the part tokenizer",
    "encoder is '",
    "Train",
    "put",
    "made_of",
  ):
    assert words in str(caught.value)
  fields = {"train_size": 4, "held_out_size": 4}
  for write in (tokenize.write_cache, tokenize.write_caches):
    with pytest.raises(errors.CheckpointError, match="the part tokenizer"):
      write(model, "shapes", tmp_path / "codes", fields=fields, quiet=True)
  assert not list(tmp_path.glob("codes*"))


def test_an_llm_and_pixels_of_other_words_are_refused(model):
  micro.perturb(model, "tokenizer")
  words = pipeline.LaVIT.load(model).visual  # it knows its encoder
  with pytest.raises(errors.CheckpointError, match="the part llm was"):
    parts.Language(model, words)
  with pytest.raises(errors.CheckpointError, match="the part pixels"):
    decoders.load(model, "pixels")


def test_a_difference_that_is_meant_can_be_said(model):
  micro.perturb(model, "encoder")
  path = model / "tokenizer" / "part.json"
  told = json.loads(path.read_text())
  del told["made_of"]["encoder"]  # as the message says
  path.write_text(json.dumps(told))
  made_of.check_made_of(model, "tokenizer")


def test_what_does_not_tell_costs_no_reading(model, monkeypatch):
  monkeypatch.setattr(checkpoints, "StoredPart", None)
  fingerprints._digested.cache_clear()
  for name in ("tokenizer", "llm", "pixels"):
    path = model / name / "part.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"made_of": {}}))
    made_of.check_made_of(model, name)


def test_what_lies_in_no_folder_is_not_compared(model):
  (model / "encoder" / "part.json").unlink()
  made_of.check_made_of(model, "llm")
