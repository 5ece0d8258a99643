import json
import os
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from lavit_jax.core import errors, image_io
from lavit_jax.data import examples
from lavit_jax.data.sources import jsonl

_COCO = pathlib.Path(__file__).parents[2] / "data_files" / "coco"
_SHARED = os.environ.get("LAVIT_SHARED")


def _source(tmp_path, rows, **kwargs):
  lines = [r if isinstance(r, (str, bytes)) else json.dumps(r) for r in rows]
  data = b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines)
  (tmp_path / "d.jsonl").write_bytes(data)
  for name in ("a.png", "b.png", "c.png"):
    color = {"a": (255, 0, 0), "b": (0, 255, 0), "c": (0, 0, 255)}[name[0]]
    Image.new("RGB", (6, 4), color).save(tmp_path / name)
  return jsonl.JsonlSource(tmp_path / "d.jsonl", 8, **kwargs)


def _parts(source, task, i=0):
  return source.example(task, i).parts


def test_captions_give_image_text_and_text_image_examples(tmp_path):
  rows = [
    {"image": "a.png", "caption": " red "},
    {"image": "b.png", "captions": ["green", "", "grass"]},
  ]
  source = _source(tmp_path, rows)
  assert isinstance(source, examples.Source)
  assert source.tasks() == ("image_text", "text_image")
  assert [source.captions(i) for i in range(2)] == [["red"], ["green", "grass"]]
  assert source.num_examples("image_text") == 3
  assert source.example("image_text", 2) == examples.image_text(
    "d.jsonl:2", 1, "grass"
  )
  assert source.example("text_image", 0) == examples.text_image(
    "d.jsonl:1", 0, "red"
  )


def test_images_are_found_beside_the_file_and_resized(tmp_path):
  source = _source(tmp_path, [{"image": "./b.png", "caption": "green"}])
  pixels = source.image(0)
  assert (pixels.shape, pixels.dtype) == ((8, 8, 3), np.uint8)
  np.testing.assert_array_equal(pixels[3, 3], [0, 255, 0])
  assert source.image_key(0) == "b.png"


def test_one_image_on_many_lines_is_one_image(tmp_path):
  rows = [{"image": "a.png", "caption": str(i)} for i in range(3)]
  source = _source(tmp_path, rows)
  assert source.num_images == 1
  assert source.captions(0) == ["0", "1", "2"]


def test_questions_learn_the_most_frequent_answer(tmp_path):
  rows = [
    {"image": "a.png", "questions": [{"question": "hue?", "answer": "red"}]},
    {
      "image": "b.png",
      "question": "hue?",
      "answers": ["lime", "green", "green"],
      "answer_type": "color",
    },
  ]
  source = _source(tmp_path, rows)
  assert source.example("vqa", 0) == examples.vqa("d.jsonl:1", 0, "hue?", "red")
  assert source.questions(1) == [("color", "hue?", "green")]


def test_edits_read_one_image_and_write_the_other(tmp_path):
  edit = {"instruction": "make it green", "image": "b.png"}
  source = _source(tmp_path, [{"image": "a.png", "edits": [edit]}])
  assert source.example("edit", 0) == examples.edit(
    "d.jsonl:1", 0, "make it green", 1
  )


_SOUP = [
  {"type": "image", "image": "a.png"},
  {"type": "text", "text": "Boil it."},
  "Stir.",
  {"type": "image", "image": "b.png"},
]


@pytest.mark.parametrize("field", ["messages", "document"])
def test_a_document_reads_its_images_and_writes_the_last(tmp_path, field):
  source = _source(tmp_path, [{field: _SOUP}])
  assert _parts(source, "document") == (
    examples.ImagePart(0, write=False),
    examples.TextPart("Boil it."),
    examples.TextPart("Stir."),
    examples.ImagePart(1, write=True),
  )


