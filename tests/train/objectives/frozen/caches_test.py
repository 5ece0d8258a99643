"""Code caches, held to a run's data and to its tokenizer."""

import logging
import random

import numpy as np
import pytest

from lavit_jax.core import errors, image_io
from lavit_jax.core.storage import checkpoints
from lavit_jax.jobs import tokenize
from lavit_jax.train import objectives
from tests import micro


@pytest.fixture(scope="module")
def made(micro_codes, tmp_path_factory):
  """A root with a model, my.jsonl and its caches."""
  folder = tmp_path_factory.mktemp("caches")
  (root,) = micro.branch(micro_codes, folder, 1)
  path = micro.images(root)
  summary = tokenize.write_caches(
    root / "model", str(path), root / "mine", quiet=True
  )
  counts = [summary[split]["images"] for split in ("train", "held_out")]
  assert sum(counts) == micro.SCENES
  assert min(counts) > 0
  return root


@pytest.fixture
def root(made, tmp_path):
  (root,) = micro.branch(made, tmp_path, 1)
  for path in [*made.glob("*.png"), made / "my.jsonl"]:
    (root / path.name).write_bytes(path.read_bytes())
  return root


def _config(root, made, **updates):
  mine = made / "mine"
  data = dict(
    data__kind="jsonl",
    data__path=str(root / "my.jsonl"),
    data__cache_dir=str(mine / "train"),
    data__held_out_cache_dir=str(mine / "held_out"),
    data__mixture=dict(image_text=1.0, text_image=1.0),
  )
  return micro.config("pretrain", root, **data | updates)


def _shuffle(root):
  lines = (root / "my.jsonl").read_text().splitlines()
  random.Random(1).shuffle(lines)
  (root / "my.jsonl").write_text("\n".join(lines))


def _rename(root):
  text = (root / "my.jsonl").read_text()
  (root / "other.png").write_bytes((root / "0.png").read_bytes())
  for number in range(micro.SCENES):  # one of each half, whichever it is
    text = text.replace(f'"{number}.png"', f'"./x/../{number}a.png"')
    (root / f"{number}a.png").write_bytes((root / "0.png").read_bytes())
  (root / "my.jsonl").write_text(text)


def _repaint(root):
  for path in root.glob("*.png"):
    image_io.to_pil(255 - np.asarray(image_io.load(path))).save(path)


_CHANGES = {
  "pixels": (_repaint, "train_cache.pictures"),
  "order": (_shuffle, "train_cache.source"),
  "names": (_rename, "train_cache.source"),
  "tokenizer": (
    lambda root: micro.perturb(root / "model", "tokenizer"),
    "train_cache.tokenizer",
  ),
  "encoder": (
    lambda root: micro.perturb(root / "model", "encoder"),
    "train_cache.tokenizer",
  ),
}


@pytest.mark.parametrize("name", _CHANGES)
def test_a_cache_of_others_is_refused_and_what_differs_named(name, root, made):
  change, said = _CHANGES[name]
  change(root)
  with pytest.raises(errors.DataError) as caught:
    objectives.build(_config(root, made))
  assert f"{said} is '" in str(caught.value)
  assert "lavit tokenize --model" in str(caught.value)


def test_a_cache_of_these_is_used_and_known_by_the_run(root, made):
  objective = objectives.build(_config(root, made))
  found = objective.provenance()
  assert found["train_cache"] != found["held_out_cache"]
  next(objective.batches(0))


def test_another_tokenizer_can_be_meant(root, made, caplog):
  micro.perturb(root / "model", "tokenizer")
  accept = "train_cache.tokenizer,held_out_cache.tokenizer"
  with caplog.at_level(logging.WARNING):
    objectives.build(_config(root, made, accept=accept))
  assert "train_cache.tokenizer is" in caplog.text


def test_of_which_part_of_a_file_a_cache_is_stands_in_the_message(
  root, made, caplog
):
  """A tenth is held out, unless the run names a file of held-out images."""
  path = str(root / "my.jsonl")
  with pytest.raises(errors.DataError) as caught:
    objectives.build(_config(root, made, data__held_out_path=path))
  there = "train, nine tenths by hash, of my.jsonl: "
  assert there in str(caught.value)
  assert f"all of my.jsonl: {micro.SCENES} images of 48" in str(caught.value)
  assert "held-out numbers say nothing" in caplog.text
  assert f"--data {path} --held-out {path}" in str(caught.value), "way out"


def test_a_tokenizer_of_another_encoder_is_refused(root, made):
  """As part.json of the tokenizer says which it was trained on."""
  objective = objectives.build(_config(root, made))
  micro.perturb(root / "model", "encoder")
  with pytest.raises(errors.CheckpointError, match=r"trained on.*encoder is '"):
    objective.provenance()
  meta = checkpoints.read_meta(root / "model", "tokenizer")
  assert set(meta["made_of"]) == {"train_data", "held_out_data", "encoder"}


def test_a_share_of_bad_images_is_judged_however_few_there_are(root, tmp_path):
  """Too few to be judged as they come: all of them, before the cache is."""
  for path in sorted(root.glob("*.png"))[::2]:
    path.write_bytes(path.read_bytes()[:60])
  given = root / "model", str(root / "my.jsonl"), tmp_path / "codes"
  with pytest.raises(errors.DataError, match="images are unusable"):
    tokenize.write_caches(*given, quiet=True)
  assert not (tmp_path / "codes" / "train").exists()
  summary = tokenize.write_caches(
    *given, quiet=True, fields={"limit_share": 0.9}
  )
  assert summary["train"]["bad"]
