"""`lavit data`: check, show and prepare, on small data."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lavit_jax.commands import main
from lavit_jax.data.sources import jsonl
from lavit_jax.jobs import downloads
from tests.data.indexes import table_files, tars


@pytest.fixture(autouse=True)
def _indexes(tmp_path, monkeypatch):
  monkeypatch.setenv("LAVIT_INDEXES", str(tmp_path / "kept"))


def _lines(tmp_path, count=6, bad=()):
  rows = [{"image": f"{i}.png", "caption": f"image {i}"} for i in range(count)]
  rows += [{"text": "some words"}]
  for i in range(count):
    data = b"no image" if i in bad else table_files.encoded(i)
    (tmp_path / f"{i}.png").write_bytes(data)
  path = tmp_path / "my.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def _run(*words):
  return main.main(["data", *map(str, words)])


def test_good_data_pass_and_bad_data_are_listed(tmp_path, capsys):
  path = _lines(tmp_path)
  assert _run("check", path, "--workers", 1) == 0
  out = capsys.readouterr().out
  assert "my.jsonl: 6 images" in out
  assert "6 image_text" in out
  assert "1 text" in out
  assert "can be trained on" in out

  _lines(tmp_path, bad=(2,))
  with path.open("a") as file:
    file.write("{no json\n")
  listed = tmp_path / "bad.jsonl"
  words = ("check", path, "--workers", 1, "--json", "--bad", listed)
  assert _run(*words) == 1
  summary = json.loads(capsys.readouterr().out)
  assert (summary["bad_images"], summary["left_out"]) == (1, 1)
  assert summary["passed"] is False
  assert list(summary["reasons"]) == ["is no image of a known format"]
  bad = [json.loads(line) for line in listed.read_text().splitlines()]
  assert [one["name"] for one in bad] == ["my.jsonl:8", "2.png"]
  assert _run(*words, "--limit-share", 0.5) == 0


def test_a_page_shows_samples_and_what_is_bad(tmp_path, capsys):
  path = _lines(tmp_path, bad=(2,))
  page = tmp_path / "pages" / "my.html"
  assert _run("show", path, "--html", page, "--workers", 1) == 0
  text = page.read_text()
  assert text.count("data:image/png;base64,") >= 5
  shown = ("image 3", "some words", "2.png", "shorter side", "What is bad")
  assert all(words in text for words in shown)
  assert "http" not in text.replace("http://www.w3.org", "")
  assert str(page) in capsys.readouterr().out


def test_prepared_data_are_data_again(tmp_path, capsys):
  path, out = _lines(tmp_path), tmp_path / "out"
  words = ("prepare", path, out, "--workers", 1, "--license", "CC0")
  assert _run(*words, "--min-chars", 2, "--duplicates", "exact") == 0
  said = capsys.readouterr().out
  assert "6 images, 6 captions, 1 text in 2 shards" in said
  assert f"--config.data.path={out}" in said
  assert json.loads((out / "manifest.json").read_text())["license"] == "CC0"
  assert _run("check", out, "--workers", 1) == 0
  shard = out / "about-00000-of-00001.array_record"
  shard.write_bytes(shard.read_bytes() + b" ")
  capsys.readouterr()
  assert _run("check", out, "--workers", 1, "--limit-share", 1) in (1, 2)
  captured = capsys.readouterr()
  assert shard.name in captured.out + captured.err


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (("check", "none.jsonl"), "no such file or directory"),
    (("prepare", "{data}", "gs://bucket/x"), "written to a disk"),
    (("prepare", "{data}", "{data}"), "is a file, but a folder"),
    (("show", "{data}", "--html", "{folder}"), "is a folder"),
    (("check", "{data}", "--retry-list", "{folder}/x.txt"), "img2dataset"),
    (("prepare", "{data}", "{folder}"), "is no prepared data"),
  ],
)
def test_mistakes_are_told_before_any_work(tmp_path, words, said, capsys):
  names = {"data": _lines(tmp_path), "folder": tmp_path}
  words = [word.format(**names) for word in words]
  assert _run(*words) == 2
  err = capsys.readouterr().err
  assert said in err


def test_the_speed_of_data_is_measured(tmp_path, capsys):
  path = _lines(tmp_path)
  words = ("bench", path, "--seconds", 0.3, "--batch", 4, "--image-size", 16)
  assert _run(*words, "--workers", 1, "--decoding", "fast", "--json") == 0
  found = json.loads(capsys.readouterr().out)
  assert found["images_per_second"] > 0
  assert (found["workers"], found["threads"], found["bad"]) == (1, 2, 0)
  assert _run(*words) == 0
  assert "images a second with 0 processes" in capsys.readouterr().out


def _downloaded(folder):
  """Archives of img2dataset, with the table of what it tried to download."""
  tars.shards(folder, 1)
  rows = {
    "url": [f"http://a.org/{i}.jpg" for i in range(6)],
    "caption": ["a", None, "c", "d", "e", "f"],
    "status": ["success"] * 4 + ["failed_to_download", "failed_to_resize"],
    "error_message": [None] * 4
    + ["HTTP Error 404: Not Found", "Image decoding error"],
  }
  pq.write_table(pa.table(rows), folder / "00000.parquet")
  return folder


def test_downloads_are_counted_and_tried_again(tmp_path, capsys):
  folder = _downloaded(tmp_path / "web")
  retry = tmp_path / "retry.jsonl"
  words = ("check", folder, "--workers", 1, "--retry-list", retry)
  assert _run(*words) == 0
  out = capsys.readouterr().out
  assert "4 success" in out
  assert "1 failed_to_download: HTTP Error 404: Not Found" in out
  assert [json.loads(line) for line in retry.read_text().splitlines()] == [
    {"url": "http://a.org/4.jpg", "caption": "e"},
    {"url": "http://a.org/5.jpg", "caption": "f"},
  ]
  plain = tmp_path / "retry.txt"
  rows = downloads.rows(downloads.beside(folder))
  assert downloads.write_retries(plain, rows) == 2
  assert plain.read_text() == "http://a.org/4.jpg\nhttp://a.org/5.jpg\n"


def _page(folder):
  (folder / "page.html").write_text("<!doctype html>old")
  return folder / "page.html"


def test_a_report_overwrites_nothing_but_such_a_report(tmp_path, capsys):
  """Least of all the data that it is about, and no special file."""
  path = _lines(tmp_path)
  image, device, kept = tmp_path / "0.png", tmp_path / "pipe", tmp_path / "kept"
  os.mkfifo(device)
  kept.write_text("<!doctype html>")
  kept.chmod(0o444)
  before = {p: p.read_bytes() for p in (path, image, kept)}
  for option, command in (
    ("--html", "show"),
    ("--bad", "check"),
    ("--retry-list", "check"),
  ):
    for target, said in (
      (path, "is there already, and is no earlier report"),
      (image, "is there already, and is no earlier report"),
      (device, "is no plain file"),
      (kept, "may not be written to"),
      ("", "is empty"),
    ):
      assert _run(command, path, option, target) == 2
      assert said in capsys.readouterr().err
  assert {p: p.read_bytes() for p in before} == before
  beside = tmp_path / "page.html.partial"
  beside.write_text("mine")
  for _ in range(2):
    assert _run("show", path, "--html", _page(tmp_path), "--workers", 1) == 0
    bad = tmp_path / "bad.jsonl"
    assert _run("check", path, "--bad", bad, "--workers", 1) == 0
  assert "image 3" in (tmp_path / "page.html").read_text()
  assert beside.read_text() == "mine"


def test_a_bench_decodes_each_image_anew(tmp_path, monkeypatch, capsys):
  path, decoded = _lines(tmp_path), []
  real = jsonl.JsonlSource._decode
  count = lambda self, i: decoded.append(i) or real(self, i)
  monkeypatch.setattr(jsonl.JsonlSource, "_decode", count)
  words = ("bench", path, "--seconds", 0.2, "--batch", 4, "--image-size", 16)
  assert _run(*words, "--json") == 0
  assert len(decoded) > 24
  for seconds in ("0", "-1"):
    with pytest.raises(SystemExit):
      _run("bench", path, "--seconds", seconds)
    assert "expected a number above 0" in capsys.readouterr().err


def test_a_folder_with_a_manifest_of_its_own_is_data(tmp_path):
  _lines(tmp_path)
  (tmp_path / "manifest.json").write_text('["of", "something", "else"]')
  assert _run("check", tmp_path, "--workers", 1) == 0


def test_bad_images_of_a_folder_are_named_by_their_files(tmp_path, capsys):
  folder = tmp_path / "images"
  folder.mkdir()
  for i in range(4):
    (folder / f"{i}.png").write_bytes(table_files.encoded(i))
    (folder / f"{i}.txt").write_text(f"image {i}")
  (folder / "2.png").write_bytes(b"no image")
  assert _run("check", folder, "--workers", 1) == 1
  assert str(folder / "2.png") in capsys.readouterr().out
