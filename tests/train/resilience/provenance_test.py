"""What runs depend on, kept in their checkpoints and compared."""

import json
import logging
import string

import ml_collections
import pytest

from lavit_jax.core import errors, vocabulary
from lavit_jax.core.storage import checkpoints, fingerprints
from lavit_jax.data.sources import kinds, shapes
from lavit_jax.infer.loading import parts
from lavit_jax.train import loop, objectives
from lavit_jax.train.resilience import provenance, run_checkpoints
from tests import micro
from tests.train import sharding_test

_DATA = {"train_data", "held_out_data"}
_WORDS = {"encoder", "tokenizer"}
_CACHES = {"train_cache", "held_out_cache"}
_NAMES = {
  "encoder": _DATA | {"text_tokenizer"},
  "tokenizer": _DATA | {"encoder"},
  "pixels": _DATA | _WORDS,
  "autoencoder": _DATA,
  "pretrain": _DATA | _WORDS | _CACHES | {"text_tokenizer"},
}


@pytest.mark.parametrize("stage", _NAMES)
def test_every_stage_names_its_inputs(stage, micro_runs):
  objective = objectives.build(sharding_test.stage_config(stage, micro_runs))
  found = provenance.of(objective)
  assert set(found) == _NAMES[stage]
  assert len(set(found.values())) == len(found)
  assert provenance.of(objective) == found


def test_a_lora_depends_on_the_llm_it_changes(micro_runs):
  cfg = micro.config(
    "pretrain",
    micro_runs,
    model__lora=dict(rank=2, alpha=4.0),
    start_from=str(micro_runs / "model"),
  )
  found = objectives.build(cfg).provenance()
  assert found["llm"] == fingerprints.of_part(
    micro_runs / "model", "llm", "llm"
  )


def test_an_exported_part_names_its_inputs(micro_runs):
  for stage, names in _NAMES.items():
    if stage != "autoencoder":
      part = "llm" if stage == "pretrain" else stage
      meta = checkpoints.read_meta(micro_runs / "model", part)
      assert set(meta["made_of"]) == names


def _swap(path):
  first, second, *rest = path.read_text().splitlines()
  path.write_text("\n".join([second, first, *rest]))


def test_a_run_goes_on_with_what_it_began_with_or_says_so(
  micro_runs, tmp_path, caplog
):
  (root,) = micro.branch(micro_runs, tmp_path, 1)
  path = micro.images(root)

  def train(**updates):
    data = dict(data__kind="jsonl", data__path=str(path))
    cfg = micro.config("tokenizer", root, **data | updates)
    with micro.one_device():
      loop.train(cfg, root / "run", stop_at=1, quiet=True)

  train()
  train()
  _swap(path)
  with pytest.raises(errors.DataError) as caught:
    train()
  for words in ("step 1", "train_data is '", "--config.accept=", "--workdir"):
    assert words in str(caught.value)
  with caplog.at_level(logging.WARNING):
    train(accept="train_data,held_out_data")
  assert "train_data is '" in caplog.text
  _swap(path)
  train()  # as it was
  micro.perturb(root / "model", "encoder")
  with pytest.raises(errors.DataError, match=r"encoder is '\w+' there"):
    train()


def _check(stored, current, accept=""):
  found = run_checkpoints.Restored(7, None, stored)
  config = ml_collections.ConfigDict({"accept": accept})
  provenance.check(found, current, config)


def test_a_checkpoint_of_an_earlier_version_is_taken_with_a_warning(caplog):
  with caplog.at_level(logging.WARNING):
    _check({"data": {}}, {"train_data": "a"})
  assert "step 7 was made of is not known" in caplog.text


def test_an_input_of_one_side_alone_is_no_difference(caplog):
  _check({"made_of": {"train_data": "a", "old": "b"}}, {"train_data": "a"})
  _check({"made_of": {"train_data": "a"}}, {"train_data": "a", "encoder": "c"})
  _check({"made_of": {"train_data": "b"}}, {})  # another process compares
  assert not caplog.records


def _text_of(root, **meta):
  """The text tokenizer as inference reads it, of an llm with another meta."""
  path = root / "model" / "llm" / "part.json"
  stored = json.loads(path.read_text())
  path.write_text(json.dumps(stored | meta))
  return parts.text_tokenizer(root / "model")


def test_an_llm_keeps_the_text_tokenizer_it_was_trained_with(
  micro_runs, tmp_path
):
  (root,) = micro.branch(micro_runs, tmp_path, 1)
  assert _text_of(root).size == 400
  words = root / "model" / "tokenizer.model"
  # Letters exchanged: as many pieces, other words.
  letters = string.ascii_lowercase
  swapped = str.maketrans(letters, letters[1:] + letters[0])
  source = shapes.ShapesSource(size=micro.SCENES)
  sentences = kinds.sentences(source, limit=20_000)
  train = vocabulary.TextTokenizer.train
  train([text.translate(swapped) for text in sentences], words, 400)
  with pytest.raises(errors.CheckpointError, match="ids would be other words"):
    _text_of(root)
  assert _text_of(root, made_of={}).size == 400  # not recorded
  train(sentences, words, 350)
  with pytest.raises(errors.CheckpointError, match="350 pieces"):
    _text_of(root)


@pytest.mark.parametrize("stage", ["encoder", "pretrain"])
def test_a_text_tokenizer_of_another_size_is_not_taken(stage, micro_runs):
  cfg = micro.config(stage, micro_runs, data__text_vocab=300)
  with pytest.raises(
    errors.ConfigError, match=r"has 400 pieces.*data\.text_vocab is 300"
  ):
    objectives.build(cfg)