def test_a_part_with_write_is_a_target(tmp_path):
  part = {"type": "image", "image": "a.png", "write": True}
  source = _source(tmp_path, [{"messages": [part, "a red card"]}])
  assert _parts(source, "document")[0] == examples.ImagePart(0, write=True)


def test_in_a_dialogue_only_the_assistant_is_learnt(tmp_path):
  messages = [
    {"role": "user", "content": [_SOUP[0], _SOUP[1]]},
    {"role": "assistant", "content": "Done."},
    {"role": "user", "content": "Show it."},
    {"role": "assistant", "content": [_SOUP[3]]},
  ]
  source = _source(tmp_path, [{"messages": messages}])
  assert _parts(source, "document") == (
    examples.ImagePart(0, write=False, weight=0.0),
    examples.TextPart("Boil it.", 0.0),
    examples.TextPart("Done.", end=True),
    examples.TextPart("Show it.", 0.0),
    examples.ImagePart(1, write=True),
  )


def test_a_line_may_hold_only_a_text_or_only_an_image(tmp_path):
  source = _source(tmp_path, [{"text": "words"}, {"image": "a.png"}])
  assert source.tasks() == ("text",)
  assert source.example("text", 0) == examples.text("d.jsonl:1", "words")
  assert source.num_images == 1
  assert source.captions(0) == []


_GOOD = {"image": "a.png", "caption": "red"}


@pytest.mark.parametrize(
  ("line", "said"),
  [
    ('{"image": "a.png", "cap', "not JSON"),
    ("[1, 2]", "JSON list"),
    ("[" * 100_000, "not JSON"),
    (b'{"image": "\xff\xfe.png"}', "not JSON"),
    ({}, "holds no"),
    ({"caption": "red"}, "holds no"),
    ({"image": 3, "caption": "red"}, "expected a path"),
    ({"image": "", "caption": "red"}, "expected a path"),
    ({"image": "a\0.png", "caption": "red"}, "expected a path"),
    ({"image": "a.png", "captions": []}, "holds no text in captions"),
    ({"image": "a.png", "captions": {"en": "red"}}, "captions is not a list"),
    ({"image": "a.png", "captions": [3]}, "captions is not a list"),
    ({"image": "a.png", "question": "hue?"}, "answer is None"),
    ({"image": "a.png", "questions": ["hue?"]}, "questions is not a list"),
    ({"image": "../a.png", "caption": "red"}, "outside the folder"),
    ({"image": "x/../../a.png", "caption": "red"}, "outside the folder"),
    ({"image": "/etc/passwd", "caption": "red"}, "outside the folder"),
    ({"messages": [{"type": "image", "image": "/a"}]}, "outside the folder"),
    ({"messages": []}, "holds no"),
    ({"messages": [3]}, "messages is not a list"),
    ({"messages": [{"type": "sound"}]}, "'sound'"),
    ({"messages": [{"role": "king", "content": "x"}]}, "'king'"),
    ({"messages": [{"role": "user", "content": 3}]}, "content is not a list"),
    ({"image": "a.png", "edits": [{"image": "b.png"}]}, "instruction is None"),
    ({"text": 3}, "text is 3"),
  ],
)
def test_a_bad_line_is_skipped_counted_and_logged(tmp_path, line, said):
  source = _source(tmp_path, [_GOOD, line, _GOOD], limit_share=0.5)
  assert list(source.faults.reasons) == ["d.jsonl:2"]
  assert said in source.faults.reasons["d.jsonl:2"]
  assert source.num_examples("image_text") == 2
  assert source.num_images == 1  # a bad line leaves no image behind


_HALF = "cut \ud83d"
_USER = {"role": "user", "content": "hue?"}


