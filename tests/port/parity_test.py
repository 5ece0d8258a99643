"""The class LaVIT with `parity=True`, compared with the recordings."""

import json
import os
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch", reason="imports PyTorch files")

from lavit_jax.infer import batches, pipeline
from lavit_jax.infer.loading import visual
from lavit_jax.infer.presets import official
from lavit_jax.models.tokenizer import tokenizer
from lavit_jax.port import importing

pytestmark = [
  pytest.mark.shared,
  pytest.mark.skipif(
    not os.environ.get("LAVIT_SHARED"),
    reason="needs LAVIT_SHARED, the folder with the recordings",
  ),
]
BLANK = np.zeros((8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def golden():
  return pathlib.Path(os.environ["LAVIT_SHARED"]) / "golden" / "a"


@pytest.fixture(scope="module")
def lavit(golden, tmp_path_factory):
  directory = tmp_path_factory.mktemp("parity") / "model"
  importing.run(golden / "checkpoint", directory, quiet=True)
  return pipeline.LaVIT.load(directory)


@pytest.fixture
def feed(lavit, monkeypatch):
  """Replaces pixels and noise by recorded ones."""

  def feed(gumbel, pixels=None):
    monkeypatch.setattr(
      visual,
      "gumbel_noise",
      lambda seed, shape: jnp.asarray(batches.fill(gumbel, shape[0])),
    )
    if pixels is not None:
      see = lavit.visual
      nhwc = jnp.asarray(pixels.transpose(0, 2, 3, 1))
      features = tokenizer.encode_images(see.config, see._encoder, nhwc)
      monkeypatch.setattr(
        see,
        "features",
        lambda batch: jnp.asarray(batches.fill(features, len(batch))),
      )

  return feed


def recorded(golden, name):
  with np.load(golden / f"{name}.npz") as arrays:
    arrays = dict(arrays)
  return arrays, json.loads((golden / f"{name}.json").read_text("utf-8"))


def test_captions_are_the_official_ones(lavit, golden, feed):
  arrays, wanted = recorded(golden, "caption")
  feed(arrays["in_gumbel"], arrays["in_pixels"])
  for row in wanted.values():
    prompt = row["prompt"]
    made = lavit.caption([BLANK, BLANK], prompt=prompt, parity=True)
    assert made == row["caption"]
    (whole,) = zip(
      *lavit.write([[BLANK, prompt] if prompt else [BLANK]] * 2, parity=True),
      strict=True,
    )
    assert [text.text for text in whole] == [t.strip() for t in row["decoded"]]
  name = "out_sequences_scores_prompt"
  np.testing.assert_allclose([t.score for t in whole], arrays[name], rtol=2e-4)


def test_answers_are_the_official_ones(lavit, golden, feed):
  arrays, wanted = recorded(golden, "vqa")
  feed(arrays["in_gumbel"], arrays["in_pixels"])
  answers = lavit.answer([BLANK, BLANK], wanted["questions"], parity=True)
  assert answers == wanted["answers_before_lemmatisation"]


def codes_in(lavit, sequences):
  return [lavit._llm.vocabulary.codes_of(row) for row in sequences]


def assert_same(ours, theirs):
  assert len(ours) == len(theirs)
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_array_equal(a, b)


def test_visual_tokens_are_the_official_ones(lavit, golden, feed):
  arrays, wanted = recorded(golden, "t2i_tokens")
  prompts = wanted["prompts"]
  greedy = {"temperature": 0, "parity": True}
  assert_same(
    lavit.write_codes(prompts, **greedy),
    codes_in(lavit, arrays["out_sequences"]),
  )
  assert_same(
    lavit.write_codes(prompts, guidance_scale=1, **greedy),
    codes_in(lavit, arrays["out_sequences_nocfg"]),
  )
  feed(arrays["in_mm_gumbel"])
  image = golden / wanted["mm_image"]
  assert_same(
    lavit.write_codes([[image, wanted["mm_text"]]], **greedy),
    codes_in(lavit, arrays["out_sequences_mm"]),
  )


def test_negative_prompts_are_the_official_ones(lavit, golden, monkeypatch):
  """Recorded without [IMG]; with it the image differs."""
  arrays, wanted = recorded(golden, "t2i_tokens")
  # The last three ids of each prompt, which begin in the middle of a word.
  ids = dict(zip("ab", arrays["out_prompt_ids"][:, -3:].tolist(), strict=True))
  encode = official.encode
  monkeypatch.setattr(
    official,
    "encode",
    lambda text, words: ids.get(words) or encode(text, words),
  )
  greedy = {"temperature": 0, "negative_prompts": list(ids)}
  theirs = codes_in(lavit, arrays["out_sequences_neg"])
  assert_same(
    lavit.write_codes(wanted["prompts"], parity=True, **greedy), theirs
  )
  ours = lavit.write_codes(wanted["prompts"], **greedy)
  assert [a.tolist() for a in ours] != [
    b[: lavit.visual.num_patches].tolist() for b in theirs
  ]
