import jax
import numpy as np
import PIL.Image
import pytest

from lavit_jax.core import errors
from lavit_jax.infer import pipeline, text_generation
from lavit_jax.infer.decoding import beam

pytest.importorskip("torch", reason="imports PyTorch files")

from lavit_jax.port import importing
from tests.port import sources

pytestmark = pytest.mark.slow

SELECTOR = "token_predictor."


def load(root, overlay=None):
  """Loads a small official checkpoint, with more tensors in its overlay."""
  state = sources.state()
  state[sources.FILES["overlay"]] |= overlay or {}
  source = sources.write(root / "source", state)
  importing.run(source, root / "model", quiet=True)
  return pipeline.LaVIT.load(root / "model")


@pytest.fixture(scope="module")
def lavit(tmp_path_factory):
  return load(tmp_path_factory.mktemp("using"))


@pytest.fixture(scope="module")
def images():
  rng = np.random.default_rng(0)
  return list(rng.integers(0, 256, (3, 20, 20, 3), np.uint8))


def test_an_imported_model_tokenizes_captions_and_answers(lavit, images):
  for row in lavit.tokenize(images):
    assert row["keep"].sum() == len(row["codes"]) >= 1
  captions = lavit.caption(images, max_new_tokens=5)
  assert [type(words) for words in captions] == [str] * 3
  assert isinstance(lavit.answer(images[0], "what is it?"), str)


def test_selection_is_sampled_in_parity_or_with_a_seed(lavit, images):
  """The same seed gives the same selection in both cases."""
  seeded = lavit.tokenize(images, seed=5)
  quirky = lavit.tokenize(images, seed=5, parity=True)
  for a, b in zip(seeded, quirky, strict=True):
    np.testing.assert_array_equal(a["keep"], b["keep"])
  alone = lavit.tokenize(images[2], seed=7)  # image i: seed + i
  np.testing.assert_array_equal(alone["keep"], seeded[2]["keep"])
  keeps = [lavit.tokenize(images[0], seed=s)["keep"] for s in range(6)]
  assert any((keeps[0] != keep).any() for keep in keeps)


def rows(lavit, prompt, **how):
  prompter = lavit._prompter
  return prompter.rows([prompter.parse(prompt)], **how)[0]


def test_codes_in_a_prompt_are_between_marks_except_in_parity(lavit, images):
  codes = lavit.tokenize(images[0])["codes"] + 32002
  text = lavit.text.encode("a dog")
  prompt = [images[0], "a dog"]
  assert rows(lavit, prompt, form="codes") == [32000, *codes, 32001, *text]
  assert rows(lavit, prompt, form="codes", parity=True) == [*codes, *text]
  begin, tokens, end, *rest = rows(lavit, prompt, form="continuous")
  assert (begin, end, rest) == (32000, 32001, text)
  assert tokens.shape == (len(codes), sources.LLAMA.width)


def test_special_tokens_in_a_text_are_read_in_parity_alone(lavit):
  assert 2 in rows(lavit, ["a </s>"], form="codes", parity=True)
  assert 2 not in rows(lavit, ["a </s>"], form="codes")


def test_prompts_with_several_images_are_the_same_in_a_batch(lavit, images):
  prompts = [
    [images[0], "a dog", images[1]],
    [images[2], images[0]],
    "a cat",
  ]
  negative = ["red", [images[1], "blue"], None]
  both = lavit.write_codes(prompts, negative_prompts=negative, seed=3)
  for i, (prompt, against) in enumerate(zip(prompts, negative, strict=True)):
    alone = lavit.write_codes([prompt], negative_prompts=[against], seed=3 + i)
    np.testing.assert_array_equal(alone[0], both[i])
  written = lavit.write(prompts, max_new_tokens=6, min_new_tokens=1)
  for prompt, (together,) in zip(prompts, written, strict=True):
    ((alone,),) = lavit.write([prompt], max_new_tokens=6, min_new_tokens=1)
    assert alone.text == together.text
    np.testing.assert_allclose(alone.score, together.score, rtol=1e-4)


def test_several_texts_come_with_falling_scores(lavit, images):
  ((a, b, c),) = lavit.write(
    [[images[0]]], count=3, num_beams=3, max_new_tokens=6, min_new_tokens=1
  )
  assert a.score >= b.score >= c.score
  assert len({a.text, b.text, c.text}) == 3
  with pytest.raises(errors.UsageError, match=r"num_beams=2\. Raise num_beams"):
    lavit.write([[images[0]]], count=3, num_beams=2)


@pytest.mark.parametrize("offset", [0, 1])
def test_greedy_scores_count_lengths_as_beams_do(lavit, images, offset):
  how = {"max_new_tokens": 6, "min_new_tokens": 2}
  prompter, llm = lavit._prompter, lavit._llm
  for image in images:
    row = prompter.rows([prompter.parse(image)], form="continuous")
    one = beam.beam_search(
      llm.model,
      llm.params["llm"],
      prompt=prompter.padded(row, 6),
      num_beams=1,
      suppress=text_generation._suppressed(prompter, False),
      eos_id=llm.vocabulary.eos_id,
      length_offset=offset,
      **how,
    )
    ((greedy,),) = lavit.write(
      [image], num_beams=1, length_offset=offset, **how
    )
    np.testing.assert_allclose(greedy.score, one.scores[0, 0], rtol=1e-4)


