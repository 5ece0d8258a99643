"""What is made of the strings of a directory of recordings; see `verify.py`.

Every check takes (the parsed .json, the directory, the parts of the model) and
gives {name: (our list, the recorded list)}.
"""

import numpy as np

from lavit_jax.core import vocabulary
from lavit_jax.infer.presets import official

_SPECIAL_NAMES = ("<unk>", "<s>", "</s>")


def _questions(recorded, folder, parts):
  del folder, parts
  made = {}
  for name, rows in recorded.items():  # "max_words_50"
    words = int(name.rsplit("_", 1)[1])
    made[name] = (
      [official.clean_question(row["input"], words) for row in rows],
      [row["output"] for row in rows],
    )
  return made


def _postprocess(recorded, folder, parts):
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


def _tokenizer(recorded, folder, parts):
  """Encoding with and without <s>, decoding, padding on the left."""
  del folder
  text = parts.text
  encoded, decoded = recorded["encode"], recorded["decode"]
  padded = recorded["left_padded"]
  rows = [official.encode(text, words) for words in padded["texts"]]
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
  """Decoded text with special tokens by name, each followed by a space."""
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


def written(sequences, text) -> list[str]:
  """Recorded sequences int[B, L], the bos column first, as texts."""
  return [text.decode([int(i) for i in row[1:]]) for row in sequences]


def _caption(recorded, folder, parts):
  """The strings that the recorded sequences, which we reach, decode to."""
  made = {}
  with np.load(folder / "caption.npz") as arrays:
    for name, row in recorded.items():  # "caption", "caption_prompt"
      suffix = name.removeprefix("caption")
      decoded = written(arrays[f"out_sequences{suffix}"], parts.text)
      made[f"{name} decoded"] = decoded, row["decoded"]
      made[f"{name} caption"] = (
        [official.clean_caption(words) for words in decoded],
        row["caption"],
      )
  return made


def _vqa(recorded, folder, parts):
  with np.load(folder / "vqa.npz") as arrays:
    decoded = written(arrays["out_sequences"], parts.text)
  return {
    "decoded": (decoded, recorded["decoded"]),
    "answers_before_lemmatisation": (
      [official.clean_answer(words) for words in decoded],
      recorded["answers_before_lemmatisation"],
    ),
    "prompt": ([official.QUESTION], [recorded["prompt"]]),
  }


def _t2i_tokens(recorded, folder, parts):
  """Nothing: prompts and settings, by which `recorded_search` draws."""
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
