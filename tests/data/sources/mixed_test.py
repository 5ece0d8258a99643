"""Several sources as one."""

import collections
import json

import numpy as np
import pytest
from PIL import Image

from lavit_jax.core import errors, vocabulary
from lavit_jax.data import contents, examples, sequences
from lavit_jax.data.batching import bucket_rows, pipeline
from lavit_jax.data.images import image_bytes
from lavit_jax.data.sources import kinds, mixed
from tests.data import fakes
from tests.data.indexes import tars

_WORDS = fakes.Words()
_VOCABULARY = vocabulary.Vocabulary(_WORDS.size, fakes.CODES)


@pytest.fixture
def config(tmp_path, monkeypatch):
  """config.data of JSON lines, archives and texts."""
  monkeypatch.setenv("LAVIT_INDEXES", str(tmp_path / "indexes"))
  rows = []
  for i in range(40):
    pixels = np.full((8, 8, 3), i, np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    rows.append({"image": f"{i}.png", "caption": f"picture {i}"})
  write = lambda name, rows: (tmp_path / name).write_text(
    "".join(json.dumps(row) + "\n" for row in rows)
  )
  write("own.jsonl", rows)
  write("words.jsonl", [{"text": f"text of {i} words"} for i in range(60)])
  tars.shards(tmp_path / "web", 3, samples=20)
  return {
    "image_size": 4,
    "seed": 0,
    "kind": "",
    "path": "",
    "held_out_path": "",
    "limit_share": 0.05,
    "mixture": {"image_text": 1.0, "text_image": 1.0},
    "sources": {
      "own": {"kind": "jsonl", "path": str(tmp_path / "own.jsonl")},
      "web": {
        "kind": "webdataset",
        "path": str(tmp_path / "web"),
        "weight": 2.0,
        "mixture": {"image_text": 3.0, "text_image": 1.0},
      },
      "words": {
        "kind": "jsonl",
        "path": str(tmp_path / "words.jsonl"),
        "weight": 1.0,
        "mixture": {"text": 1.0},
      },
    },
  }


def test_a_mixture_is_a_source(config):
  source, held_out = kinds.pair(config)
  assert isinstance(source, examples.Source)
  sizes = [part.source.num_images for part in source.parts]
  assert source.num_images == sum(sizes)
  assert 100 - source.num_images == held_out.num_images
  assert source.tasks() == ("image_text", "text_image", "text")
  for part, start in zip(source.parts, np.cumsum([0, *sizes]), strict=False):
    for i in range(part.source.num_images):
      assert source.image_key(start + i).startswith(f"{part.name}/")
      assert source.captions(start + i) == part.source.captions(i)
    if part.source.num_images:
      np.testing.assert_array_equal(source.image(start), part.source.image(0))
  texts = collections.Counter()
  for task in source.tasks():
    for i in range(source.num_examples(task)):
      example = source.example(task, i)
      texts[example.key.partition("/")[0]] += 1
      for part in example.parts:
        if isinstance(part, examples.ImagePart):
          (caption,) = source.captions(part.image)
          assert caption in [getattr(p, "text", None) for p in example.parts]
  assert texts["own"] == 2 * sizes[0]
  assert texts["words"] == source.num_examples("text")
  with pytest.raises(IndexError):
    source.image_key(source.num_images)


def test_digests_tell_mixtures_apart(config):
  source, held_out = kinds.pair(config)
  again, _ = kinds.pair(config)
  for digest in (examples.fingerprint, contents.of, image_bytes.of):
    assert digest(source) == digest(again) != digest(held_out)
  config["sources"]["other"] = config["sources"].pop("web")
  other, _ = kinds.pair(config)
  assert contents.of(other) != contents.of(source)
  assert "own.jsonl" in kinds.describe(config, "train", other)


def test_rows_have_each_source_in_its_share(config):
  source, _ = kinds.pair(config)
  caches = {
    part.name: fakes.Cache([3] * part.source.num_images)
    if part.source.num_images
    else None
    for part in source.parts
  }
  batches = pipeline.packed_rows(
    source,
    caches,
    _WORDS,
    _VOCABULARY,
    mixture={},
    length=64,
    slots=8,
    batch_size=4,
    window=64,
  )
  documents = collections.Counter()
  for k in range(12):
    batch = batches[k]
    for row in range(4):
      for segment in range(1, int(batch["segments"][row].max()) + 1):
        mine = batch["segments"][row] == segment
        first = batch["tokens"][row][mine][0]
        read = (batch["image_index"][row][mine] >= 0).any()
        kind = "image" if read else "text"
        if not read and first != _WORDS.encode("picture")[0]:
          kind = "words" if first == _WORDS.encode("text")[0] else "web"
        documents[kind] += 1
  progress = batches.progress(48)
  assert progress["documents"] == pytest.approx(
    sum(documents.values()), rel=0.2
  )
  epochs = [f"epoch/{name}" for name in ("own/image_text", "words/text")]
  parts = {part.name: part.source for part in source.parts}
  assert progress[epochs[0]] == pytest.approx(
    progress["documents"] / 8 / parts["own"].num_images, rel=0.05
  )
  assert progress[epochs[1]] > 0.5
  total = sum(documents.values())
  assert total > 150
  assert documents["words"] / total == pytest.approx(1 / 4, abs=0.05)
  # One of two of `own`, three of four of `web` read their image.
  assert documents["image"] / total == pytest.approx(1 / 8 + 3 / 8, abs=0.05)
  assert documents["web"] / total == pytest.approx(1 / 8, abs=0.05)


def test_single_images_are_drawn_by_weight(config):
  source, _ = kinds.pair(config)
  batches = pipeline.image_batches(source, 30, seed=0)
  index = np.concatenate([batches[k]["index"] for k in range(10)])
  own = source.parts[0].source.num_images
  assert (index < own).mean() == pytest.approx(1 / 3, abs=0.01)
  assert index.max() < source.num_images
  assert batches.progress(300)["epoch/own"] == pytest.approx(100 / own)
  once = pipeline.image_batches(source, 30)
  assert once[0]["index"].tolist() == list(range(30))


def test_batches_of_one_size_take_no_weights(config):
  del config["sources"]["words"]
  source, _ = kinds.pair(config)
  with pytest.raises(errors.ConfigError, match=r"'web': 2\.0.*same weight"):
    bucket_rows.batches(source, ((8, 8),), 4, seed=1)
  config["sources"]["web"]["weight"] = 1.0
  source, _ = kinds.pair(config)
  batches = bucket_rows.batches(source, ((8, 8),), 4, seed=1)
  assert batches[0]["valid"].all()


def test_what_is_wrong_with_a_source_is_named(config):
  config["sources"]["web"]["wieght"] = 3
  with pytest.raises(errors.ConfigError, match=r"sources.web .*'wieght'"):
    kinds.pair(config)
  del config["sources"]["web"]["wieght"]
  config["sources"]["web"] = "web"
  with pytest.raises(errors.ConfigError, match="expected the fields of a"):
    kinds.pair(config)
  config["sources"] = {"own": config["sources"]["own"] | {"image_size": 8}}
  config["sources"]["small"] = config["sources"]["own"] | {"image_size": 4}
  with pytest.raises(errors.ConfigError, match="agree on image_size"):
    kinds.pair(config)
  with pytest.raises(errors.ConfigError, match="Name a source"):
    mixed.MixedSource([])


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"weight": -1}, r"sources.web.weight=-1: expected a number"),
    ({"weight": "x"}, r"sources.web.weight='x'"),
    ({"weight": float("nan")}, r"sources.web.weight=nan"),
    ({"mixture": ["text"]}, r"sources.web.mixture=\['text'\]"),
    ({"mixture": {"text": "x"}}, r"sources.web.mixture.text='x'"),
  ],
)
def test_odd_weights_are_named(config, change, said):
  config["sources"]["web"] |= change
  with pytest.raises(errors.ConfigError, match=said):
    kinds.pair(config)