@pytest.mark.parametrize(
  ("line", "said"),
  [
    ({"text": _HALF}, r"text holds half a character.*position 4"),
    ({"image": "a.png", "caption": _HALF}, "caption holds half"),
    ({"image": "a.png", "captions": ["red", _HALF]}, "captions holds half"),
    ({"image": "a\udcff.png"}, "image holds half"),
    ({"image": "a.png", "question": _HALF, "answer": "a"}, "question holds"),
    ({"image": "a.png", "question": "a", "answer": _HALF}, "answer holds"),
    (
      {"image": "a.png", "edits": [{"instruction": _HALF, "image": "b.png"}]},
      "instruction holds half",
    ),
    ({"messages": [_HALF]}, "text holds half"),
    ({"messages": [_USER, {"role": _HALF, "content": "x"}]}, "is not one of"),
    ({"image": "a.png", "caption": "x", "text": "y"}, "caption and text"),
    ({"image": "a.png", "answer": "red"}, "answer without a question"),
    ({"image": "a.png", "Caption": "red"}, "write it 'caption'"),
    ({"image": "a.png", "Sentences": ["red"]}, "write it 'sentences'"),
    ({"Image": "a.png", "caption": "red"}, "write it 'image'"),
    ({"img": "a.png", "caption": "red"}, "'img'.*call it image"),
    ({"img": "a.png", "text": "red"}, "'img'.*call it image"),
    ({"img": "a.png", "messages": [_USER]}, "'img'.*call it image"),
    ({"url": "http://x/a.jpg", "caption": "red"}, "not from addresses"),
    ({"image": "http://x/a.jpg", "caption": "red"}, "is a web address"),
    ({"image": "data:image/png;base64,AA"}, "or the image itself"),
    ({"image": {"bytes": "AA"}}, "expected a path"),
    ({"images": ["a.png"], "caption": "red"}, "only beside messages"),
    ({"images": [], "annotations": [{"caption": "x"}]}, "COCO's annotations"),
    ({"messages": [_USER], "document": ["a"]}, "messages and document"),
    ({"messages": [{"role": "user"}]}, "a role and no content"),
    ({"messages": [{"type": "image"}]}, "more images than the 0"),
    (
      {"image": "a.png", "conversations": [_USER]},
      "1 of 1 images.*nowhere in the messages; write <image>",
    ),
    (
      {"images": ["a.png"], "messages": ["<image> and <image>"]},
      "more images than the 1",
    ),
    ({"messages": [{"role": "user", "content": " "}]}, "holds no"),
    ({"image": "a.png", "question": "a?", "answers": [{"a": 1}]}, "holds None"),
    (
      {"image": "a.png", "question": "a?", "answers": ["b"], "answer": "c"},
      "answer is 'c', which is not one of answers",
    ),
    ({"image": "a.png", "question": "a?", "answer": float("inf")}, "holds inf"),
  ],
)
def test_a_line_that_is_not_understood_says_what_to_do(tmp_path, line, said):
  source = _source(tmp_path, [_GOOD, line, _GOOD], limit_share=0.5)
  assert re.search(said, source.faults.reasons["d.jsonl:2"])
  assert (source.num_images, source.num_examples("image_text")) == (1, 2)
  source.faults.summary().encode()  # can be printed


_RED = ("image_text", (0, "red"))
_DRAWN = ("text_image", (0, "red"))


def _contents(source):
  """(task, what the parts hold) of all examples."""
  out = []
  for task in source.tasks():
    for i in range(source.num_examples(task)):
      parts = source.example(task, i).parts
      held = (getattr(p, "text", getattr(p, "image", None)) for p in parts)
      out.append((task, tuple(sorted(held, key=str))))
  return out


