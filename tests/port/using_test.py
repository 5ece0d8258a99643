import numpy as np
import pytest

from lavit_jax import errors
from lavit_jax.infer import pipeline

pytest.importorskip("torch", reason="imports PyTorch files")

from lavit_jax.port import importing
from tests.port import sources

SELECTOR = "token_predictor."


def load(root, overlay=None):
  """A LaVIT of the small official checkpoint, more laid over its tokenizer."""
  state = sources.state()
  state[sources.FILES["overlay"]] |= overlay or {}
  source = sources.write(root / "source", state)
  importing.run(source, root / "model", quiet=True)
  return pipeline.LaVIT.load(root / "model")


@pytest.fixture(scope="module")
def lavit(tmp_path_factory):
  return load(tmp_path_factory.mktemp("using"))


@pytest.fixture(scope="module")
def pictures():
  rng = np.random.default_rng(0)
  return list(rng.integers(0, 256, (3, 20, 20, 3), np.uint8))


def test_an_imported_model_tokenizes_captions_and_answers(lavit, pictures):
  for row in lavit.tokenize(pictures):
    assert row["keep"].sum() == len(row["codes"]) >= 1
  captions = lavit.caption(pictures, max_new_tokens=5)
  assert [type(words) for words in captions] == [str] * 3
  assert isinstance(lavit.answer(pictures[0], "what is it?"), str)


def test_an_imported_model_writes_visual_words(lavit, pictures):
  (codes,) = lavit.write_codes([[pictures[0], "a dog"]], max_new_tokens=4)
  assert 1 <= len(codes) <= 4
  assert codes.max() < sources.CODES


def test_what_needs_the_u_nets_is_refused(lavit, pictures):
  for draw in (
    lambda: lavit.reconstruct(pictures[0]),
    lambda: lavit.generate("a dog", max_new_tokens=2),
  ):
    with pytest.raises(errors.CheckpointError, match="lowres and highres"):
      draw()
  with pytest.raises(errors.CheckpointError, match="mean features"):
    _ = lavit.visual.feature_mean


def test_the_selector_for_reading_is_the_overlay_s(lavit, pictures, tmp_path):
  """The other one keeps all; ids still come from the tokenizer's own."""
  state = sources.state()[sources.FILES["tokenizer"]]
  overlay = {n: v for n, v in state.items() if n.startswith(SELECTOR)}
  overlay[f"{SELECTOR}out_conv.4.bias"] = np.array([99.0, -99.0], np.float32)
  other = load(tmp_path, overlay)
  sized = np.stack([np.resize(p, (12, 12, 3)) for p in pictures])
  _, valid = other._llm.read(sized)
  assert valid.all()
  _, before = lavit._llm.read(sized)
  assert not before.all()
  for ours, theirs in zip(
    lavit.tokenize(pictures), other.tokenize(pictures), strict=True
  ):
    np.testing.assert_array_equal(ours["codes"], theirs["codes"])
