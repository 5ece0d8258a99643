"""Samples of tar archives: WebDataset's rules, captions, faults."""

import json
import os
import pathlib
import random
import tarfile

import pytest

from lavit_jax.data.indexes import tar_members
from tests.data.indexes import tars


def of(path):
  return tars.samples(pathlib.Path(path).read_bytes())


def names(samples):
  ends = samples.columns["name_end"].tolist()
  starts = [0, *ends[:-1]]
  return [
    samples.names[a:b].decode() for a, b in zip(starts, ends, strict=True)
  ]


def captions(samples):
  ends = samples.columns["caption_end"].tolist()
  starts = [0, *ends[:-1]]
  return [
    samples.captions[a:b].decode() for a, b in zip(starts, ends, strict=True)
  ]


def test_samples_are_runs_of_files_up_to_the_first_dot(tmp_path):
  files = [
    ("d/17.JPG", tars.jpeg()),
    ("d/17.txt", b" a cat \n"),
    ("d/17.seg.png", b"other"),
    ("a.b/3.png", tars.jpeg()),
    ("plain", b"no field"),
    ("__meta__", b"WebDataset's own"),
    ("d/._17.jpg", b"macOS"),
    ("9.txt", b"\xef\xbb\xbfa dog"),
    ("9.jpeg", tars.jpeg()),
  ]
  path = tars.write(tmp_path / "a.tar", files)
  samples = of(path)
  assert names(samples) == ["9", "a.b/3", "d/17"]  # by name
  assert captions(of(path)) == ["a dog", "", "a cat"]
  assert samples.columns["length"].tolist() == [5, 0, 5]
  assert not samples.faults


def test_the_order_of_the_archive_does_not_matter(tmp_path):
  """img2dataset writes samples as they arrive."""
  kept = [tars.sample(f"{i:04d}", f"{i}", seed=i) for i in range(9)]
  one = of(tars.write(tmp_path / "a.tar", [f for s in kept for f in s]))
  random.Random(1).shuffle(kept)
  two = of(tars.write(tmp_path / "b.tar", [f for s in kept for f in s]))
  assert one.names == two.names
  assert one.captions == two.captions
  for name in ("image_size", "hash", "name_end", "length"):
    assert one.columns[name].tolist() == two.columns[name].tolist()


def test_the_caption_of_a_json_stands_in_for_a_missing_txt(tmp_path):
  metas = [
    {"caption": " in json ", "width": 3},
    {"caption": None},
    {"url": "x"},
  ]
  files = []
  for i, meta in enumerate(metas):
    files += tars.sample(f"{i}", meta=meta)
  files += tars.sample("3", "in txt", meta={"caption": "in json"})
  files += tars.sample("4", "", meta={"caption": "in json"})
  path = tars.write(tmp_path / "a.tar", files)
  # img2dataset writes an empty txt where there is no caption.
  assert captions(of(path)) == ["in json", "", "", "in txt", ""]
  assert (of(path).columns["json_size"] > 0).all()


@pytest.mark.parametrize(
  ("files", "says"),
  [
    ([("1.txt", b"alone")], "has no image"),
    ([("1.jpg", b"")], "has an image of 0 bytes"),
    ([("1.jpg", b"x"), ("1.JPG", b"y")], "has two files .jpg"),
    ([("1.jpg", b"x"), ("1.txt", b"\xff")], "not UTF-8"),
    ([("1.jpg", b"x"), ("1.json", b"{")], "json that cannot be read"),
    ([("1.jpg", b"x"), ("1.json", b'{"caption": 3}')], "no text"),
    ([("1.jpg", b"x"), ("1.json", b'{"caption": "\\ud83d"}')], "not UTF-8"),
    ([("1.jpg", b"x"), ("1.txt", b"x" * (2 << 20))], "more than 1 MiB"),
  ],
)
def test_what_cannot_be_used_is_counted_and_the_rest_is_used(
  tmp_path, files, says
):
  path = tars.write(tmp_path / "a.tar", [*files, *tars.sample("2", "fine")])
  samples = of(path)
  assert names(samples) == ["2"]
  ((reason, (count, named)),) = samples.faults.items()
  assert says in reason
  assert (count, named) == (1, ["1"])


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_other_encodings_stay_apart(tmp_path, format):
  names_ = [b"\xe9", b"\xe8", b"\xe7"]
  a, b, c = (name.decode(errors="surrogateescape") for name in names_)
  files = [(f"{a}.jpg", tars.jpeg()), (f"{b}.txt", b"of another")]
  files += tars.sample(c, "its own")
  path = tars.write(tmp_path / "a.tar", files, format)
  samples = of(path)
  assert captions(of(path)) == ["its own", ""]  # c, a
  assert samples.names == b"\xe7\xe9"
  assert samples.faults == {"has no image": [1, ["\\xe8"]]}
  json.dumps(samples.faults).encode()


