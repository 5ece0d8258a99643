"""Each field of a user's row is learnt, warned of, or the row is refused."""

import itertools
import re

import pytest

from lavit_jax.data.records import forms, known_fields, lines

_ASKED = {"role": "user", "content": "What is it?"}
_ANSWERED = {"role": "assistant", "content": "a card"}
_SHOWN = {"type": "image", "image": "a.jpg"}
_EDIT = {"instruction": "paint it", "image": "b.jpg"}


def _entry(row):
  reader = forms.Reader("d.jsonl")
  return reader.entry(1, row), reader.unread


def _refused(row):
  with pytest.raises(lines.BadLine) as caught:
    _entry(row)
  return str(caught.value)


@pytest.mark.parametrize(
  ("row", "said"),
  [
    ({"caption": "a cat", "text": "hello"}, "caption cannot be read"),
    ({"edits": [_EDIT], "text": "hello"}, "edits cannot be read"),
    (
      {"question": "hue?", "answer": "red", "text": "hello"},
      "answer and question cannot be read beside text",
    ),
    ({"messages": [_SHOWN], "caption": "a cat"}, "caption cannot be read"),
    ({"messages": [_SHOWN], "edits": [_EDIT]}, "edits cannot be read"),
    ({"messages": [_ASKED, _ANSWERED], "text": "hi"}, "messages and text"),
    (
      {"image": "a.jpg", "images": ["a.jpg", "b.jpg"], "caption": "x"},
      "two images, image 'a.jpg' and images",
    ),
    (
      {"image": "a.jpg", "file_name": "b.jpg", "caption": "x"},
      "two images, image 'a.jpg' and file_name 'b.jpg'",
    ),
    ({"image": "a.jpg", "filepath": "b", "caption": "x"}, "filepath cannot"),
    (
      {"image": "a.jpg", "images": ["b.jpg"], "messages": ["<image> x"]},
      "two images",
    ),
  ],
)
def test_a_known_field_that_cannot_be_read_is_refused(row, said):
  assert said in _refused(row)


_VALUES = {
  "image": "a.jpg",
  "images": ["a.jpg", "b.jpg"],
  "file_name": "c.jpg",
  "caption": "stated in caption",
  "captions": ["stated in captions"],
  "sentences": [{"raw": "stated in sentences"}],
  "text": "stated in text",
  "txt": "stated in txt",
  "question": "stated in question",
  "questions": [{"question": "stated in questions", "answer": "yes"}],
  "answer": "stated in answer",
  "edits": [{"instruction": "stated in edits", "image": "d.jpg"}],
  "messages": [_ASKED, {"role": "assistant", "content": "stated in messages"}],
  "document": ["<image>", "stated in document"],
  "conversations": [{"from": "gpt", "value": "<image>stated in conversations"}],
}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_all_known_fields_of_a_row_are_read_or_it_is_refused(count):
  """Every text and image that a row gives is in its entry, if it has one."""
  read = 0
  for fields in itertools.combinations(_VALUES, count):
    row = {field: _VALUES[field] for field in fields}
    try:
      entry, _ = _entry(row)
    except lines.BadLine:
      continue
    read += 1
    words = re.findall(r"stated in \w+", repr(row))
    images = re.findall(r"\w\.jpg", repr(row))
    assert set(words) == set(re.findall(r"stated in \w+", repr(entry))), row
    assert set(images) == set(entry.images()), row
  assert read >= 2


def test_every_known_field_of_a_row_is_tried():
  others = {"filename", "filepath", "answers", "multiple_choice_answer"}
  assert set(_VALUES) == known_fields.FIELDS[""] - others - set(
    known_fields.KINDS
  )


@pytest.mark.parametrize(
  ("row", "said"),
  [
    ({"image_paths": ["a.jpg"], "text": "a cat"}, "'image_paths'.*call it im"),
    ({"image_path": "images/0001", "text": "a cat"}, "'image_path'"),
    ({"imagePath": "0001", "text": "a cat"}, "'imagePath'"),
    ({"img2": "0001", "text": "a cat"}, "'img2'"),
    ({"photo_url": "https://x/0001", "text": "a cat"}, "'photo_url'.*download"),
    ({"url": "https://x/a.jpg", "text": "a cat"}, "'url'.*download it"),
    ({"url": "https://x/a.JPG?w=3", "text": "a cat"}, "'url'.*download it"),
    ({"media": [{"file": "x/a.webp"}], "text": "a cat"}, "'media'.*a.webp"),
    ({"picture": {"bytes": "iVBOR"}, "text": "a cat"}, "'picture'"),
    ({"b64": "data:image/png;base64,AA", "text": "a cat"}, "'b64'"),
    (
      {"messages": [_ASKED | {"images": ["a.jpg"]}, _ANSWERED]},
      "in messages.*'images'",
    ),
  ],
)
def test_texts_whose_image_would_be_lost_are_refused(row, said):
  assert re.search(said, _refused(row))


