"""Checks of the recorded strings; see `verify.py`.

Each check takes the parsed .json, the directory and the parts of the model, and
returns {name: (our list, the recorded list)}.
"""

from typing import Any

import numpy as np

from lavit_jax.core import vocabulary
from lavit_jax.infer.presets import official

_SPECIAL_NAMES = ("<unk>", "<s>", "</s>")


_Lists = dict[str, tuple[list[Any], list[Any]]]


def _questions(recorded, folder, parts) -> _Lists:
  del folder, parts
  checked: _Lists = {}
  for name, rows in recorded.items():  # "max_words_50"
    max_words = int(name.rsplit("_", 1)[1])
    checked[name] = (
      [official.clean_question(row["input"], max_words) for row in rows],
      [row["output"] for row in rows],
    )
  return checked


def _postprocess(recorded, folder, parts) -> _Lists:
  del folder, parts
  rules = {
    "caption": official.clean_caption,
    "answer_before_lemmatisation": official.clean_answer,
  }
  return {
    name: (
      [rule(row["decoded"]) for row in recorded],
      [row[name] for row in recorded],
    )
    for name, rule in rules.items()
  }


def _tokenizer(recorded, folder, parts) -> _Lists:
  """Checks encoding with and without <s>, decoding, and left padding."""
  del folder
  text = parts.text
  encoded, decoded = recorded["encode"], recorded["decode"]
  padded = recorded["left_padded"]
  rows = [official.encode(text, string) for string in padded["texts"]]
  longest = max(map(len, rows))
  pads = [longest - len(row) for row in rows]
  eos, bos = vocabulary.EOS_ID, vocabulary.BOS_ID
  ids = [official.encode(text, row["text"]) for row in encoded]
  return {
    "encode": (ids, [row["ids"] for row in encoded]),
    "encode with <s>": (
      [[bos, *row] for row in ids],
      [row["ids_with_bos"] for row in encoded],
    ),
    "decode": (
      [text.decode(row["ids"]) for row in decoded],
      [row["text"] for row in decoded],
    ),
    "decode with special tokens": (
      [_with_special(text, row["ids"]) for row in decoded],
      [row["text_with_special"] for row in decoded],
    ),
    "left_padded ids": (
      [[eos] * n + row for n, row in zip(pads, rows, strict=True)],
      padded["ids"],
    ),
    "left_padded mask": (
      [[0] * n + [1] * (longest - n) for n in pads],
      padded["mask"],
    ),
  }


def _with_special(text, ids):
  """Decodes ids, with special tokens by name and a space before a run."""
  out, run = "", []
  for i in [*ids, None]:
    if i is not None and i > vocabulary.EOS_ID:
      run.append(i)
      continue
    if run:
      out += (" " if out else "") + text.decode(run)
      run = []
    if i is not None:
      out += _SPECIAL_NAMES[i]
  return out


def _decoded(sequences, text) -> list[str]:
  """Decodes recorded sequences int[B, L], whose first column is <s>."""
  return [text.decode([int(i) for i in row[1:]]) for row in sequences]


def _caption(recorded, folder, parts) -> _Lists:
  """Checks the strings that the recorded sequences decode to.

  `recorded_search` checks the sequences themselves.
  """
  checked: _Lists = {}
  with np.load(folder / "caption.npz") as arrays:
    for name, row in recorded.items():  # "caption", "caption_prompt"
      suffix = name.removeprefix("caption")
      decoded = _decoded(arrays[f"out_sequences{suffix}"], parts.text)
      checked[f"{name} decoded"] = decoded, row["decoded"]
      checked[f"{name} caption"] = (
        [official.clean_caption(string) for string in decoded],
        row["caption"],
      )
  return checked


def _vqa(recorded, folder, parts) -> _Lists:
  with np.load(folder / "vqa.npz") as arrays:
    decoded = _decoded(arrays["out_sequences"], parts.text)
  return {
    "decoded": (decoded, recorded["decoded"]),
    "answers_before_lemmatisation": (
      [official.clean_answer(string) for string in decoded],
      recorded["answers_before_lemmatisation"],
    ),
    "prompt": ([official.QUESTION], [recorded["prompt"]]),
  }


def _t2i_tokens(recorded, folder, parts) -> _Lists:
  """Checks nothing: the file has prompts and settings of `recorded_search`."""
  del recorded, folder, parts
  return {}


CHECKS = {
  "questions": _questions,
  "postprocess": _postprocess,
  "tokenizer": _tokenizer,
  "caption": _caption,
  "vqa": _vqa,
  "t2i_tokens": _t2i_tokens,
}
