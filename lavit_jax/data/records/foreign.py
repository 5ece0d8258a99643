"""Rewrites rows in the forms of other projects as rows of ours (`forms.py`).

  OBELICS         images, texts: of each pair one is null
  The Cauldron    images, texts: [{"user": …, "assistant": …}]
  MMC4            text_list, image_info: [{image_name, matched_text_index}]
  BAGEL           image_list, instruction_list; captions as a JSON object
  edits           source_image, instruction, target_image (names: `_BEFORE`, …)
  TRL, RLAIF-V    prompt or question, chosen, rejected; prompt, completion
  RedPajama 2     raw_content

What they hold beside this is left as it is. Of a pair of answers the chosen one
is learnt.
"""

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from lavit_jax.data.records import lines

_END = "END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED"  # in texts of OBELICS
_BEFORE = ("source_image", "original_image", "input_image", "source_img")
_AFTER = ("target_image", "edited_image", "output_image", "target_img")
_INSTRUCTIONS = ("instruction", "edit_prompt", "edit", "edit_instruction")
_MARK = "<image>"

Row = dict[str, Any]


def fields_of(names: Collection[str]) -> tuple[str, ...]:
  """Returns the fields of a form among the names of a row; () for none.

  Args:
    names: of fields that are not null.
  """
  edits = [
    next((n for n in some if n in names), None)
    for some in (_BEFORE, _INSTRUCTIONS, _AFTER)
  ]
  if all(edits):
    return tuple(n for n in edits if n)
  for needed, more, _ in _FORMS:
    if all(name in names for name in needed):
      return (*needed, *(name for name in more if name in names))
  return ()


def images_in(names: Collection[str]) -> tuple[str, ...]:
  """Returns which fields of a form hold images themselves."""
  holding = ("image", "images", "image_list", *_BEFORE, *_AFTER)
  return tuple(name for name in fields_of(names) if name in holding)


