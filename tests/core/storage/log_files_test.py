"""Logs in an object store: in segments, by a thread, and read as one."""

import json
import threading

import pytest
from etils import epath

from lavit_jax.core.storage import log_files
from lavit_jax.train.telemetry import event_files, writers
from tests.train import fake_gcs

_FOLDER = "gs://bucket/run"


@pytest.fixture
def store(monkeypatch):
  """Returns fsspec's store; `store.puts` has (name, size) of each upload."""
  with fake_gcs.serving(monkeypatch) as fs:
    fs.puts = []
    kind = type(epath.Path(_FOLDER))
    put = kind.write_bytes

    def counted(self, data):
      fs.puts.append((self.name, len(data)))
      return put(self, data)

    monkeypatch.setattr(kind, "write_bytes", counted)
    monkeypatch.setattr(log_files, "_MIN_SECONDS", 0.0)
    yield fs


def _write(path, steps, resume=None, settle=True):
  writer = writers.JsonLinesWriter(path, resume_step=resume)
  for step in steps:
    writer.write_scalars(step, {"loss": step})
    writer.flush()
    if settle:  # the thread is done before the next line
      upload = writer._file._object._upload
      upload.result() if upload else None
  writer.close()


def _steps(path):
  return [row["step"] for row in writers.read_json_lines(path)]


def test_a_full_segment_is_never_uploaded_again(store, monkeypatch):
  monkeypatch.setattr(log_files, "SEGMENT", 400)
  path = epath.Path(f"{_FOLDER}/metrics.jsonl")
  _write(path, range(60))
  names = [name for name, _ in store.puts]
  assert names == sorted(names)  # never one before the newest
  assert max(size for _, size in store.puts) <= 400
  assert len(set(names)) > 5
  assert _steps(path) == list(range(60))


@pytest.mark.parametrize("resume", [0, 7, 30, 59, 90])
def test_a_resumed_run_drops_the_later_steps_of_all_segments(
  store, monkeypatch, resume
):
  monkeypatch.setattr(log_files, "SEGMENT", 400)
  path = epath.Path(f"{_FOLDER}/metrics.jsonl")
  _write(path, range(60))
  before = {name: store.cat(name) for name in store.ls("bucket/run", False)}
  first = min(resume, 59) + 1
  _write(path, range(first, first + 10), resume=resume)
  assert _steps(path) == list(range(first + 10))
  if resume == 90:  # nothing was dropped
    assert all(store.cat(name) == data for name, data in before.items())


def test_an_unsplit_log_of_earlier_versions_is_read_and_trimmed(store):
  path = epath.Path(f"{_FOLDER}/batches.jsonl")
  lines = [json.dumps({"step": step}) + "\n" for step in range(5)]
  path.write_bytes("".join(lines).encode() + b'{"step": 5, "cut')
  assert _steps(path) == [0, 1, 2, 3, 4]
  _write(path, [3, 4], resume=2)
  assert _steps(path) == [0, 1, 2, 3, 4]
  assert [p.name for p in log_files.pieces(path)] == [
    "batches.jsonl",
    "batches-00000.jsonl",
  ]


def test_segments_that_were_copied_to_a_disk_are_continued_there(
  store, monkeypatch, tmp_path
):
  monkeypatch.setattr(log_files, "SEGMENT", 400)
  _write(epath.Path(f"{_FOLDER}/metrics.jsonl"), range(20))
  for name in store.ls("bucket/run", False):
    (tmp_path / name.rpartition("/")[2]).write_bytes(store.cat(name))
  path = tmp_path / "metrics.jsonl"
  _write(path, range(16, 25), resume=15, settle=False)
  assert _steps(path) == list(range(25))


def test_training_neither_waits_for_uploads_nor_sleeps(store, monkeypatch):
  """While the store hangs, lines are taken; then all of them are there."""
  release, sleepers = threading.Event(), set()
  kind = type(epath.Path(_FOLDER))
  put = kind.write_bytes

  def hanging(self, data):
    assert release.wait(20)
    return put(self, data)

  def sleep(seconds):
    if seconds > 0:
      sleepers.add(threading.current_thread())

  monkeypatch.setattr(kind, "write_bytes", hanging)
  monkeypatch.setattr(log_files.time, "sleep", sleep)
  monkeypatch.setattr(log_files, "_MIN_SECONDS", 0.2)
  monkeypatch.setattr(log_files, "SEGMENT", 400)
  monkeypatch.setattr(event_files, "_SEGMENT", 400)
  writer = writers.create(_FOLDER)
  for step in range(30):
    writer.write_scalars(step, {"loss": step})
    writer.flush()
  assert not store.puts
  threading.Timer(0.1, release.set).start()
  writer.close()
  assert _steps(epath.Path(f"{_FOLDER}/metrics.jsonl")) == list(range(30))
  assert threading.main_thread() not in sleepers


