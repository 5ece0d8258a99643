import itertools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.core import errors, vocabulary
from lavit_jax.infer.decoding import beam, decode
from lavit_jax.models import llama
from lavit_jax.port.tables import names

torch = pytest.importorskip("torch", reason="transformers is the judge here")
transformers = pytest.importorskip("transformers", reason="it is the judge")

VOCAB, NEW, PAD = 50, 8, 1
CONFIG = llama.LlamaConfig(
  vocab_size=VOCAB,
  width=16,
  depth=2,
  num_heads=4,
  num_kv_heads=2,
  mlp_dim=24,
  max_len=64,
)
MODEL = llama.Llama(CONFIG)
PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]


@pytest.fixture(scope="module")
def judge():
  """A random LlamaForCausalLM whose logits are spread."""
  threads = torch.get_num_threads()
  torch.set_num_threads(1)  # more only get into each other's way here
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=PAD,
  )
  model = transformers.LlamaForCausalLM(config).eval()
  with torch.no_grad():
    for weight in model.parameters():
      weight.mul_(8 if weight.ndim == 2 else 1)
    model.lm_head.weight.mul_(2)
  yield model
  torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def params(judge):
  tensors = {k: v.numpy() for k, v in judge.state_dict().items()}
  return jax.tree.map(jnp.asarray, names.to_flax(names.LLM, tensors))


def _prompts(seed):
  """Three prompts of 1 to 5 ids, one of them of 5."""
  rng = np.random.default_rng(seed)
  lengths = rng.permutation([5, *rng.integers(1, 6, 2)])
  return [rng.integers(3, VOCAB, n).tolist() for n in lengths]


def _theirs(judge, rows, max_new_tokens=NEW, embeds=None, **kwargs):
  """Tokens int[B, R, NEW] of transformers and their scores float[B, R].

  The scores are None for one beam, which is greedy decoding there.
  """
  batch = decode.left_pad(rows, length=5, pad_id=PAD)
  prompt = {"inputs": torch.from_numpy(batch["tokens"]).long()}
  if embeds is not None:
    prompt = {"inputs_embeds": torch.from_numpy(np.array(embeds))}
  with torch.inference_mode():
    out = judge.generate(
      **prompt,
      attention_mask=torch.from_numpy(batch["mask"]).long(),
      do_sample=False,
      max_new_tokens=max_new_tokens,
      pad_token_id=PAD,
      return_dict_in_generate=True,
      output_scores=True,
      **kwargs,
    )
  scores = getattr(out, "sequences_scores", None)
  if scores is not None:
    scores = scores.reshape(len(rows), -1).numpy()
  new = out.sequences[:, 5 if embeds is None else 0 :].numpy()
  room = max_new_tokens - new.shape[1]
  new = np.pad(new, ((0, 0), (0, room)), constant_values=PAD)
  return new.reshape(len(rows), -1, max_new_tokens), scores


def _ours(params, rows=PROMPTS, *, model=MODEL, **kwargs):
  defaults = {"num_beams": 3, "max_new_tokens": NEW, "eos_id": 23}
  prompt = decode.left_pad(rows, length=5, pad_id=PAD)
  kwargs = defaults | {"prompt": prompt, "pad_id": PAD} | kwargs
  kwargs.setdefault("num_return_sequences", kwargs["num_beams"])
  return beam.beam_search(model, params, **kwargs)


def _settings(num_beams):
  """15 combinations a number of beams; the rest takes turns."""
  penalties, stops = (-1.0, 0.0, 0.5, 1.0, 2.0), (True, False, "never")
  for i, (penalty, stop) in enumerate(itertools.product(penalties, stops)):
    i += 15 * num_beams
    yield {
      "length_penalty": penalty,
      "early_stopping": stop,
      "min_new_tokens": (0, 0, 0, 4)[i % 4],
      "suppress": ([7, 19, 40], None)[i % 2],
      "sequences": 1 + i % num_beams,
      "seed": i,
    }


def _greedy(params, rows):
  prompt = decode.left_pad(rows, length=5, pad_id=PAD)
  never = np.arange(VOCAB) == 2
  return decode.generate(
    MODEL,
    params,
    prompt=prompt,
    max_new_tokens=NEW,
    suppress=never,
    eos_id=2,
    pad_id=PAD,
  )