def rewritten(row: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns a row in our form; one that has it already as it is.

  Raises:
    lines.BadLine: a row of another form does not keep to it.
  """
  present = {name for name, value in row.items() if value is not None}
  if not (named := fields_of(present)):
    _check_edit(present)
    return _captions(row)
  if named[0] in _BEFORE:
    return _edit(dict(row), *named)
  rewrite: Callable[[Row], Row] = next(
    form for needed, _, form in _FORMS if set(needed) <= present
  )
  return rewrite(dict(row))


def _pairs(row: Row) -> Row:
  """Rewrites images and texts, of OBELICS or of The Cauldron."""
  images, texts = row["images"], row["texts"]
  if not isinstance(images, list) or not isinstance(texts, list):
    raise lines.BadLine(
      f"images and texts are {images!r:.40} and {texts!r:.40}; expected two"
      " lists, as OBELICS has them"
    )
  if texts and all(isinstance(text, dict) for text in texts):
    del row["texts"]
    row["images"] = [image for image in images if image is not None]
    return _with_images(row, _dialogue(texts))
  if len(images) != len(texts):
    raise lines.BadLine(
      f"has {len(images)} images and {len(texts)} texts; OBELICS has as many of"
      " each, of which one is null in each place"
    )
  parts: list[Row] = []
  for place, (image, text) in enumerate(zip(images, texts, strict=True)):
    if image is not None and text is not None:
      raise lines.BadLine(
        f"has an image and a text in place {place} of images and texts; one of"
        " them must be null"
      )
    if image is not None:
      parts.append(_image(image))
    elif text is not None:
      _add_text(parts, text)
  del row["images"], row["texts"]
  return row | {"messages": parts}


def _add_text(parts, text) -> None:
  """Adds a text of OBELICS; where a document ends in it, </s> is learnt."""
  if not isinstance(text, str):
    raise lines.BadLine(f"texts holds {text!r:.40}, expected texts or nulls")
  *ended, last = text.split(_END)
  for piece in ended:
    _append(parts, piece.strip("\n"))
    if parts and parts[-1]["type"] == "text":
      parts[-1]["end"] = True
  _append(parts, last.lstrip("\n") if ended else last)


def _append(parts, text, joint="\n\n") -> None:
  """Adds a text, to the text before it if there is one that has not ended."""
  if not text:
    return
  last = parts[-1] if parts else {}
  if last.get("type") == "text" and not last.get("end"):
    last["text"] += joint + text
  else:
    parts.append({"type": "text", "text": text})


def _image(path) -> Row:
  """Returns an image of a web page, of which some cannot be had any more."""
  return {"type": "image", "image": path, "optional": True}


def _dialogue(turns) -> list[Row]:
  """Returns the messages of {"user": …, "assistant": …}."""
  return [
    {"role": role, "content": turn[role]}
    for turn in turns
    for role in ("system", "user", "assistant")
    if turn.get(role)
  ]


def _mmc4(row: Row) -> Row:
  """Rewrites sentences, and images that stand before one of them each."""
  sentences, infos = row.pop("text_list"), row.pop("image_info")
  if not isinstance(sentences, list) or not isinstance(infos, list):
    raise lines.BadLine("text_list and image_info are not lists, as in MMC4")
  before: dict[int, list[Any]] = {}
  for info in infos:  # several may have one place, in the order of the list
    name = info.get("image_name") if isinstance(info, dict) else None
    if name is None:
      continue  # could not be downloaded
    place = info.get("matched_text_index")
    if type(place) is not int or not 0 <= place < len(sentences):
      raise lines.BadLine(
        f"matched_text_index of {name!r:.40} is {place!r:.20}; expected one of"
        f" the {len(sentences)} sentences in text_list"
      )
    before.setdefault(place, []).append(name)
  parts: list[Row] = []
  for place, sentence in enumerate(sentences):
    if not isinstance(sentence, str):
      raise lines.BadLine(f"text_list holds {sentence!r:.40}, expected texts")
    parts += [_image(name) for name in before.get(place, ())]
    _append(parts, sentence, joint=" ")
  return row | {"messages": parts}


def _bagel(row: Row) -> Row:
  """Rewrites steps of edits, or one from several images."""
  images, steps = row.pop("image_list"), row.pop("instruction_list")
  if not isinstance(images, list) or not isinstance(steps, list):
    raise lines.BadLine("image_list and instruction_list are not lists")
  images = [image for image in images if image is not None]
  choices = [
    step if isinstance(step, list) else [step] for step in steps if step
  ]
  if len(images) == 2 and len(choices) == 1:
    edits = [{"instruction": c, "image": images[1]} for c in choices[0]]
    return row | {"image": images[0], "edits": edits}
  if len(choices) == 1 and len(images) > 2:
    read, written = [images[:-1]], [images[-1]]
  elif len(choices) == len(images) - 1 and choices:
    read, written = [images[:1]] + [[]] * (len(choices) - 1), images[1:]
  else:
    raise lines.BadLine(
      f"has {len(images)} images in image_list and {len(choices)} instructions"
      " in instruction_list; expected one fewer than images, or one"
    )
  messages: list[Row] = []
  for given, choice, result in zip(read, choices, written, strict=True):
    content = [{"type": "image", "image": image} for image in given]
    text = {"type": "text", "text": choice[0]}  # others say the same
    messages.append({"role": "user", "content": [*content, text]})
    made = {"type": "image", "image": result}
    messages.append({"role": "assistant", "content": [made]})
  return row | {"messages": messages}


def _edit(row: Row, before: str, instruction: str, after: str) -> Row:
  """Rewrites an image, an instruction and the edited image."""
  edit = {"instruction": row.pop(instruction), "image": row.pop(after)}
  return row | {"image": row.pop(before), "edits": [edit]}


def _check_edit(present) -> None:
  """Refuses half an edit, of which an image would be lost."""
  edit = (_BEFORE, _INSTRUCTIONS, _AFTER)
  given = [next((n for n in some if n in present), "") for some in edit]
  before, instruction, after = given
  if not (before or after) or ("image" in present and not instruction):
    return
  has = " and ".join(filter(None, given))
  lacks = [some[0] for some, name in zip(edit, given, strict=True) if not name]
  raise lines.BadLine(
    f"has {has}, but no {' and no '.join(lacks)}: an edit has"
    f" {', '.join(some[0] for some in edit)}"
  )


def _preference(row: Row) -> Row:
  """Rewrites a pair of answers, of which the chosen one is learnt."""
  chosen = row.pop("chosen")
  row.pop("rejected", None)
  asked = row.pop("prompt", None)
  if asked is None:
    asked = row.pop("question", None)
  if row.get("messages") == chosen:
    del row["messages"]
  answer = _turns(chosen, "assistant")
  speaker = answer[0].get("role", answer[0].get("from")) if answer else None
  if speaker in ("user", "human", "system"):
    asked = None  # it is the whole dialogue
  return _with_images(row, _turns(asked, "user") + answer)


def _completion(row: Row) -> Row:
  """Rewrites a prompt and what is to follow it."""
  asked, answer = row.pop("prompt"), row.pop("completion")
  return _with_images(row, _turns(asked, "user") + _turns(answer, "assistant"))


def _turns(value, role) -> list[Row]:
  """Returns a text as a message of a role; messages as they are."""
  if value is None:
    return []
  if isinstance(value, str):
    return [{"role": role, "content": value.strip()}]
  if isinstance(value, list) and all(isinstance(v, dict) for v in value):
    return value
  raise lines.BadLine(
    f"{value!r:.40} stands for the words of the {role}; expected a text, or a"
    " list of messages"
  )


def _with_images(row: Row, messages: list[Row]) -> Row:
  """Returns a row with messages, its images in front where they have no place.

  Raises:
    lines.BadLine: it has messages of its own.
  """
  if "messages" in row:
    raise lines.BadLine("has messages beside chosen or texts; keep one of them")
  several = row.get("images") or [row.get("image")]
  if (
    several != [None] and messages and not any(_has_image(m) for m in messages)
  ):
    first, *rest = messages
    field = "content" if "content" in first else "value"
    content = first.get(field)
    texts = content if isinstance(content, list) else [content]
    place: list[Any] = [{"type": "image"} for _ in several]
    messages = [first | {field: place + texts}, *rest]
  return row | {"messages": messages}


def _has_image(message) -> bool:
  content = message.get("content", message.get("value"))
  if isinstance(content, str):
    return _MARK in content
  if not isinstance(content, list):
    return False
  return any(
    item.get("type") in ("image", "image_url") or _MARK in str(item.get("text"))
    if isinstance(item, dict)
    else _MARK in str(item)
    for item in content
  )


def _raw(row: Row) -> Row:
  """Rewrites a page of RedPajama 2."""
  return row | {"text": row.pop("raw_content")}


def _captions(row: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns a row with captions that are a JSON object as a list of them."""
  value = row.get("captions")
  if not isinstance(value, str) or not value.startswith("{"):
    return row
  try:
    found = json.loads(value)
  except (ValueError, RecursionError):
    return row
  if not isinstance(found, dict):
    return row
  return {**row, "captions": list(found.values())}


# Fields that tell a form, others of it, and what rewrites it.
_FORMS: tuple[tuple[tuple[str, ...], tuple[str, ...], Any], ...] = (
  (("images", "texts"), (), _pairs),
  (("text_list", "image_info"), (), _mmc4),
  (("image_list", "instruction_list"), (), _bagel),
  (
    ("chosen",),
    ("prompt", "question", "rejected", "image", "images"),
    _preference,
  ),
  (("prompt", "completion"), ("image", "images"), _completion),
  (("raw_content",), (), _raw),
)
