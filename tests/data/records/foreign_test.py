"""Rows in the forms of other projects."""

import json

import pytest

from lavit_jax.data import examples
from lavit_jax.data.records import foreign, forms, lines

END = "END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED"


def _entry(row):
  """Returns the entry of a row, which goes through JSON with its nulls."""
  return forms.Reader("a.jsonl").entry(1, lines._parse(json.dumps(row)))


def _shown(parts):
  """Returns parts as texts: images as [path], learnt ones with a *."""
  out = []
  for part in parts:
    if isinstance(part, examples.TextPart):
      out.append(part.text + ("</s>" if part.end else ""))
    else:
      out.append(f"[{part.image}]" + ("*" if part.write else ""))
    if not part.weight:
      out[-1] = f"({out[-1]})"
  return out


def test_obelics_keeps_the_places_of_nulls():
  row = {
    "images": [None, "a.jpg", None, None, "b.jpg", None],
    "texts": ["One.\n\nTwo.", None, "Three.", "Four.", None, "Five."],
    "metadata": "[null]",
  }
  parts = _entry(row).parts
  assert _shown(parts) == [
    *("One.\n\nTwo.", "[a.jpg]"),
    *("Three.\n\nFour.", "[b.jpg]", "Five."),
  ]
  assert [p.optional for p in parts if isinstance(p, examples.ImagePart)] == [
    *(True, True)
  ]


def test_the_end_of_a_document_in_obelics_is_no_words():
  row = {
    "images": [None, "a.jpg", None],
    "texts": [f"One.\n\n{END}\n\nTwo.", None, f"{END}\n\nThree.\n\n{END}"],
  }
  assert _shown(_entry(row).parts) == [
    *("One.</s>", "Two.", "[a.jpg]", "Three.</s>")
  ]


@pytest.mark.parametrize(
  ("images", "texts", "reason"),
  [
    (["a.jpg"], ["words"], "in place 0 of images and texts"),
    (["a.jpg", None], ["words"], "2 images and 1 texts"),
    ([None], [3], "texts holds 3"),
    ("a.jpg", ["words"], "expected two lists"),
  ],
)
def test_what_is_no_pair_of_obelics_is_told(images, texts, reason):
  with pytest.raises(lines.BadLine, match=reason):
    _entry({"images": images, "texts": texts})


def test_the_cauldron():
  row = {
    "images": ["a.jpg", "b.jpg"],
    "texts": [
      {"user": "Which is red?", "assistant": "The first.", "source": "x"},
      {"user": "Sure?", "assistant": "Yes."},
    ],
  }
  assert _shown(_entry(row).parts) == [
    *("([a.jpg])", "([b.jpg])", "(Which is red?)", "The first.</s>"),
    *("(Sure?)", "Yes.</s>"),
  ]


def test_images_of_mmc4_stand_before_their_sentences():
  info = lambda name, place: {"image_name": name, "matched_text_index": place}
  row = {
    "text_list": ["One.", "Two.", "Three."],
    "image_info": [
      *(info("c.jpg", 2), info("a.jpg", 1), info("d.jpg", 2)),
      *(info(None, 0), info("b.jpg", 1)),
    ],
    "similarity_matrix": None,
    "could_have_url_duplicate": 0,
  }
  assert _shown(_entry(row).parts) == [
    *("One.", "[a.jpg]", "[b.jpg]", "Two.", "[c.jpg]", "[d.jpg]", "Three.")
  ]
  row["image_info"] = []
  assert _shown(_entry(row).parts) == ["One. Two. Three."]
  row["image_info"] = [info("a.jpg", 3)]
  with pytest.raises(lines.BadLine, match="one of the 3 sentences"):
    _entry(row)


def test_edits_of_bagel():
  row = {"image_list": ["a.jpg", "b.jpg"], "instruction_list": [["x", "y"]]}
  entry = _entry(row)
  assert entry.image == "a.jpg"
  assert entry.edits == [("x", "b.jpg"), ("y", "b.jpg")]

  row = {
    "image_list": ["a.jpg", "b.jpg", "c.jpg"],
    "instruction_list": [["x"], ["y", "z"]],
  }
  assert _shown(_entry(row).parts) == [
    *("([a.jpg])", "(x)", "[b.jpg]*", "(y)", "[c.jpg]*")
  ]
  row["instruction_list"] = ["x"]  # made of the other two
  assert _shown(_entry(row).parts) == [
    "([a.jpg])",
    "([b.jpg])",
    "(x)",
    "[c.jpg]*",
  ]
  row["instruction_list"] = ["x", "y", "z"]
  with pytest.raises(lines.BadLine, match="3 images in image_list and 3"):
    _entry(row)