def _both(judge, params, case, num_beams):
  """One combination searched here and by transformers."""
  rows, turn = _prompts(case["seed"]), case["seed"]
  # The id that greedy decoding writes most: ends are met, early and late.
  written = np.asarray(_greedy(params, rows).tokens)[:, turn % 3 :]
  eos = int(np.bincount(written.ravel()).argmax())
  same = {
    name: case[name]
    for name in ("length_penalty", "early_stopping", "min_new_tokens")
  }
  ours = _ours(
    params,
    rows,
    num_beams=num_beams,
    eos_id=eos,
    suppress=np.isin(np.arange(VOCAB), case["suppress"] or []),
    trace=True,
    **same,
  )
  if num_beams == 1:  # there it is greedy decoding and warns of these
    del same["length_penalty"], same["early_stopping"]
  theirs = _theirs(
    judge,
    rows,
    num_beams=num_beams,
    eos_token_id=eos,
    suppress_tokens=case["suppress"],
    num_return_sequences=case["sequences"],
    **same,
  )
  return ours, theirs


@pytest.mark.parametrize("num_beams", [1, 2, 3, 4, 5])
def test_ids_and_scores_are_those_of_transformers(judge, params, num_beams):
  ended = stopped = 0
  for case in _settings(num_beams):
    ours, (tokens, scores) = _both(judge, params, case, num_beams)
    asked = slice(case["sequences"])
    np.testing.assert_array_equal(
      ours.tokens[:, asked], tokens, err_msg=str(case)
    )
    if scores is not None:
      np.testing.assert_allclose(
        ours.scores[:, asked], scores, rtol=1e-5, atol=1e-5
      )
    ended += (ours.lengths < NEW).sum()
    stopped += ours.step_done[-1].sum()
  # The combinations do reach ends and the rules that stop a search early.
  assert ended >= 10
  assert stopped >= 5


def test_one_beam_is_greedy_decoding_here_and_in_transformers(judge, params):
  rows = _prompts(1)
  greedy = _greedy(params, rows)
  np.testing.assert_array_equal(
    greedy.tokens, _theirs(judge, rows, suppress_tokens=[2])[0][:, 0]
  )
  never = np.arange(VOCAB) == 2
  one = _ours(params, rows, num_beams=1, suppress=never, eos_id=2, trace=True)
  np.testing.assert_array_equal(one.tokens[:, 0], greedy.tokens)
  np.testing.assert_allclose(
    one.scores[:, 0] * NEW, greedy.sum_logprobs, rtol=1e-5
  )


def test_fewer_sequences_are_the_first_of_all(params):
  whole, part = _ours(params), _ours(params, num_return_sequences=2)
  assert part.tokens.shape == (3, 2, NEW)
  for ours, expected in zip(part[:3], whole[:3], strict=True):
    np.testing.assert_array_equal(ours, expected[:, :2])
  assert (np.diff(whole.scores) <= 0).all()


_forward = jax.jit(lambda p, t: MODEL.apply({"params": p}, t))


def _logprobs(params, ids):
  """Log-probabilities float[V] after one sequence, without a cache."""
  padded = np.zeros((1, 16), np.int32)
  padded[0, : len(ids)] = ids
  logits = _forward(params, padded)[0, len(ids) - 1, :VOCAB]
  return np.asarray(jax.nn.log_softmax(logits), np.float64)


def _in_lists(
  params, row, num_beams, penalty, stop, eos, min_new_tokens, offset
):
  """The rule of transformers 4.33.2 in plain Python.

  Returns [(score, ids), ...] and how many steps it took.
  """
  beams, kept = [(0.0, ())], []
  for step in range(NEW):
    found = []
    for total, ids in beams:
      logprobs = _logprobs(params, [*row, *ids])
      logprobs[eos] = -np.inf if step < min_new_tokens else logprobs[eos]
      found += [(total + logprobs[i], (*ids, i)) for i in range(VOCAB)]
    found = sorted(found, reverse=True)[: 2 * num_beams]
    ends = [(total, ids) for total, ids in found[:num_beams] if ids[-1] == eos]
    # The eos does not count; the tokens of the prompt do.
    kept += [(total / (offset + step) ** penalty, ids) for total, ids in ends]
    kept = sorted(kept, reverse=True)[:num_beams]
    beams = [(t, ids) for t, ids in found if ids[-1] != eos][:num_beams]
    reach = NEW if stop == "never" and penalty > 0 else step + 1
    bound = found[0][0] / (offset + reach) ** penalty
    full = len(kept) == num_beams
    if full and (stop is True or kept[-1][0] >= bound):
      return kept, step + 1
  kept += [(total / (offset + NEW) ** penalty, ids) for total, ids in beams]
  return sorted(kept, reverse=True)[:num_beams], NEW