def test_unanswerable_questions_are_answered_so(lavit, images, monkeypatch):
  """The first answer decides for which questions the second is asked."""
  asked = []

  def write(prompter, rows, *args, **options):
    del prompter, args, options
    asked.append([row[1] for row in rows])
    known = {"a?": "No.", "b?": "yes, it is"}
    return [
      [text_generation.Text(known.get(row[1].split('"')[1], ""), 0.0)]
      if '"' in row[1]
      else [text_generation.Text("a dog, or not", 0.0)]
      for row in rows
    ]

  monkeypatch.setattr(text_generation, "write", write)
  answers = lavit.answer(images[0], ["a?", "b?"], answerable_first=True)
  assert answers == ["unanswerable", "a dog"]
  assert asked[1] == ["Question: b? Answer:"]


def test_an_image_in_place_of_text_is_refused(lavit, images):
  image = PIL.Image.fromarray(images[0])
  for call in (
    lambda: lavit.answer(images[0], image),
    lambda: lavit.answer(images[0], [image]),
    lambda: lavit.caption(images[0], prompt=image),
    lambda: lavit.generate(image),
    lambda: lavit.generate([images[0]]),
  ):
    with pytest.raises(errors.UsageError, match=r"text \(str\) is expected"):
      call()


def test_a_prompt_beyond_the_context_is_refused(lavit, images):
  limit = lavit._llm.model.config.max_len
  long = "a dog " * limit
  for call in (
    lambda: lavit.caption(images[0], prompt=long),
    lambda: lavit.answer(images[0], long),
    lambda: lavit.write_codes([long]),
    lambda: lavit.write_codes(["a"], negative_prompts=long),
    lambda: lavit.caption(images[0], max_new_tokens=limit),
  ):
    with pytest.raises(errors.UsageError, match=f"at most {limit} in all"):
      call()


def test_options_of_loading_are_checked(lavit):
  for bad in (
    {"dtype": "int4"},
    {"quantize": "int4"},
    {"manner": "mine"},
    {"max_batch": 0},
  ):
    with pytest.raises(errors.UsageError, match="expected"):
      pipeline.LaVIT.load(lavit.directory, **bad)
  ours = pipeline.LaVIT.load(lavit.directory, manner="ours", max_batch=2)
  assert ours.rules.caption.num_beams == 1
  assert lavit.rules.caption.num_beams == 2


def test_bfloat16_halves_the_weights_and_still_reads(lavit, images):
  half = pipeline.LaVIT.load(lavit.directory, dtype="bfloat16", max_batch=2)
  captions = half.caption(images, max_new_tokens=5, min_new_tokens=1)
  assert len(captions) == 3
  dtypes = {str(x.dtype) for x in jax.tree.leaves(half._llm.params)}
  assert dtypes == {"bfloat16"}
  codes = half.visual._variables["codebook"]["codes"]
  assert codes.dtype == np.float32


def test_int8_weights_read_and_write(lavit, images):
  small = pipeline.LaVIT.load(lavit.directory, quantize="int8")
  for name in ("embedding", "head"):
    assert small._llm.params["llm"][name].dtype == np.int8
  how = {"max_new_tokens": 5, "min_new_tokens": 1}
  ((ours,),) = lavit.write([[images[0]]], **how)
  ((rounded,),) = small.write([[images[0]]], **how)
  assert abs(rounded.score - ours.score) < 0.05 * abs(ours.score)
  (codes,) = small.write_codes([[images[0], "a dog"]], max_new_tokens=4)
  assert 1 <= len(codes) <= 4
  memory = (lavit.info()["memory"], small.info()["memory"])
  before, after = (m["caption"]["weights"]["llm"] for m in memory)
  assert after < before / 2


def test_an_imported_model_generates_visual_tokens(lavit, images):
  (codes,) = lavit.write_codes([[images[0], "a dog"]], max_new_tokens=4)
  assert 1 <= len(codes) <= 4
  assert codes.max() < sources.CODES


def test_pixels_are_refused_without_pixel_parts(lavit, images):
  for draw in (
    lambda: lavit.reconstruct(images[0]),
    lambda: lavit.generate("a dog", max_new_tokens=2),
  ):
    with pytest.raises(errors.CheckpointError, match="has no highres_pixels"):
      draw()
  with pytest.raises(errors.CheckpointError, match="mean features"):
    _ = lavit.visual.feature_mean


def test_the_selector_for_reading_comes_from_the_overlay(
  lavit, images, tmp_path
):
  """The overlay's selector keeps all patches; ids use the tokenizer's."""
  state = sources.state()[sources.FILES["tokenizer"]]
  overlay = {n: v for n, v in state.items() if n.startswith(SELECTOR)}
  overlay[f"{SELECTOR}out_conv.4.bias"] = np.array([99.0, -99.0], np.float32)
  other = load(tmp_path, overlay)
  sized = np.stack([np.resize(p, (12, 12, 3)) for p in images])
  _, valid = other._llm.read(sized)
  assert valid.all()
  _, before = lavit._llm.read(sized)
  assert not before.all()
  for ours, theirs in zip(
    lavit.tokenize(images), other.tokenize(images), strict=True
  ):
    np.testing.assert_array_equal(ours["codes"], theirs["codes"])
