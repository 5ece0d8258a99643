import gzip
import json

import hypothesis
import pytest
from hypothesis import strategies as st

from lavit_jax.core import errors
from lavit_jax.data.records import lines
from lavit_jax.data.sources import jsonl

_ROWS = [{"text": "one"}, {"text": "zwei ü 😀"}, {"n": [1, {"a": "]"}]}]
_TEXT = st.text('a"]},\\ü😀\n', max_size=5)
_LINES = "\n".join(json.dumps(row) for row in _ROWS).encode()


def _rows(tmp_path, data):
  path = tmp_path / "d.jsonl"
  path.write_bytes(data)
  return list(lines.rows(path))


def _array(indent=None, ascii_only=False):
  return json.dumps(_ROWS, indent=indent, ensure_ascii=ascii_only).encode()


@pytest.mark.parametrize(
  "data",
  [
    _LINES,
    b"\xef\xbb\xbf" + _LINES,
    gzip.compress(_LINES),
    gzip.compress(_LINES[:17]) + gzip.compress(_LINES[17:]),
    _array(),
    _array(indent=2),
    b"\xef\xbb\xbf \r\n" + _array(ascii_only=True) + b"\n\n",
    gzip.compress(_array(indent=1)),
  ],
  ids=["lines", "bom", "gz", "gz2", "array", "indented", "padded", "array_gz"],
)
def test_lines_and_arrays_plain_or_gzipped_are_the_same_rows(tmp_path, data):
  assert _rows(tmp_path, data) == list(enumerate(_ROWS, start=1))


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(
  rows=st.lists(st.dictionaries(_TEXT, _TEXT, max_size=3), max_size=6),
  chunk=st.integers(1, 20),
  indent=st.sampled_from([None, 1]),
)
def test_an_array_is_read_the_same_wherever_it_is_cut(
  tmp_path_factory, rows, chunk, indent
):
  path = tmp_path_factory.mktemp("lines") / "d.json"
  text = json.dumps(rows, ensure_ascii=False, indent=indent)
  path.write_bytes(text.encode("utf-8", "surrogatepass"))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(lines, "_CHUNK", chunk)
    assert [row for _, row in lines.rows(path)] == rows


@pytest.mark.parametrize(
  ("data", "said"),
  [
    (_LINES.decode().encode("utf-16"), "UTF-16.*iconv"),
    (_LINES.decode().encode("utf-16-le"), "UTF-16.*iconv"),
    (_LINES.decode().encode("utf-16-be"), "UTF-16.*iconv"),
    (_LINES.decode().encode("utf-32"), "UTF-32.*iconv"),
    (b"PAR1....PAR1", "a Parquet file.*to_json"),
    (b"PK\x03\x04...", "zip archive.*unzip"),
    (b"\x28\xb5\x2f\xfd...", "damaged Zstandard"),
    (b"BZh91AY", "damaged bzip2"),
    (json.dumps({"images": _ROWS}, indent=1).encode(), "several lines.*jq -c"),
    (gzip.compress(_LINES * 9)[:-9], "damaged gzip"),
    (gzip.compress(_LINES * 9)[:40] + b"x" * 40, "damaged gzip"),
    (_array()[:-5], "item 3 .*cut off"),
    (_array()[:20], "item 2 .*cut off"),
    (b'[{"a": 1} {"b": 2}]', "item 1 .*followed by '{', expected a comma"),
    (b'[{"a": 1}]\n{"b": 2}', "item 1 .*follows the array's end"),
    (b"[", "item 1 .*cut off"),
    (b"[" * 100_000, "item 1 .*too deeply"),
  ],
  # By hand: what gzip writes holds the time, and xdist wants one name in
  # every process.
  ids=[
    "utf16",
    "utf16_le",
    "utf16_be",
    "utf32",
    "parquet",
    "zip",
    "zstd",
    "bzip2",
    "indented",
    "gzip_cut",
    "gzip_damaged",
    "array_cut_in_3",
    "array_cut_in_2",
    "array_no_comma",
    "array_then_line",
    "array_only_begun",
    "array_too_deep",
  ],
)
def test_another_kind_of_file_is_refused_with_advice(tmp_path, data, said):
  with pytest.raises(errors.DataError, match=f"(?s)d.jsonl.*{said}"):
    _rows(tmp_path, data)