@pytest.mark.parametrize("offset", [1, 5])
def test_an_offset_gives_the_rule_of_transformers_4(params, offset):
  differ = 0
  for case in _settings(3):
    rows, penalty = _prompts(case["seed"]), case["length_penalty"]
    stop, least = case["early_stopping"], case["min_new_tokens"]
    written = np.asarray(_greedy(params, rows).tokens)
    eos = int(np.bincount(written.ravel()).argmax())
    ours, other = (
      _ours(
        params,
        rows,
        length_penalty=penalty,
        early_stopping=stop,
        min_new_tokens=least,
        eos_id=eos,
        length_offset=counted,
        trace=True,
      )
      for counted in (offset, 0)
    )
    for i, row in enumerate(rows):
      kept, steps = _in_lists(params, row, 3, penalty, stop, eos, least, offset)
      assert list(ours.step_done[:, i]) == [t >= steps for t in range(NEW)]
      for j, (score, ids) in enumerate(kept):
        ids = list(ids) + [PAD] * (NEW - len(ids))
        assert list(ours.tokens[i, j]) == ids, case
        np.testing.assert_allclose(ours.scores[i, j], score, rtol=1e-5)
    differ += not np.allclose(ours.scores, other.scores, rtol=1e-3)
  assert differ >= 10


def test_candidates_of_all_steps_lead_to_what_is_returned(params):
  out = jax.tree.map(np.asarray, _ours(params, trace=True, length_penalty=0.5))
  assert out.step_scores.shape == (NEW, 3, 6)
  assert (np.diff(out.step_scores) <= 0).all()
  for row in range(3):
    beams, found = [()] * 3, {}
    for step in range(NEW):
      if out.step_done[step, row]:
        break
      new = [
        ((*beams[beam], int(token)), score)
        for beam, token, score in zip(
          out.step_beams[step, row],
          out.step_tokens[step, row],
          out.step_scores[step, row],
          strict=True,
        )
      ]
      found |= dict(new)
      beams = [ids for ids, _ in new if ids[-1] != 23][:3]
    for tokens, length, score in zip(*(x[row] for x in out[:3]), strict=True):
      total = found[tuple(tokens[:length])]
      np.testing.assert_allclose(score, total / length**0.5, rtol=1e-5)
  plain = _ours(params, length_penalty=0.5)
  assert plain.step_scores is None
  np.testing.assert_array_equal(plain.tokens, out.tokens)


def _agree(ours, theirs):
  np.testing.assert_array_equal(ours.tokens, theirs[0])
  np.testing.assert_allclose(ours.scores, theirs[1], rtol=1e-5, atol=1e-5)


def test_a_long_search_moves_the_whole_history_of_a_beam(judge, params):
  long = {"max_new_tokens": 29, "num_beams": 4}
  for eos, penalty in ((2, 1.0), (5, 0.0), (44, 2.0)):
    ours = _ours(params, **long, eos_id=eos, length_penalty=penalty, trace=True)
    theirs = _theirs(
      judge,
      PROMPTS,
      **long,
      num_return_sequences=4,
      eos_token_id=eos,
      length_penalty=penalty,
    )
    _agree(ours, theirs)
    # The beams do change places, and their histories differ by many tokens.
    assert (np.asarray(ours.step_beams[:, :, :4]) != np.arange(4)).mean() > 0.3


def test_continuous_prompts_equal_their_ids_here_and_there(judge, params):
  prompt = decode.left_pad(PROMPTS, length=5)
  use = prompt["mask"] & (prompt["tokens"] % 2 == 0)
  embeds = np.asarray(params["embedding"])[prompt["tokens"]]
  mixed = {
    "tokens": np.where(use, 3, prompt["tokens"]),
    "mask": prompt["mask"],
    "embeds": embeds,
    "use_embeds": use,
  }
  ours, expected = _ours(params, prompt=mixed), _ours(params)
  np.testing.assert_array_equal(ours.tokens, expected.tokens)
  np.testing.assert_allclose(ours.scores, expected.scores, rtol=1e-5)
  kwargs = {"num_beams": 3, "num_return_sequences": 3, "eos_token_id": 23}
  _agree(ours, _theirs(judge, PROMPTS, embeds=embeds, **kwargs))


_SHAPES = []


class _Seen(llama.Llama):
  """Notes in `_SHAPES` with what shapes Python traces the model."""

  def __call__(self, tokens, **kwargs):
    _SHAPES.append(tokens.shape)
    return super().__call__(tokens, **kwargs)