def test_samples_are_those_of_the_webdataset_library(tmp_path):
  """But for their order, and for samples without an image."""
  wds = pytest.importorskip("webdataset")
  path = str(tmp_path / "a.tar")
  with wds.TarWriter(path) as sink:
    for i in (3, 1, 2):
      sink.write(
        {
          "__key__": f"d/{i}",
          "jpg": tars.jpeg(i),
          "json": {"caption": f"c{i}"},
          "txt": f"caption {i}",
        }
      )
  theirs = sorted(
    wds.DataPipeline(wds.SimpleShardList(path), wds.tarfile_samples),
    key=lambda sample: sample["__key__"],
  )
  data, samples = pathlib.Path(path).read_bytes(), of(path)
  assert names(samples) == [sample["__key__"] for sample in theirs]
  texts = [sample["txt"].decode() for sample in theirs]
  assert captions(samples) == texts
  for row, sample in zip(samples.columns, theirs, strict=True):
    for field, size, name in (
      ("image", "image_size", "jpg"),
      ("json", "json_size", "json"),
    ):
      start = int(row[field]) * 512
      assert data[start : start + int(row[size])] == sample[name]


def _odd_sample(rng, key):
  """Files of a sample, now and then of an unusual one."""
  files = tars.sample(key, f" {key} \n", meta={"caption": "c", "n": 1})
  image, text, json_file = files
  odd = [
    [image, text],
    [image, json_file],
    [text, json_file],
    [image, text, image],
    [(image[0].upper(), image[1]), text],
    [(f"{key}.png", image[1]), image, text],
    [(f"{key}.segmentation.png", b"x"), *files],
    [image, (text[0], b"\xff"), json_file],
    [image, (f"{key}.json", b"{")],
    [image, (f"{key}.json", b'{"caption": null}')],
    [(image[0], b""), text],
    [image, (f"{key}.txt", b"")],
    [image, ("plain", b""), text],
    [image, ("__own__/x.txt", b""), text],
    [(f"d/._{key}.jpg", b""), *files],
    [(f"d.x/{name}", data) for name, data in files],
    [(f"{key}.a/{name}", data) for name, data in files],
    [image, (f"{key}.txt2", b"x"), (f"{key}.TXT", b"capital")],
    [(f"{key}.{i}", b"") for i in range(20)] + files,
  ]
  return rng.choice(odd) if rng.random() < 0.15 else files


def test_samples_of_runs_are_those_of_files(tmp_path):
  rng = random.Random(2)
  reasons = set()
  for number, format in enumerate(
    (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT) * 2
  ):
    keys = [f"{k:07d}" for k in range(300)] + ["0000007", "n" * 95]
    files = [file for key in keys for file in _odd_sample(rng, key)]
    samples = of(tars.write(tmp_path / f"{number}.tar", files, format))
    assert len(samples.columns) > 250
    reasons |= set(samples.faults)
  assert len(reasons) >= 5


def test_mutated_archives_are_read_or_refused_in_words(tmp_path):
  """Whatever byte is changed, removed or added; nothing is read twice."""
  files = [f for i in range(6) for f in tars.sample(str(i), "x", meta={"a": i})]
  whole = tars.write(tmp_path / "a.tar", files).read_bytes()
  rng = random.Random(0)
  usable = 0
  for _ in range(300):
    data = bytearray(whole)
    for _ in range(rng.randint(1, 20)):
      at = rng.randrange(len(data))
      how = rng.randrange(4)
      if how == 0:
        data[at] = rng.randrange(256)
      elif how == 1:
        del data[at : at + rng.randint(1, 2000)]
      elif how == 2:
        data[at:at] = rng.randbytes(rng.randint(1, 700))
      else:
        at -= at % 512
        data[at : at + 512] = rng.randbytes(512)
      if len(data) < 2000:
        break
    try:
      samples = tars.samples(bytes(data))
    except tar_members.NoTar:
      continue
    tars.found(bytes(data))
    usable += len(samples.columns) > 0
    for row in samples.columns:
      assert int(row["image"]) * 512 + int(row["image_size"]) <= len(data)
      assert int(row["json"]) * 512 + int(row["json_size"]) <= len(data)
    json.dumps(samples.faults)
  assert usable > 100


@pytest.mark.shared
@pytest.mark.skipif(
  not os.environ.get("LAVIT_SHARED"), reason="needs LAVIT_SHARED"
)
def test_found_archives_are_read_as_described():
  root = pathlib.Path(os.environ["LAVIT_SHARED"]) / "data" / "F_webdataset"
  counts = [
    len(of(path).columns) for path in sorted(root.glob("cc3m_style/*.tar"))
  ]
  assert sum(counts) == 119
  faulty = of(root / "made_faulty_00000.tar")
  rows = json.loads((root / "made_faulty_00000.manifest.json").read_text())
  good = {row["key"] for row in rows if row["usable"]}
  assert good <= set(names(faulty))
  texts = zip(names(faulty), captions(faulty), strict=True)
  captioned = {name for name, text in texts if text}
  assert captioned == good | {"000", "007"}  # 007 is half a JPEG
  cut = of(root / "made_cut_00000.tar")
  assert cut.faults == {"is cut off": [1, ["000000027.jpg"]]}
