"""Members of tar archives: every format, what is no file, what is broken."""

import tarfile

import pytest

from lavit_jax.data.indexes import tar_members
from tests.data.indexes import tars


def found(data):
  """All that is found in the bytes of an archive, with names as texts."""
  return [
    member._replace(name=member.name.decode()) for member in tars.found(data)
  ]


def names(data):
  return [member.name for member in found(data)]


@pytest.mark.parametrize(
  "format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_members_are_those_of_tarfile(tmp_path, format):
  deep = "/".join(["folder"] * 18)
  files = [
    ("a.jpg", b"x" * 700),
    ("empty.txt", b""),
    (f"{deep}/b.jpg", b"y" * 512),
    ("große Häuser/ü.txt", "ü".encode()),
  ]
  if format != tarfile.USTAR_FORMAT:
    files.append(("n" * 300 + ".txt", b"long"))
  path = tars.write(tmp_path / "a.tar", files, format)
  with tarfile.open(path) as tar:
    expected = [(m.name, m.offset_data, m.size) for m in tar]
  assert found(path.read_bytes()) == expected
  data = path.read_bytes()
  for name, start, size in found(data):
    assert data[start : start + size] == dict(files)[name]


def test_far_and_near_headers_are_found(tmp_path):
  """Large files are skipped, not read."""
  sizes = [10, 3 << 20, 20, 100_000, 5, 0, 2 << 20, 7]
  files = [(f"{i}.bin", bytes(size)) for i, size in enumerate(sizes)]
  data = tars.write(tmp_path / "a.tar", files).read_bytes()
  total = 0

  def read(start, size):
    nonlocal total
    total += len(data[start : start + size])
    return data[start : start + size]

  members = list(tar_members.members(tar_members.Window(read, len(data))))
  assert [m.size for m in members] == sizes
  assert total < len(data) / 2


def test_what_is_no_file_is_named(tmp_path):
  entries = []
  for name, kind in (
    ("folder", tarfile.DIRTYPE),
    ("../../etc/link", tarfile.SYMTYPE),
    ("hard", tarfile.LNKTYPE),
    ("disk", tarfile.BLKTYPE),
    ("pipe", tarfile.FIFOTYPE),
  ):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    entries.append((info, b""))
  entries.append(("a.jpg", b"1"))
  data = tars.write(tmp_path / "a.tar", entries).read_bytes()
  *odd, member = found(data)
  assert member.name == "a.jpg"
  assert [(o.name, o.reason) for o in odd] == [
    ("../../etc/link", "is a symbolic link"),
    ("hard", "is a hard link"),
    ("disk", "is a device"),
    ("pipe", "is a pipe"),
  ]


def test_a_v7_archive_is_read(tmp_path):
  """It has no mark, only a checksum."""
  data = bytearray(
    tars.write(tmp_path / "a.tar", [("a.txt", b"hi")]).read_bytes()
  )
  data[257:512] = bytes(255)
  total = sum(data[:148]) + 8 * 32 + sum(data[156:512])
  data[148:156] = b"%06o\0 " % total
  assert names(bytes(data)) == ["a.txt"]
  data[0:1] = b"b"  # and now the checksum is wrong
  with pytest.raises(tar_members.NoTar, match="no tar archive"):
    names(bytes(data))


def test_a_size_of_pax_is_that_of_the_file_behind_other_headers(tmp_path):
  """Between them GNU's name may stand, which has a size of its own."""
  info = tarfile.TarInfo("a.jpg")
  info.size, info.pax_headers = 700, {"comment": "x", "size": "700"}
  head = info.tobuf(tarfile.PAX_FORMAT)[:-512]
  long = tarfile.TarInfo("n" * 150 + ".jpg")
  long.size = 700
  data = head + long.tobuf(tarfile.GNU_FORMAT) + bytes(1024) + bytes(1024)
  (member,) = found(data)
  assert member == (long.name, len(head) + 512 + 512 + 512, 700)


def test_sizes_of_more_than_eight_gigabytes_are_read():
  header = bytearray(512)
  header[:5] = b"a.jpg"
  header[124:136] = b"\x80" + (20 << 30).to_bytes(11, "big")
  header[156:157], header[257:263] = b"0", b"ustar\0"
  read = lambda start, size: bytes(header) if start == 0 else bytes(512)
  (member,) = tar_members.members(tar_members.Window(read, (20 << 30) + 1024))
  assert member == (b"a.jpg", 512, 20 << 30)


@pytest.mark.parametrize(
  "size", [b"-0000001000\0", b"000000_1000\0", b"+0000001000\0", b"junk" * 3]
)
def test_a_size_that_is_none_ends_the_archive(tmp_path, size):
  """A negative one would lead back to the same header, again and again."""
  files = [(f"{i}.jpg", b"1" * 512) for i in range(4)]
  data = bytearray(tars.write(tmp_path / "a.tar", files).read_bytes())
  data[1024 + 124 : 1024 + 136] = size
  first, odd = found(bytes(data))
  assert first.name == "0.jpg"
  assert odd.reason == "has no size: the rest of the archive is lost"


def test_joined_archives_are_read_to_the_end(tmp_path):
  parts = [[(f"{n}{i}.jpg", b"1") for i in range(3)] for n in "ab"]
  data = [tars.write(tmp_path / "a.tar", p).read_bytes() for p in parts]
  assert names(b"".join(data)) == ["a0.jpg", "a1.jpg", "a2.jpg"] + [
    "b0.jpg",
    "b1.jpg",
    "b2.jpg",
  ]
  assert len(names(data[0] + bytes(5 << 20))) == 3  # zeros alone are its end


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_a_hole_is_no_end(tmp_path, blocks):
  """What an interrupted download into a file of full size leaves."""
  files = [(f"{i}.jpg", b"1" * 512) for i in range(8)]
  data = bytearray(tars.write(tmp_path / "a.tar", files).read_bytes())
  data[1024 : 1024 + 512 * blocks] = bytes(512 * blocks)
  members = found(bytes(data))
  odd = [m for m in members if isinstance(m, tar_members.Odd)]
  assert "zeros" in odd[0].reason
  if blocks > 1:  # after whole members the next ones are found
    assert len(members) == 1 + 8 - blocks // 2


@pytest.mark.parametrize("cut", [100, 512, 700, 1500, 1536])
def test_a_cut_archive_gives_what_is_whole(tmp_path, cut):
  files = [("a.jpg", b"1" * 512), ("b.jpg", b"2" * 512)]
  data = tars.write(tmp_path / "a.tar", files).read_bytes()[:cut]
  if cut < 512:
    with pytest.raises(tar_members.NoTar, match="shorter than"):
      found(data)
    return
  whole = [m for m in found(data) if isinstance(m, tar_members.Member)]
  odd = [m for m in found(data) if isinstance(m, tar_members.Odd)]
  assert len(whole) == (cut >= 1024)
  assert all("cut off" in o.reason for o in odd)
  assert len(odd) == 1


def test_junk_in_the_middle_loses_the_rest_and_says_so(tmp_path):
  files = [("a.jpg", b"1" * 512), ("b.jpg", b"2" * 512), ("c.jpg", b"3")]
  data = bytearray(tars.write(tmp_path / "a.tar", files).read_bytes())
  data[1024:1536] = b"junk" * 128
  first, odd = found(bytes(data))
  assert first.name == "a.jpg"
  assert odd == ("byte 1024", "is no header: the rest of the archive is lost")


@pytest.mark.parametrize(
  ("start", "says"),
  [(b"\x1f\x8b", "gunzip"), (b"\x28\xb5\x2f\xfd", "unzstd"), (b"PK", "no tar")],
)
def test_other_files_are_named(start, says):
  with pytest.raises(tar_members.NoTar, match=says):
    found(start + b"x" * 2000)