@pytest.mark.parametrize(
  "line",
  [
    {"image": "a.png", "text": "red"},
    {"image": "a.png", "txt": "red"},
    {"file_name": "a.png", "text": "red"},
    {"file_name": "a.png", "caption": "red"},
    {"filename": "a.png", "filepath": ".", "sentences": [{"raw": "red"}]},
    {"image": "a.png", "captions": "red"},
    {"image": "a.png", "caption": ["red", ""]},
    {"image": "a.png", "captions": [{"caption": "red", "id": 3}]},
    {"image": {"path": "a.png", "bytes": None}, "caption": "red"},
    {"image": "a.png", "caption": "red", "text": None, "question": None},
    {"image": "a.png", "caption": "red", "answer": float("nan")},
    {"image": "a.png", "captions": ["red", None], "messages": None},
    {"image": "a.png", "caption": "red", "text": "", "question": " "},
    {"image": "a.png", "caption": "red", "images": [], "edits": []},
    {"image": "a.png", "file_name": "a.png", "text": "red"},
  ],
)
def test_common_forms_of_a_caption_are_equivalent(tmp_path, line):
  source = _source(tmp_path, [line])
  assert source.faults.bad == 0
  assert _contents(source) == [_RED, _DRAWN]
  assert not source.unread


@pytest.mark.parametrize(
  ("fields", "learnt"),
  [
    ({"answers": [{"answer": "red", "id": 1}] * 2 + ["pink"]}, "red"),
    ({"answer": 3}, "3"),
    ({"answer": 3.0}, "3"),
    ({"answer": 2.5}, "2.5"),
    ({"answer": True}, "yes"),
    ({"answers": [False, False, True]}, "no"),
    ({"answer": ["red"]}, "red"),
    ({"answers": None, "answer": "red"}, "red"),
    ({"multiple_choice_answer": "red"}, "red"),
  ],
)
def test_answers_may_be_vqas_own_numbers_and_yes_or_no(
  tmp_path, fields, learnt
):
  row = {"image": "a.png", "question": "hue?"} | fields
  source = _source(tmp_path, [row])
  assert source.questions(0) == [("any", "hue?", learnt)]


_TURNS = [
  {"from": "human", "value": "<image>\nWhat?"},
  {"from": "gpt", "value": "red"},
  {"from": "human", "value": "Sure?"},
  {"from": "gpt", "value": "yes"},
]
_SAID = (
  examples.ImagePart(0, write=False, weight=0.0),
  examples.TextPart("What?", 0.0),
  examples.TextPart("red", end=True),
  examples.TextPart("Sure?", 0.0),
  examples.TextPart("yes", end=True),
)


def _roles(content):
  roles = ["user", "assistant", "user", "assistant"]
  values = [content, *(t["value"] for t in _TURNS[1:])]
  return [{"role": r, "content": c} for r, c in zip(roles, values, strict=True)]


@pytest.mark.parametrize(
  "line",
  [
    {"id": "1", "image": "a.png", "conversations": _TURNS},
    {"images": ["a.png"], "messages": _roles("<image>What?")},
    {"image": "a.png", "messages": _roles("<image> What?")},
    {
      "images": ["a.png"],
      "messages": _roles([{"type": "image", "text": None}, "What?"]),
    },
    {
      "messages": _roles(
        [
          {"type": "image_url", "image_url": {"url": "a.png"}},
          {"type": "text", "text": "What?"},
        ]
      )
    },
    {"messages": _roles([{"type": "image", "path": "a.png"}, "What?"])},
  ],
  ids=["llava", "marks", "image", "trl", "openai", "path"],
)
def test_common_forms_of_a_dialogue_are_equivalent(tmp_path, line):
  source = _source(tmp_path, [line])
  assert source.faults.bad == 0
  assert _parts(source, "document") == _SAID
  assert source.num_images == 1


def test_an_answer_in_several_messages_ends_once(tmp_path):
  said = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "assistant", "content": ["c", "d"]},
    {"role": "user", "content": "e"},
  ]
  source = _source(tmp_path, [{"messages": said}])
  ends = {p.text: p.end for p in _parts(source, "document")}
  assert ends == dict(a=False, b=False, c=False, d=True, e=False)


def test_a_document_keeps_white_space_and_skips_empty_texts(
  tmp_path,
):
  texts = ["List:\n", "- one\n", "", "\n\n", " end "]
  rows = [{"document": texts}, {"image": "a.png", "caption": " red "}]
  source = _source(tmp_path, rows)
  assert [p.text for p in _parts(source, "document")] == [
    "List:\n",
    "- one\n",
    "\n\n",
    " end ",
  ]
  assert source.captions(0) == ["red"]


