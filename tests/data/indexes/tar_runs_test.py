"""Runs of plain files, found at once: the same as found one by one."""

import io
import random
import tarfile

from lavit_jax.data.indexes import tar_members, tar_runs
from tests.data.indexes import tars

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def archive(rng, count):
  """Bytes of an archive of many files, now and then of an unusual one."""
  file = io.BytesIO()
  inner = io.BytesIO()
  with tarfile.open(fileobj=inner, mode="w") as tar:
    for i in range(9):
      tar.addfile(tarfile.TarInfo(f"in/{i}"))
  with tarfile.open(fileobj=file, mode="w", format=rng.choice(FORMATS)) as tar:
    for i in range(count):
      info = tarfile.TarInfo(f"{i:06d}.jpg")
      data = rng.randbytes(rng.choice((0, 1, 511, 512, 513, 3000)))
      unusual = rng.randrange(120)
      if unusual == 0:
        info.name = f"folder{'x' * 90}/{i:06d}.jpg"
      elif unusual == 1:
        info.type, info.linkname, data = tarfile.SYMTYPE, "a", b""
      elif unusual == 2:
        info.name, info.type, data = f"d{i}", tarfile.DIRTYPE, b""
      elif unusual == 3:
        data = inner.getvalue()
      elif unusual == 4:
        data = bytes(100_000)
      elif unusual == 5:
        info.pax_headers = {"path": f"é{i}.jpg"}
      elif unusual < 20:
        info.mtime = 1.5
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  return file.getvalue()


def test_runs_find_what_is_found_one_by_one():
  rng = random.Random(0)
  kinds = set()
  for count in (1, 9, 400, 2000, 2000, 2000):
    data = archive(rng, count)
    members = tars.found(data)
    kinds |= {type(member) for member in members}
    assert len(members) >= 0.9 * count
    for _ in range(3):  # and of one that is cut anywhere behind its head
      tars.found(data[: rng.randrange(600, len(data))])
  assert kinds == {tar_members.Member, tar_members.Odd}


def test_a_run_goes_to_the_end_of_plain_files():
  """Of files whose times are not whole seconds, too, as webdataset writes."""
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
    for i in range(50):
      info = tarfile.TarInfo(f"{i}.txt")
      info.mtime, info.size = 1.25, 5
      tar.addfile(info, io.BytesIO(b"words"))
  data = file.getvalue()
  run = tar_runs.find(data, 0, len(data))
  files = list(run.files())
  assert [name for name, _, _ in files] == [b"%d.txt" % i for i in range(50)]
  assert {data[start : start + size] for _, start, size in files} == {b"words"}
  assert run.end == 50 * 2048
  assert not len(tar_runs.find(data, 0, 100).names)  # the archive is cut off
