"""Checks of recorded captions, answers and generated images; see `verify.py`.

Prompts are built, embedded, searched and sampled from as in the official code
(`infer/presets/official.py`), so that ids, beams and scores must be the same.

The sizes of the recorded arrays show how many steps a search ran and with how
many beams. It runs as many here, also where it ended before the maximum length
or was recorded with another one. Settings that no size shows are read from the
.json of the same name (`_SETTINGS`); the release's defaults replace missing
ones.
"""

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax.core import vocabulary
from lavit_jax.infer.decoding import beam, decode, scoring
from lavit_jax.infer.presets import official
from lavit_jax.port.verify import results

# Two programs for all steps of all cases, in place of one for each operation.
_prefill = jax.jit(decode.prefill, static_argnums=(0, 3))
_advance = jax.jit(decode.advance, static_argnums=0)
_EOS, _BOS = vocabulary.EOS_ID, vocabulary.BOS_ID
_SETTINGS = {  # arguments of the official classes, and their names here
  "num_beams": "num_beams",
  "min_length": "min_new_tokens",
  "max_length": "max_new_tokens",
  "length_penalty": "length_penalty",
}


def _caption(arrays, parts) -> results.Results:
  """Checks captions of two images, without a prompt and with one."""
  model = parts.model
  pixels, gumbel = results.nhwc(arrays["in_pixels"]), arrays["in_gumbel"]
  recorded = json.loads((arrays.folder / "caption.json").read_text("utf-8"))
  image = model.prompt(model.reading_rows(pixels, gumbel))
  checked = results.floats(image_embeds=model.embedded(image))
  checked |= results.exact(image_attns=image["mask"])
  for name, row in recorded.items():  # "caption", "caption_prompt"
    suffix = name.removeprefix("caption")
    ids = [official.encode(model.text, row["prompt"])] * len(pixels)
    rows = model.reading_rows(pixels, gumbel, ids)
    settings = _settings(arrays, suffix, row, official.CAPTION)
    checked |= _search(arrays, model, rows, suffix, settings)
    if suffix:
      checked |= results.exact(prompt_ids=np.array(ids))
  return checked


def _answer(arrays, parts) -> results.Results:
  """Checks answers to a question about each of two images."""
  model = parts.model
  recorded = json.loads((arrays.folder / "vqa.json").read_text("utf-8"))
  prompts = [recorded["prompt"].format(q) for q in recorded["questions"]]
  ids = [official.encode(model.text, prompt) for prompt in prompts]
  padded = decode.left_pad(ids, pad_id=_EOS)
  pixels, gumbel = results.nhwc(arrays["in_pixels"]), arrays["in_gumbel"]
  rows = model.reading_rows(pixels, gumbel, ids)
  # The official code pads images and questions apart: rows are longer than any.
  image = model.prompt(model.reading_rows(pixels, gumbel))
  length = image["tokens"].shape[1] + padded["tokens"].shape[1]
  settings = _settings(arrays, "", recorded, official.ANSWER)
  checked = _search(arrays, model, rows, "", settings, length)
  return checked | results.exact(
    prompt_ids=padded["tokens"], prompt_mask=padded["mask"]
  )