def test_a_prompt_is_read_once_and_one_compile_serves_all_settings(params):
  model = _Seen(CONFIG)
  _ours(params, model=model)
  assert set(_SHAPES) == {(3, 5), (9, 1)}  # the beams come after it
  _SHAPES.clear()
  for changes in (
    {"length_penalty": 0.0, "early_stopping": True, "eos_id": 7},
    {"early_stopping": "never", "length_offset": 1, "min_new_tokens": 3},
    {"suppress": np.arange(VOCAB) < 9, "pad_id": 0},
  ):
    _ours(params, [[3], [4, 5], [6]], model=model, **changes)
  assert not _SHAPES
  _ours(params, model=model, max_new_tokens=2)
  assert _SHAPES  # it does remember


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"num_beams": 0}, "num_beams=0"),
    ({"num_return_sequences": 4}, "num_return_sequences=4"),
    ({"num_return_sequences": 0}, "num_return_sequences=0"),
    ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ({"max_new_tokens": 60}, "5 tokens and max_new_tokens=60 do not fit"),
    ({"early_stopping": "always"}, "early_stopping='always'"),
    ({"length_offset": -1}, "length_offset=-1"),
    ({"temperature": 0.5, "top_k": 3}, "takes no temperature, top_k"),
    ({"guidance_scale": 2.0}, "takes no guidance_scale"),
  ],
)
def test_arguments_that_do_not_fit_are_refused(params, changes, message):
  with pytest.raises(errors.UsageError, match=message):
    _ours(params, **changes)


@pytest.fixture(scope="module")
def official():
  if "LAVIT_SHARED" not in os.environ:
    pytest.skip("LAVIT_SHARED is not set: golden captions and answers")
  root = pathlib.Path(os.environ["LAVIT_SHARED"]) / "golden/a"
  path = root / "checkpoint/language_model/pytorch_model.bin"
  tensors = torch.load(path, weights_only=True)
  tensors = {name: tensor.numpy() for name, tensor in tensors.items()}
  config = llama.LlamaConfig(
    vocab_size=48386,
    width=32,
    depth=2,
    num_heads=4,
    num_kv_heads=4,
    mlp_dim=86,
  )
  params = jax.tree.map(jnp.asarray, names.to_flax(names.LLM, tensors))
  return root, llama.Llama(config), params


_CAPTION = {"num_beams": 2, "min_new_tokens": 8, "max_new_tokens": 36}
_ANSWER = {
  "num_beams": 5,
  "min_new_tokens": 2,
  "max_new_tokens": 10,
  "length_penalty": 0.0,
  "early_stopping": True,
}


@pytest.mark.shared
@pytest.mark.parametrize(
  ("file", "case", "settings"),
  [
    ("caption", "", _CAPTION),
    ("caption", "_prompt", _CAPTION),
    ("vqa", "", _ANSWER),
  ],
)
def test_beams_are_the_official_ones_at_every_step(
  official, file, case, settings
):
  root, model, params = official
  with np.load(root / f"{file}.npz") as arrays:
    data = {
      name: arrays[f"out_{name}{case}"]
      for name in (
        "attention_mask",
        "inputs_embeds",
        "sequences",
        "sequences_scores",
        "step_scores",
        "step_tokens",
        "step_beams",
        "step_done",
      )
    }
  mask = data["attention_mask"].astype(bool)
  out = beam.beam_search(
    model,
    params,
    prompt={
      "tokens": np.zeros(mask.shape, np.int32),
      "mask": mask,
      "embeds": data["inputs_embeds"],
      "use_embeds": mask,
    },
    suppress=vocabulary.Vocabulary(32000, 16384).suppress_for_text(),
    eos_id=vocabulary.EOS_ID,
    pad_id=vocabulary.EOS_ID,
    length_offset=1,
    trace=True,
    **settings,
  )
  sequences = data["sequences"][:, 1:]  # less the bos
  width = sequences.shape[1]
  np.testing.assert_array_equal(out.tokens[:, 0, :width], sequences)
  assert (out.tokens[:, 0, width:] == vocabulary.EOS_ID).all()
  scores = data["sequences_scores"]
  assert np.abs(out.scores[:, 0] - scores).max() <= 2e-4
  done = data["step_done"].astype(bool)
  np.testing.assert_array_equal(out.step_done, done)
  for name in ("tokens", "beams"):
    ours = np.asarray(getattr(out, f"step_{name}"))
    np.testing.assert_array_equal(ours[~done], data[f"step_{name}"][~done])
  ours, theirs = np.asarray(out.step_scores), data["step_scores"]
  assert (np.abs(ours - theirs) <= 1e-4 * np.abs(theirs))[~done].all()