def test_unread_fields_are_warned_of_once_for_the_file(tmp_path, caplog):
  row = {"image": "a.png", "id": "x", "source": "web", "width": 3}
  rows = [row | {"title": f"a cat {i}"} for i in range(12)]
  rows += [
    _GOOD | {"tags": ["indoors"], "split": "train", "coco_url": "http://x"},
    {"messages": [{"type": "image", "image": "a.png", "alt": "a card"}] * 2},
    {
      "image": "a.png",
      "questions": [{"question": "a?", "answer": "b", "why": "so"}],
    },
  ]
  source = _source(tmp_path, rows)
  assert {f: n for f, (n, _, _) in source.unread.items()} == {
    "title": 12,
    "tags": 1,
    "messages.alt": 1,
    "questions.why": 1,
  }
  (said,) = [r.getMessage() for r in caplog.records]
  assert "12 lines have a field 'title' (line 1: 'a cat 0')" in said
  assert "Known fields are" in said
  assert "caption" in said


def test_lines_of_a_split_that_is_not_for_training_are_warned_of(
  tmp_path, caplog
):
  rows = [_GOOD | {"split": split} for split in ("train", "restval", "test")]
  _source(tmp_path, rows)
  (said,) = [r.getMessage() for r in caplog.records]
  assert "1 lines have a field 'split' (line 3: 'test')" in said
  caplog.clear()
  _source(tmp_path, rows, only={"split": "test"})
  assert not caplog.text


@pytest.mark.parametrize("kind", ["lines", "array"])
def test_a_repeated_field_makes_a_line_bad(tmp_path, kind):
  (tmp_path / "a.png").write_bytes(b"x")
  good = json.dumps({"image": "a.png", "caption": "b"})
  bad = good[:-1] + ', "caption": "c"}'
  text = f"{bad}\n{good}" if kind == "lines" else f"[{bad}, {good}]"
  path = tmp_path / "d.json"
  path.write_text(text)
  source = jsonl.JsonlSource(path, 8, limit_share=0.5)
  assert (source.faults.bad, source.num_examples("image_text")) == (1, 1)
  (reason,) = source.faults.reasons.values()
  assert reason == "has the field 'caption' twice; keep one"


def test_too_many_bad_lines_are_an_error(tmp_path):
  with pytest.raises(
    errors.DataError, match=r"1 of 2 lines of d\.jsonl.*0\.05"
  ):
    _source(tmp_path, [_GOOD, "{"])


def test_blank_lines_crlf_and_a_byte_order_mark_are_accepted(tmp_path):
  first = b"\xef\xbb\xbf" + json.dumps(_GOOD).encode() + b"\r"
  source = _source(tmp_path, [first, "", "   ", _GOOD, ""])
  assert source.faults.bad == 0
  assert source.num_examples("image_text") == 2
  assert source.example("image_text", 1).key == "d.jsonl:4"


def test_a_missing_image_is_an_image_error_with_its_path(tmp_path):
  rows = [_GOOD, {"image": "gone.png", "caption": "x"}]
  source = _source(tmp_path, rows)
  with pytest.raises(image_io.ImageError, match=r"gone\.png: no such file"):
    source.image(1)


def test_a_file_whose_images_do_not_exist_is_refused(tmp_path):
  rows = [{"image": f"{i}.jpg", "caption": "x"} for i in range(3)]
  with pytest.raises(errors.DataError, match=r"none of its first 3.*0\.jpg"):
    _source(tmp_path, rows)