@pytest.mark.parametrize(
  ("data", "said"),
  [
    (b"\xff\xd8\xff\xe0 JFIF", "is an image; expected"),
    (b"\x89PNG\r\n", "is an image; expected"),
    (b"some \0 bytes", "is no text; expected"),
  ],
)
def test_a_file_that_is_no_text_is_told_in_one_line(tmp_path, data, said):
  with pytest.raises(errors.DataError, match=said):
    _rows(tmp_path, data)


def test_an_unreadable_file_is_reported_with_the_cause(tmp_path, monkeypatch):
  def broken(path):
    raise OSError("the store does not answer")  # without a strerror

  monkeypatch.setattr(lines.files, "open_bytes", broken)
  with pytest.raises(errors.DataError, match=r"\(the store does not answer\)"):
    _rows(tmp_path, b"")


def test_items_of_an_array_that_are_not_objects_are_bad_lines(tmp_path):
  found = _rows(tmp_path, b'[{"a": 1}, 3, "x", {"b": 2}]')
  assert [n for n, _ in found] == [1, 2, 3, 4]
  assert [isinstance(r, lines.BadLine) for _, r in found] == [0, 1, 1, 0]


@pytest.mark.parametrize(
  ("array", "depth"),
  # Of an array: what every Python's parser can find the end of.
  [(False, 70), (False, 500), (False, 900), (False, 5000)]
  + [(True, 70), (True, 500)],
)
@pytest.mark.parametrize("field", ["x", "messages", "captions"])
def test_a_line_that_is_nested_deeply_is_a_bad_one(
  tmp_path, array, depth, field
):
  deep = f'{{"text": "hi", "{field}": {"[" * depth}{"]" * depth}}}'
  good = json.dumps({"text": "good", "x": [[["a"]]]})
  texts = [good, deep, good]
  path = tmp_path / "d.jsonl"
  path.write_text(f"[{','.join(texts)}]" if array else "\n".join(texts))
  source = jsonl.JsonlSource(path, 8, limit_share=0.5)
  assert list(source.faults.reasons) == ["d.jsonl:2"]
  assert source.num_examples("text") == 2


@pytest.mark.parametrize("data", [b"[]", b" [ ]\n", b"", b"\n \n"])
def test_an_empty_file_or_array_has_no_rows(tmp_path, data):
  assert _rows(tmp_path, data) == []


def test_half_a_character_in_an_array_is_one_bad_line(tmp_path):
  data = b'[{"text": "a"}, {"text": "cut \xf0\x9f"}, {"text": "b"}]'
  (tmp_path / "d.json").write_bytes(data)
  source = jsonl.JsonlSource(tmp_path / "d.json", 8, limit_share=0.5)
  assert list(source.faults.reasons) == ["d.json:2"]
  assert source.num_examples("text") == 2


def test_null_and_nan_are_absent_at_every_depth(tmp_path):
  row = {"a": None, "b": [None, {"c": float("nan"), "d": 1}], "e": float("inf")}
  ((_, found),) = _rows(tmp_path, json.dumps(row).encode())
  assert found == {"b": [{"d": 1}], "e": float("inf")}


def test_a_line_that_is_too_long_is_bad_and_the_next_one_is_read(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(lines, "_MAX_LENGTH", 100)
  data = b'{"text": "' + b"x" * 350 + b'"}\n' + _LINES
  (_, bad), *rest = _rows(tmp_path, data)
  assert "longer than" in str(bad)
  assert rest == list(enumerate(_ROWS, start=2))


def test_a_long_item_of_an_array_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(lines, "_MAX_LENGTH", 100)
  monkeypatch.setattr(lines, "_CHUNK", 16)
  with pytest.raises(errors.DataError, match="item 1 "):
    _rows(tmp_path, b'[{"text": "' + b"x" * 2000 + b'"}]')


def test_a_table_with_commas_shows_how_its_lines_begin(tmp_path):
  (tmp_path / "d.csv").write_text("image,caption\na.jpg,a cat\n")
  with pytest.raises(errors.DataError, match="begins with 'image,caption"):
    jsonl.JsonlSource(tmp_path / "d.csv", 8)