@pytest.mark.parametrize(
  "more",
  [
    {"url": "https://x/page.html", "id": "a"},
    {"image_count": 3, "image_id": "0001", "has_image": "no"},
    {"image_paths": [], "picture": "", "photos": 0},
    {"source": {"file": "crawl/0001.txt"}},
  ],
)
def test_fields_without_an_image_do_not_affect_a_text(more):
  entry, _ = _entry({"text": "hello"} | more)
  assert entry == forms.Entry(text="hello")


def test_a_field_about_the_origin_is_known_by_its_name_or_its_last_part():
  content = {
    "language_instruction": "pick it up",
    "source_caption": "a cat",
    "key_description": "a cat",
    "image_path": "b.jpg",
    "type": "photo",
  }
  origin = {
    **{"id": "x", "image_id": "x1", "source": "web", "data_source": "web"},
    **{"licenses": ["cc"], "lang": "en", "sourceId": "web"},
  }
  _, unread = _entry({"image": "a.jpg", "caption": "x"} | content | origin)
  assert {field: found[2] for field, found in unread.items()} == content


def test_messages_without_an_answer_hold_nothing_to_learn():
  row = {"image": "a.jpg", "messages": [_ASKED | {"content": "<image> What?"}]}
  assert "holds nothing to learn: messages has no words" in _refused(row)
  row["messages"].append(_ANSWERED)
  assert len(_entry(row)[0].parts) == 3


@pytest.mark.parametrize("field", known_fields.MESSAGES)
@pytest.mark.parametrize("content", ["<image>\nWhat is it?", "What is it?"])
def test_messages_need_as_many_marks_as_images(field, content):
  said = [_ASKED | {"content": content}, _ANSWERED]
  mark = "<image>" in content
  row = {field: said} if mark else {field: said, "image": "a.jpg"}
  right = {field: said, "image": "a.jpg"} if mark else {field: said}
  why = "more images than the 0" if mark else "appear nowhere in the messages"
  assert why in _refused(row)
  assert _entry(right)[0].images() == (["a.jpg"] * 2 if mark else [])


def test_an_image_may_be_both_in_the_messages_and_beside_them():
  entry, _ = _entry({"image": "a.jpg", "messages": [_SHOWN, "a card"]})
  assert entry.images() == ["a.jpg", "a.jpg"]


@pytest.mark.parametrize(
  "row",
  [
    {"caption": "<image> a cat"},
    {"question": "<image>\nhue?", "answer": "red"},
    {"edits": [_EDIT | {"instruction": "<image> paint it"}]},
  ],
)
def test_marks_outside_of_messages_are_refused(row):
  assert "holds <image>" in _refused({"image": "a.jpg"} | row)


@pytest.mark.parametrize(
  ("part", "said"),
  [
    (_ASKED | {"image": "a.jpg"}, "role, beside which image is not read"),
    (_ASKED | {"value": "x"}, "beside which value is not read"),
    ({"type": "text", "text": "x", "image": "a.jpg"}, "beside which image"),
    (_SHOWN | {"path": "b.jpg"}, "beside which path"),
    (_SHOWN | {"text": "a card"}, "beside which text"),
    (_SHOWN | {"write": "false"}, "write is 'false', expected true or false"),
    (_SHOWN | {"write": 1}, "write is 1"),
  ],
)
def test_fields_that_a_message_would_lose_are_refused(part, said):
  assert said in _refused({"messages": [part, _ANSWERED]})


def test_empty_fields_of_messages_hold_nothing():
  shown = _SHOWN | {"text": "", "write": False}
  entry, _ = _entry({"messages": [shown, {"type": "text", "text": "red"}]})
  assert [type(p).__name__ for p in entry.parts] == ["ImagePart", "TextPart"]


def test_empty_texts_of_a_table_are_absent():
  none = {"caption": "", "question": "", "answer": " ", "messages": ""}
  assert _entry({"image": "a.jpg"} | none)[0] == forms.Entry(image="a.jpg")
  assert _entry({"text": "x"} | none)[0] == forms.Entry(text="x")
  assert "expected a path" in _refused({"image": "", "text": "x"})


def test_an_image_without_texts_is_reported_by_its_empty_field():
  said = _refused({"image": "a.jpg", "captions": []})
  assert "holds no text in captions, []" in said
  assert "picture" not in said