def test_images_beside_the_folder_of_the_file_are_found_for_the_message(
  tmp_path,
):
  """As COCO's own layout has them: annotations/ beside val2017/."""
  (tmp_path / "val2017").mkdir()
  (tmp_path / "val2017" / "0.jpg").write_bytes(b"")
  folder = tmp_path / "annotations"
  folder.mkdir()
  with pytest.raises(errors.DataError, match=r"is in .*val2017: copy d\.jsonl"):
    _source(folder, [{"image": "0.jpg", "caption": "x"}])


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_file_is_refused(tmp_path, text):
  with pytest.raises(errors.DataError, match="no usable line"):
    _source(tmp_path, [text])


def test_a_missing_file_is_refused(tmp_path):
  with pytest.raises(errors.DataError, match=r"none\.jsonl cannot be read"):
    jsonl.JsonlSource(tmp_path / "none.jsonl", 8)


def test_paths_may_lead_outside_where_that_is_allowed(tmp_path):
  (tmp_path / "sub").mkdir()
  rows = [
    {"image": "../a.png", "caption": "red"},
    {"image": str(tmp_path / "b.png"), "caption": "green"},
  ]
  _source(tmp_path, [_GOOD])
  path = tmp_path / "sub" / "d.jsonl"
  path.write_text("\n".join(json.dumps(r) for r in rows))
  source = jsonl.JsonlSource(path, 8, allow_absolute=True)
  assert [source.image(i)[0, 0].argmax() for i in range(2)] == [0, 1]


def test_train_and_held_out_share_no_image_and_lose_none(tmp_path):
  rows = [
    {"image": f"{i}.png", "caption": c} for i in range(200) for c in ("x", "y")
  ]
  rows = [_GOOD, *rows]
  keys = {}
  for split in ("all", "train", "held_out"):
    source = (
      _source(tmp_path, rows, split=split, held_out_share=0.25)
      if (split != "held_out")
      else None
    )
    if source is None:
      for i in range(200):
        Image.new("RGB", (1, 1)).save(tmp_path / f"{i}.png")
      source = _source(tmp_path, rows, split=split, held_out_share=0.25)
    keys[split] = {source.image_key(i) for i in range(source.num_images)}
  assert not keys["train"] & keys["held_out"]
  assert keys["train"] | keys["held_out"] == keys["all"]
  assert 30 <= len(keys["held_out"]) <= 70


def test_an_unknown_split_is_named(tmp_path):
  with pytest.raises(errors.ConfigError, match="split='test'"):
    _source(tmp_path, [_GOOD], split="test")


def test_only_and_limit_choose_lines(tmp_path):
  rows = [
    {"image": "a.png", "caption": str(i), "free": bool(i % 2)}
    for i in range(10)
  ]
  source = _source(tmp_path, rows, only={"free": True}, limit=3)
  assert source.captions(0) == ["1", "3", "5"]


def test_the_shipped_photographs_load():
  source = jsonl.JsonlSource(_COCO / "index.jsonl", 32)
  assert source.num_images == 8
  assert source.num_examples("image_text") >= 40
  for i in range(8):
    assert source.image(i).std() > 10


@pytest.mark.parametrize(
  ("file", "only", "images", "task", "count"),
  [
    ("A_coco/index.jsonl", None, 390, "image_text", 1951),
    ("A_coco/index.jsonl", {"free": True}, 119, "text_image", 595),
    ("A_flickr8k/index.jsonl", {"split": "train"}, 380, "image_text", 1900),
    ("B_vqa/index.jsonl", None, 73, "vqa", 112),
    ("E_interleaved/index.jsonl", None, 231, "document", 169),
  ],
  ids=["coco", "coco_free", "flickr8k", "vqa", "interleaved"],
)
@pytest.mark.shared
@pytest.mark.skipif(not _SHARED, reason="needs LAVIT_SHARED")
def test_real_photographs_and_documents_are_read(
  file, only, images, task, count
):
  path = pathlib.Path(_SHARED) / "data" / file
  source = jsonl.JsonlSource(path, 32, only=only)
  assert (source.num_images, source.num_examples(task)) == (images, count)
  assert source.faults.bad == 0
  for i in range(0, images, 40):
    assert source.image(i).std() > 5
