"""What is made of the recorded captions, answers and drawings; see `verify.py`.

Prompts are built, embedded, searched and drawn from as the official code does
(`infer/official.py`), so that the ids, beams and scores must come out again.

How long a search or a drawing ran, and of how many beams, is told by the sizes
of its recorded arrays: what ended before the longest length that was allowed,
or was given another, stops at the same step here. What no size tells is read
from the .json beside the arrays (`_SAID`), and is the release's default else.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax.core import vocabulary
from lavit_jax.infer.decoding import beam, decode
from lavit_jax.infer.presets import official

_EOS, _BOS = vocabulary.EOS_ID, vocabulary.BOS_ID
_SAID = {  # names of the official classes' arguments
  "num_beams": "num_beams",
  "min_length": "min_new_tokens",
  "max_length": "max_new_tokens",
  "length_penalty": "length_penalty",
}


def caption(a, parts):
  """Two images described, without a prompt and with one."""
  model = parts.model
  pixels, gumbel = _nhwc(a["in_pixels"]), a["in_gumbel"]
  recorded = json.loads((a.folder / "caption.json").read_text("utf-8"))
  image = model.prompt(model.reading_rows(pixels, gumbel))
  made = {
    "out_image_embeds": (model.embedded(image), "float"),
    "out_image_attns": (image["mask"], "exact"),
  }
  for name, row in recorded.items():  # "caption", "caption_prompt"
    suffix = name.removeprefix("caption")
    ids = [official.encode(model.text, row["prompt"])] * len(pixels)
    rows = model.reading_rows(pixels, gumbel, ids)
    settings = _settings(a, suffix, row, official.CAPTION)
    made |= _searched(a, model, rows, suffix, settings)
    if suffix:
      made["out_prompt_ids"] = np.array(ids), "exact"
  return made


def answer(a, parts):
  """A question about each of two images answered."""
  model = parts.model
  recorded = json.loads((a.folder / "vqa.json").read_text("utf-8"))
  words = [recorded["prompt"].format(q) for q in recorded["questions"]]
  ids = [official.encode(model.text, text) for text in words]
  padded = decode.left_pad(ids, pad_id=_EOS)
  pixels, gumbel = _nhwc(a["in_pixels"]), a["in_gumbel"]
  rows = model.reading_rows(pixels, gumbel, ids)
  # Images and questions are padded apart, so that rows are longer than any.
  alone = model.prompt(model.reading_rows(pixels, gumbel))
  length = alone["tokens"].shape[1] + padded["tokens"].shape[1]
  settings = _settings(a, "", recorded, official.ANSWER)
  return _searched(a, model, rows, "", settings, length) | {
    "out_prompt_ids": (padded["tokens"], "exact"),
    "out_prompt_mask": (padded["mask"], "exact"),
  }


def _nhwc(recorded):
  return jnp.asarray(recorded.transpose(0, 2, 3, 1))


def _settings(a, suffix, said, usual):
  """Of a beam search: as recorded, else as `said`, else as usual."""
  found = usual | {_SAID[n]: said[n] for n in _SAID if n in said}
  steps = a.get(f"out_step_scores{suffix}")
  if steps is not None:
    found |= {"max_new_tokens": len(steps), "num_beams": steps.shape[2] // 2}
  longest = found["max_new_tokens"]
  return found | {"min_new_tokens": min(found["min_new_tokens"], longest)}


def _searched(a, model, rows, suffix, settings, length=None):
  """Prompt, sequences, scores and the candidates of every step."""
  prompt = model.prompt(rows, length)
  found = beam.beam_search(
    model.llm,
    model.language["llm"],
    prompt=prompt,
    suppress=official.suppress_for_text(model.vocab),
    eos_id=_EOS,
    pad_id=_EOS,
    trace=True,
    **settings,
  )
  done = np.asarray(found.step_done)
  made = {
    "inputs_embeds": (model.embedded(prompt), "float"),
    "attention_mask": (prompt["mask"], "exact"),
    "sequences": (_sequences(a, f"sequences{suffix}", found, _BOS), "exact"),
    "sequences_scores": (found.scores[:, 0], "score"),
    "step_done": (done, "exact"),
  }
  for name, kind in (("scores", "float"), ("tokens", "exact")):
    made[f"step_{name}"] = _steps(a, suffix, found, name, done), kind
  made["step_beams"] = _steps(a, suffix, found, "beams", done), "exact"
  return {f"out_{name}{suffix}": value for name, value in made.items()}


def _steps(a, suffix, found, name, done):
  """Candidates of every step; those of a prompt that is done mean nothing."""
  ours = np.asarray(getattr(found, f"step_{name}"))
  theirs = a.get(f"out_step_{name}{suffix}")
  if theirs is None or ours.shape != theirs.shape:
    return ours
  return np.where(done[..., None], theirs, ours)


def _sequences(a, name, found, first):
  """Written ids behind a first column, cut to the recorded length.

  What is cut is padding; if it is not, nothing is cut, and shapes differ.
  """
  tokens = np.asarray(found.tokens)
  tokens = tokens[:, 0] if tokens.ndim == 3 else tokens
  tokens = np.insert(tokens, 0, first, axis=1)
  length = dict.__getitem__(a, f"out_{name}").shape[1]
  padding = (tokens[:, length:] == _EOS).all()
  return tokens[:, :length] if padding else tokens


def draw(a, parts):
  """Ids of images, guided and not, from texts and from token prompts."""
  model = parts.model
  recorded = json.loads((a.folder / "t2i_tokens.json").read_text("utf-8"))
  texts = [official.encode(model.text, text) for text in recorded["prompts"]]
  padded = decode.left_pad(texts, pad_id=_EOS)
  made = {
    "out_prompt_ids": (padded["tokens"], "exact"),
    "out_prompt_mask": (padded["mask"], "exact"),
  }
  mixed = []
  if "in_mm_gumbel" in a:
    mixed = _mixed_prompt(a, model, recorded)
    made |= {
      "out_mm_ids": (np.array(mixed), "exact"),
      "out_mm_max_new_tokens": (np.array(len(mixed)), "exact"),
    }
  shortest = drawing_defaults(recorded)["min_length"]
  for suffix, (rows, settings) in _cases(a, model, recorded, mixed).items():
    rows = [[*row, model.vocab.image_begin] for row in rows]
    made |= _drawn(a, model, rows, suffix, shortest=shortest, **settings)
  return made | _warped(a)


def drawing_defaults(recorded) -> dict:
  """Least length and guidance of what was drawn, by their official names.

  Args:
    recorded: the content of t2i_tokens.json; the release's where it says
      nothing.
  """
  usual = {
    "min_length": official.DRAW["min_new_tokens"],
    "guidance_scale_for_llm": official.GUIDANCE_MULTIMODAL,
  }
  return usual | recorded.get("mm_defaults", {})


def _cases(a, model, recorded, mixed):
  """{suffix: (prompts, guidance and what guides)} of what was recorded."""
  texts = [official.encode(model.text, text) for text in recorded["prompts"]]
  guided = {"guidance": official.GUIDANCE_TEXT}
  by_tokens = {"guidance": drawing_defaults(recorded)["guidance_scale_for_llm"]}
  cases = {
    "": (texts, guided),
    "_single": (texts[1:], guided),
    "_neg": (texts, guided | {"uncond": [row[-3:] for row in texts]}),
    "_nocfg": (texts, {"guidance": 1.0}),
    "_mm": ([mixed], by_tokens),
    "_mm60": ([mixed], by_tokens),
    "_tok": (None, guided),
  }
  found = {n: cases[n] for n in cases if f"out_sequences{n}" in a}
  if "_tok" in found:
    found["_tok"] = _prompts_of(a, model, "tok"), guided
  return found


def _mixed_prompt(a, model, recorded):
  """An image as codes, then text, without any mark between them."""
  size = model.config.vit.image_size
  pixels = official.preprocess(a.folder / recorded["mm_image"], size)
  ids, valid = model.codes(pixels[None], a["in_mm_gumbel"])
  words = official.encode(model.text, recorded["mm_text"])
  return [*ids[0][valid[0]].tolist(), *words]


def _prompts_of(a, model, name):
  """Token prompts that are recorded only as what they are embedded to."""
  embeds = dict.__getitem__(a, f"out_inputs_embeds_{name}")
  mask = dict.__getitem__(a, f"out_attention_mask_{name}").astype(bool)
  table = np.asarray(model.language["llm"]["embedding"])
  table = table[: model.llama_config.vocab_size]
  rows = []
  for line, used in zip(embeds, mask, strict=True):
    line = line[used][:-1]  # less [IMG]
    product = line @ table.T
    distance = np.square(table).sum(1) - 2.0 * product
    rows.append(distance.argmin(1).tolist())
  return rows


def _uncond(model, uncond, count):
  rows = uncond or [[model.vocab.image_begin]] * count
  return decode.left_pad(rows, pad_id=_EOS)


def _written(a, model, rows, suffix, *, guidance, shortest, uncond=None):
  """Greedy ids after each prompt, behind a column of [IMG].

  As many as were recorded: rows that had ended by then go on as padding, and
  those that had not were cut there.
  """
  longest = a.get(f"out_sequences{suffix}").shape[1] - 1
  found = decode.generate(
    model.llm,
    model.language["llm"],
    prompt=decode.left_pad(rows, pad_id=_EOS),
    uncond=_uncond(model, uncond, len(rows)),
    guidance_scale=guidance,
    min_new_tokens=min(shortest, longest),
    max_new_tokens=longest,
    suppress=official.suppress_for_image(model.vocab),
    eos_id=model.vocab.image_end,
    pad_id=_EOS,
  )
  return _sequences(a, f"sequences{suffix}", found, model.vocab.image_begin)


def _drawn(a, model, rows, suffix, **settings):
  """Prompt, ids, and processed scores of the first steps of one case."""
  prompt = decode.left_pad(rows, pad_id=_EOS)
  ids = _written(a, model, rows, suffix, **settings)
  made = {
    "attention_mask": (prompt["mask"], "exact"),
    "inputs_embeds": (model.embedded(prompt), "float"),
    "sequences": (ids, "exact"),
  }
  recorded = a.get(f"out_scores5{suffix}")
  if recorded is not None:
    scores = _scores(model, rows, ids[:, 1:], len(recorded), settings)
    made["scores5"] = scores[..., a["in_cols"]], "float"
  return {f"out_{name}{suffix}": value for name, value in made.items()}


def _scores(model, rows, written, steps, settings):
  """Processed scores float[steps, B, rows of the head] under written ids."""
  params, guidance = model.language["llm"], settings["guidance"]
  uncond = _uncond(model, settings.get("uncond"), len(rows))
  streams = [decode.left_pad(rows, pad_id=_EOS), uncond]
  streams = [
    decode.prefill(model.llm, params, decode.arrays_of(stream), steps)
    for stream in streams
  ]
  scalars = {
    "eos_id": model.vocab.image_end,
    "min_new_tokens": settings["shortest"],
  }
  ruled_out = decode.never_written(
    model.llama_config, official.suppress_for_image(model.vocab)
  )
  out = []
  for step in range(steps):
    plain, other = (logits for logits, _ in streams)
    scores = jax.nn.log_softmax(plain)
    if guidance != 1:
      scores = decode.guide(scores, other, guidance)
    else:
      scores = plain  # nothing is normalised where nothing guides
    out.append(decode.process(scores, step, scalars, ruled_out))
    ids = jnp.asarray(written[:, step])
    streams = [
      decode.advance(model.llm, params, ids, cache) for _, cache in streams
    ]
  return np.stack(out)


def _warped(a):
  """Logits after the filters of sampling, what they cut at -inf."""
  if "in_warp_logits" not in a:
    return {}
  logits = a["in_warp_logits"]
  cases = {
    "topk50": (1.0, 50, None),
    "topp09": (1.0, 0, 0.9),
    "t07_k50_p09": (0.7, 50, 0.9),
  }
  made = {}
  for name, (temperature, top_k, top_p) in cases.items():
    scores, ids = decode.candidates(
      jnp.asarray(logits) / np.float32(temperature), top_k, top_p
    )
    full = np.full(logits.shape, -np.inf, np.float32)
    np.put_along_axis(full, np.asarray(ids), np.asarray(scores), axis=1)
    made[f"out_warp_{name}"] = full, "float"
  return made