@pytest.mark.parametrize(
  ("before", "instruction", "after"),
  [
    ("source_image", "instruction", "target_image"),
    ("original_image", "edit_prompt", "edited_image"),
    ("input_image", "edit", "output_image"),
    ("source_img", "instruction", "target_img"),
  ],
)
def test_edits_under_other_names(before, instruction, after):
  entry = _entry({before: "a.jpg", instruction: "red", after: "b.jpg"})
  assert (entry.image, entry.edits) == ("a.jpg", [("red", "b.jpg")])


@pytest.mark.parametrize(
  ("row", "said"),
  [
    ({"source_image": "a.jpg", "instruction": "red"}, "no target_image"),
    ({"image": "a.jpg", "edit": "red", "edited_image": "b.jpg"}, "no source_i"),
    ({"source_image": "a.jpg"}, "no instruction and no target_image"),
  ],
)
def test_half_an_edit_is_refused(row, said):
  with pytest.raises(lines.BadLine, match=said):
    _entry(row)


def test_an_image_with_another_of_its_origin_is_no_edit():
  row = {"image": "a.jpg", "caption": "a cat", "original_image": "big.jpg"}
  assert _entry(row).captions == ["a cat"]


def test_captions_as_a_json_object():
  row = {"image": "a.jpg", "captions": '{"0": "a cat", "1": "a pet"}'}
  assert _entry(row).captions == ["a cat", "a pet"]


def _say(role, text):
  return {"role": role, "content": text}


@pytest.mark.parametrize(
  "row",
  [
    {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."},
    {"prompt": [_say("user", "Hi?")], "chosen": [_say("assistant", "Yes.")]},
    {"chosen": [_say("user", "Hi?"), _say("assistant", "Yes.")]},
    {
      "prompt": "Hi?",
      "chosen": [_say("user", "Hi?"), _say("assistant", "Yes.")],
      "messages": [_say("user", "Hi?"), _say("assistant", "Yes.")],
    },
    {"prompt": "Hi?", "completion": "Yes."},
  ],
)
def test_of_two_answers_the_chosen_one_is_learnt(row):
  assert _shown(_entry(row).parts) == ["(Hi?)", "Yes.</s>"]


@pytest.mark.parametrize(
  "row",
  [
    {"question": "Hi?", "image": "a.jpg"},
    {"prompt": "Hi?", "images": ["a.jpg"]},
    {"prompt": "<image>\nHi?", "images": ["a.jpg"]},
    {
      "prompt": [
        _say("user", [{"type": "image"}, {"type": "text", "text": "Hi?"}])
      ],
      "images": ["a.jpg"],
    },
  ],
)
def test_images_of_a_prompt(row):
  row = row | {"chosen": "Yes.", "rejected": "No."}
  assert _shown(_entry(row).parts) == ["([a.jpg])", "(Hi?)", "Yes.</s>"]


def test_odd_pairs_are_told():
  with pytest.raises(lines.BadLine, match="3 stands for the words"):
    _entry({"prompt": "Hi?", "chosen": 3})
  with pytest.raises(lines.BadLine, match="messages beside chosen"):
    _entry({"prompt": "Hi?", "chosen": "Yes.", "messages": [_say("user", "x")]})


@pytest.mark.parametrize(
  "row",
  [
    # FineWeb, Dolma, RedPajama 1 and 2, by their cards
    {
      "text": "Words.",
      "id": "<urn:uuid:1>",
      "dump": "CC-MAIN-2024-10",
      "url": "http://a.org",
      "file_path": "s3://a/b.warc.gz",
      "language": "en",
      "language_score": 0.9,
      "token_count": 3,
    },
    {
      "id": "1",
      "text": "Words.",
      "source": "common-crawl",
      "added": "2024-01-01",
      "created": "2024-01-01",
      "metadata": {"url": "http://a.org"},
    },
    {
      "text": "Words.",
      "meta": "{'url': 'http://a.org'}",
      "red_pajama_subset": "common_crawl",
    },
    {"raw_content": "Words.", "url": "http://a.org", "nlines": 1},
  ],
)
def test_rows_of_text(row):
  entry = _entry(row)
  assert (entry.text, entry.images()) == ("Words.", [])


def test_a_row_of_ours_is_left_as_it_is():
  row = {"image": "a.jpg", "caption": "a cat", "texts": None}
  assert foreign.rewritten(row) is row