def _settings(arrays, suffix, described, defaults):
  """Returns the settings of a recorded beam search.

  Args:
    arrays: recorded; their sizes take precedence.
    suffix: of the arrays' names.
    described: settings in the .json, which come next.
    defaults: of the release.
  """
  settings = defaults | {
    here: described[name]
    for name, here in _SETTINGS.items()
    if name in described
  }
  steps = arrays.get(f"out_step_scores{suffix}")
  if steps is not None:
    settings |= {"max_new_tokens": len(steps), "num_beams": steps.shape[2] // 2}
  least, most = settings["min_new_tokens"], settings["max_new_tokens"]
  return settings | {"min_new_tokens": min(least, most)}


def _search(
  arrays, model, rows, suffix, settings, length=None
) -> results.Results:
  """Checks prompt, sequences, scores and the candidates of every step."""
  prompt = model.prompt(rows, length)
  output = beam.beam_search(
    model.llm,
    model.language["llm"],
    prompt=prompt,
    suppress=official.suppress_for_text(model.vocab),
    eos_id=_EOS,
    pad_id=_EOS,
    trace=True,
    **settings,
  )
  done = np.asarray(output.step_done)
  checked = {
    "inputs_embeds": (model.embedded(prompt), "float"),
    "attention_mask": (prompt["mask"], "exact"),
    "sequences": (
      _sequences(arrays, f"sequences{suffix}", output, _BOS),
      "exact",
    ),
    "sequences_scores": (output.scores[:, 0], "score"),
    "step_done": (done, "exact"),
  }
  for name, kind in (("scores", "float"), ("tokens", "exact")):
    checked[f"step_{name}"] = _steps(arrays, suffix, output, name, done), kind
  checked["step_beams"] = _steps(arrays, suffix, output, "beams", done), "exact"
  return {f"out_{name}{suffix}": value for name, value in checked.items()}


def _steps(arrays, suffix, output, name, done):
  """Returns the candidates of every step.

  Those of a prompt that is done have no meaning, so the recorded ones are
  returned.
  """
  here = np.asarray(getattr(output, f"step_{name}"))
  recorded = arrays.get(f"out_step_{name}{suffix}")
  if recorded is None or here.shape != recorded.shape:
    return here
  return np.where(done[..., None], recorded, here)


def _sequences(arrays, name, output, first):
  """Returns generated ids after a first column, cut to the recorded length.

  Only padding is cut; otherwise nothing is, so that shapes differ.
  """
  tokens = np.asarray(output.tokens)
  tokens = tokens[:, 0] if tokens.ndim == 3 else tokens
  tokens = np.insert(tokens, 0, first, axis=1)
  length = arrays[f"out_{name}"].shape[1]
  is_padding = (tokens[:, length:] == _EOS).all()
  return tokens[:, :length] if is_padding else tokens


def _image_ids(arrays, parts) -> results.Results:
  """Checks ids of images, guided and not, from texts and token prompts."""
  model = parts.model
  recorded = json.loads((arrays.folder / "t2i_tokens.json").read_text("utf-8"))
  texts = [official.encode(model.text, text) for text in recorded["prompts"]]
  padded = decode.left_pad(texts, pad_id=_EOS)
  checked = results.exact(
    prompt_ids=padded["tokens"], prompt_mask=padded["mask"]
  )
  mixed: list[int] = []
  if "in_mm_gumbel" in arrays:
    mixed = _mixed_prompt(arrays, model, recorded)
    checked |= results.exact(
      mm_ids=np.array(mixed), mm_max_new_tokens=np.array(len(mixed))
    )
  least = image_defaults(recorded)["min_length"]
  cases = _cases(arrays, model, recorded, mixed)
  for suffix, (rows, settings) in cases.items():
    rows = [[*row, model.vocab.image_begin] for row in rows]
    checked |= _check_case(
      arrays, model, rows, suffix, min_new_tokens=least, **settings
    )
  return checked | _warped(arrays)


def image_defaults(recorded: Mapping[str, Any]) -> dict[str, Any]:
  """Returns minimum length and guidance of images, by their official names.

  Args:
    recorded: the content of t2i_tokens.json. The release's defaults replace
      missing fields.
  """
  defaults = {
    "min_length": official.DRAW["min_new_tokens"],
    "guidance_scale_for_llm": official.GUIDANCE_MULTIMODAL,
  }
  return defaults | recorded.get("mm_defaults", {})


def _cases(arrays, model, recorded, mixed):
  """Returns {suffix: (prompts, settings of guidance)} of what was recorded."""
  texts = [official.encode(model.text, text) for text in recorded["prompts"]]
  guided = {"guidance": official.GUIDANCE_TEXT}
  by_tokens = {"guidance": image_defaults(recorded)["guidance_scale_for_llm"]}
  cases = {
    "": (texts, guided),
    "_single": (texts[1:], guided),
    "_neg": (texts, guided | {"uncond": [row[-3:] for row in texts]}),
    "_nocfg": (texts, {"guidance": 1.0}),
    "_mm": ([mixed], by_tokens),
    "_mm60": ([mixed], by_tokens),
    "_tok": (None, guided),
  }
  recorded_cases = {n: cases[n] for n in cases if f"out_sequences{n}" in arrays}
  if "_tok" in recorded_cases:
    recorded_cases["_tok"] = _token_prompts(arrays, model, "tok"), guided
  return recorded_cases


def _mixed_prompt(arrays, model, recorded):
  """Returns ids of an image, then of a text, without a mark between them."""
  size = model.config.vit.image_size
  pixels = official.preprocess(arrays.folder / recorded["mm_image"], size)
  ids, valid = model.codes(pixels[None], arrays["in_mm_gumbel"])
  text_ids = official.encode(model.text, recorded["mm_text"])
  return [*ids[0][valid[0]].tolist(), *text_ids]


def _token_prompts(arrays, model, name):
  """Returns ids of prompts that are recorded only as embeddings."""
  embeds = arrays[f"out_inputs_embeds_{name}"]
  mask = arrays[f"out_attention_mask_{name}"].astype(bool)
  table = np.asarray(model.language["llm"]["embedding"])
  table = table[: model.llama_config.vocab_size]
  rows = []
  for row, used in zip(embeds, mask, strict=True):
    product = row[used][:-1] @ table.T  # without [IMG]
    distance = np.square(table).sum(1) - 2.0 * product
    rows.append(distance.argmin(1).tolist())
  return rows


def _uncond(model, uncond, count):
  rows = uncond or [[model.vocab.image_begin]] * count
  return decode.left_pad(rows, pad_id=_EOS)


def _generate(
  arrays, model, rows, suffix, *, guidance, min_new_tokens, uncond=None
):
  """Returns greedy ids after each prompt, with a first column of [IMG].

  They are as many as were recorded: ended rows continue with padding, and the
  others are cut there.
  """
  longest = arrays[f"out_sequences{suffix}"].shape[1] - 1
  output = decode.generate(
    model.llm,
    model.language["llm"],
    prompt=decode.left_pad(rows, pad_id=_EOS),
    uncond=_uncond(model, uncond, len(rows)),
    guidance_scale=guidance,
    min_new_tokens=min(min_new_tokens, longest),
    max_new_tokens=longest,
    suppress=official.suppress_for_image(model.vocab),
    eos_id=model.vocab.image_end,
    pad_id=_EOS,
  )
  return _sequences(
    arrays, f"sequences{suffix}", output, model.vocab.image_begin
  )


def _check_case(arrays, model, rows, suffix, **settings) -> results.Results:
  """Checks prompt, ids, and processed scores of the first steps of a case."""
  prompt = decode.left_pad(rows, pad_id=_EOS)
  ids = _generate(arrays, model, rows, suffix, **settings)
  checked = {
    "attention_mask": (prompt["mask"], "exact"),
    "inputs_embeds": (model.embedded(prompt), "float"),
    "sequences": (ids, "exact"),
  }
  recorded = arrays.get(f"out_scores5{suffix}")
  if recorded is not None:
    scores = _scores(model, rows, ids[:, 1:], len(recorded), settings)
    checked["scores5"] = scores[..., arrays["in_cols"]], "float"
  return {f"out_{name}{suffix}": value for name, value in checked.items()}


def _scores(model, rows, written, steps, settings):
  """Returns processed scores float[steps, B, V] before each of the ids.

  Args:
    model: official networks.
    rows: ids of the prompts.
    written: int[B, L] ids after the prompts.
    steps: number of ids to score.
    settings: of the case.
  """
  params, guidance = model.language["llm"], settings["guidance"]
  uncond = _uncond(model, settings.get("uncond"), len(rows))
  streams = [decode.left_pad(rows, pad_id=_EOS), uncond]
  streams = [
    _prefill(model.llm, params, decode.arrays_of(stream), steps)
    for stream in streams
  ]
  scalars = {
    "eos_id": model.vocab.image_end,
    "min_new_tokens": settings["min_new_tokens"],
  }
  ruled_out = scoring.suppressed_ids(
    model.llama_config, official.suppress_for_image(model.vocab)
  )
  out = []
  for step in range(steps):
    plain, other = (logits for logits, _ in streams)
    scores = jax.nn.log_softmax(plain)
    if guidance != 1:
      scores = scoring.guide(scores, other, guidance)
    else:
      scores = plain  # the official code normalizes only with guidance
    out.append(scoring.process(scores, step, scalars, ruled_out))
    ids = jnp.asarray(written[:, step])
    streams = [_advance(model.llm, params, ids, cache) for _, cache in streams]
  return np.stack(out)


def _warped(arrays):
  """Checks logits after the filters of sampling, with -inf where they cut."""
  if "in_warp_logits" not in arrays:
    return {}
  logits = arrays["in_warp_logits"]
  cases = {
    "topk50": (1.0, 50, None),
    "topp09": (1.0, 0, 0.9),
    "t07_k50_p09": (0.7, 50, 0.9),
  }
  checked: results.Results = {}
  for name, (temperature, top_k, top_p) in cases.items():
    scores, ids = scoring.candidates(
      jnp.asarray(logits) / np.float32(temperature), top_k, top_p
    )
    full = np.full(logits.shape, -np.inf, np.float32)
    np.put_along_axis(full, np.asarray(ids), np.asarray(scores), axis=1)
    checked[f"out_warp_{name}"] = full, "float"
  return checked


CHECKS = {
  "caption": _caption,
  "vqa": _answer,
  "t2i_tokens": _image_ids,
}