def test_a_line_that_cannot_be_uploaded_is_an_error(store, monkeypatch):
  def refused(self, data):
    raise OSError("403")

  monkeypatch.setattr(type(epath.Path(_FOLDER)), "write_bytes", refused)
  log = log_files.open_log(epath.Path(f"{_FOLDER}/a.jsonl"))
  log.write(b"x\n")
  log.sync()
  assert log._object._upload.exception(20)  # the thread has met it
  with pytest.raises(OSError, match="403"):
    log.sync()
  log = log_files.open_log(epath.Path(f"{_FOLDER}/b.jsonl"))
  log.write(b"x\n")
  with pytest.raises(OSError, match="403"):
    log.close()


@pytest.fixture
def failing_once(store, monkeypatch):
  """Of every object, the first upload fails."""
  kind, met = type(epath.Path(_FOLDER)), set()
  put = kind.write_bytes

  def once(self, data):
    if self.name not in met:
      met.add(self.name)
      raise OSError("503")
    return put(self, data)

  monkeypatch.setattr(kind, "write_bytes", once)
  return store


def _failed(log):
  """Writes a line whose upload fails, and waits for it."""
  log.write(b"first\n")
  log.sync()
  assert log._object._upload.exception(20)


def test_lines_of_a_failed_upload_are_in_the_next_one(failing_once, caplog):
  path = epath.Path(f"{_FOLDER}/a.jsonl")
  log = log_files.open_log(path)
  _failed(log)
  log.write(b"second\n")
  log.close()
  (piece,) = log_files.pieces(path)
  assert piece.read_bytes() == b"first\nsecond\n"
  assert "503" in caplog.text  # noted, though nothing was lost


def test_a_call_that_failed_may_be_repeated(failing_once):
  path = epath.Path(f"{_FOLDER}/a.jsonl")
  log = log_files.open_log(path)
  _failed(log)
  with pytest.raises(OSError, match="503"):
    log.sync()
  log.sync()
  log._object._upload.result()
  (piece,) = log_files.pieces(path)
  assert piece.read_bytes() == b"first\n"
  log.close()


def test_a_full_segment_is_uploaded_completely_after_an_error(
  failing_once, monkeypatch
):
  monkeypatch.setattr(log_files, "SEGMENT", 8)
  path = epath.Path(f"{_FOLDER}/a.jsonl")
  log = log_files.open_log(path)
  _failed(log)
  log.write(b"second\n")  # in the next segment, whose one upload fails
  with pytest.raises(OSError, match="503"):
    log.close()
  with pytest.raises(OSError, match="503"):
    log.close()  # not in silence
  (piece,) = log_files.pieces(path)
  assert piece.read_bytes() == b"first\n"


def test_an_error_of_the_newest_segment_hides_no_earlier_one(
  store, monkeypatch
):
  met = []

  def refused(self, data):
    met.append(self.name)
    raise OSError(f"403 {self.name}")

  monkeypatch.setattr(log_files, "SEGMENT", 8)
  monkeypatch.setattr(type(epath.Path(_FOLDER)), "write_bytes", refused)
  log = log_files.open_log(epath.Path(f"{_FOLDER}/a.jsonl"))
  for _ in range(3):
    log.write(b"a line\n")
  with pytest.raises(OSError, match="403") as caught:
    log.close()
  assert len(met) == 3  # all were tried, and all are told
  told, error = "", caught.value
  while error is not None:
    told += "".join([str(error), *getattr(error, "__notes__", ())])
    error = error.__context__
  assert all(name in told for name in met)


def test_tensorboard_reads_all_segments_in_order(store, monkeypatch, tmp_path):
  from tensorboard.backend.event_processing import event_file_loader

  monkeypatch.setattr(event_files, "_SEGMENT", 400)
  for start, resume in ((0, None), (30, 29)):
    writer = event_files.TensorBoardWriter(_FOLDER, resume_step=resume)
    for step in range(start, start + 30):
      writer.write_scalars(step, {"loss": step})
    writer.close()
  found, markers, files = [], 0, sorted(store.ls("bucket/run", False))
  assert len(files) > 5
  for name in files:
    path = tmp_path / name.rpartition("/")[2]
    path.write_bytes(store.cat(name))
    events = list(event_file_loader.EventFileLoader(str(path)).Load())
    assert events[0].file_version == "brain.Event:2"
    found += [e.step for e in events if e.HasField("summary")]
    markers += sum(e.HasField("session_log") for e in events)
  assert found == list(range(60))
  assert markers == 2  # of each start, not of each file
  assert max(size for _, size in store.puts) < 600