def test_odd_sources_are_named(config):
  part = config["sources"]["own"]
  for sources in ([part], "own", {"a b": part}, {3: part}):
    with pytest.raises(errors.ConfigError, match=r"config\.data\.sources"):
      kinds.pair(config | {"sources": sources})


def test_a_source_without_a_weight_need_not_be_there(config):
  config["sources"]["gone"] = {"kind": "jsonl", "path": "/no", "weight": 0}
  source, _ = kinds.pair(config)
  assert [part.name for part in source.parts] == ["own", "web", "words"]
  config["reweighted"] = {"100": {"gone": 1.0}}
  with pytest.raises(errors.DataError, match="/no"):
    kinds.pair(config)


def test_a_weight_without_a_task_is_refused(config):
  config["sources"] = {
    "words": config["sources"]["words"],
    "own": config["sources"]["own"] | {"mixture": {"image_text": 0.0}},
  }
  source, _ = kinds.pair(config)
  caches = {"words": None, "own": fakes.Cache([3] * 40)}
  with pytest.raises(errors.ConfigError, match=r"'own' has the weight 1\.0"):
    pipeline.packed_rows(
      *(source, caches, _WORDS, _VOCABULARY),
      mixture={},
      length=64,
      slots=8,
      batch_size=4,
    )


def test_sentences_come_from_every_source(config):
  source, _ = kinds.pair(config)
  texts = kinds.sentences(source, 30)
  for word in ("picture", "image", "text of"):
    assert sum(text.startswith(word) for text in texts) == 10


def test_an_example_s_codes_are_those_of_its_own_source(config):
  """Images are numbered in their part, whatever the mixture numbers them."""
  source, _ = kinds.pair(config)
  part = source.parts[1]
  cache = fakes.Cache([2] * part.source.num_images)
  example = part.source.example("text_image", 5)
  built = sequences.build(example, cache, _WORDS, _VOCABULARY)
  number = example.parts[1].image
  codes = _VOCABULARY.to_ids(cache.codes(number)).tolist()
  assert built.tokens.tolist()[-2:] == codes
