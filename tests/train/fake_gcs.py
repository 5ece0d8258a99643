"""A Google Cloud Storage of this process: for fsspec, and over HTTP.

epath reads and writes small files through fsspec's `gcs`; TensorStore has a
driver of its own for arrays, which is pointed at the server here. Both see the
same objects.
"""

import contextlib
import http.server
import json
import threading
import urllib.parse
from unittest import mock

import fsspec
from etils.epath import backend
from fsspec.implementations import memory
from orbax.checkpoint._src.path import gcs_utils


class Files(memory.MemoryFileSystem):
  """`gs://bucket/name` as memory, with what gcsfs makes of folders.

  There are none: a folder is there while an object is below it, and to make
  or remove one does nothing.
  """

  protocol = ("gcs", "gs")
  store: dict = {}  # noqa: RUF012, as fsspec has it
  pseudo_dirs = [""]  # noqa: RUF012
  cachable = False

  def __init__(self, *args, **kwargs):
    kwargs.pop("finalize_on_close", None)
    super().__init__(*args, **kwargs)

  @classmethod
  def _strip_protocol(cls, path):
    path = str(path)
    for prefix in ("gs://", "gcs://"):
      path = path.removeprefix(prefix)
    return "/" + path.strip("/") if path.strip("/") else ""

  def mkdir(self, path, create_parents=True, **kwargs):
    bucket = "/" + self._strip_protocol(path).strip("/").partition("/")[0]
    if not self.exists(bucket):
      raise FileNotFoundError(bucket)

  def makedirs(self, path, exist_ok=False):
    self.mkdir(path)

  def rmdir(self, path):
    pass

  def cp_file(self, path1, path2, **kwargs):
    if not self.isfile(path1):
      raise FileNotFoundError(path1)
    super().cp_file(path1, path2, **kwargs)

  def _open(self, path, mode="rb", **kwargs):
    assert mode in ("rb", "wb"), f"an object store cannot open with {mode!r}"
    return super()._open(path, mode=mode, **kwargs)


class _Server(http.server.BaseHTTPRequestHandler):
  """As much of the JSON API as TensorStore uses."""

  protocol_version = "HTTP/1.1"
  # Head and body in one packet: two would wait 40 ms for each other.
  disable_nagle_algorithm, wbufsize = True, -1
  generations: dict = {}  # noqa: RUF012
  fs = None

  def log_message(self, *args):
    pass

  def _parts(self):
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
    words = url.path.removeprefix("/upload").split("/", 6)
    bucket = words[4]
    name = urllib.parse.unquote(words[6]) if len(words) > 6 else None
    return bucket, name, query

  def _send(self, status, body=b"", generation=None):
    if isinstance(body, dict):
      body = json.dumps(body).encode()
    self.send_response(status)
    self.send_header("Content-Length", str(len(body)))
    if generation is not None:
      self.send_header("x-goog-generation", str(generation))
    self.end_headers()
    self.wfile.write(body)

  def _generation(self, path):
    """0: there is no such object. fsspec's writes count as well."""
    file = self.fs.store.get(path)
    if file is None:
      return 0
    known, number = self.generations.get(path, (None, 0))
    if known is not file:
      number += 1
      self.generations[path] = (file, number)
    return number

  def _mismatch(self, path, query):
    wanted = query.get("ifGenerationMatch")
    return wanted is not None and int(wanted) != self._generation(path)

  def do_GET(self):
    bucket, name, query = self._parts()
    if name is None:
      self._list(bucket, query)
      return
    path = f"/{bucket}/{name}"
    generation = self._generation(path)
    if not generation:
      self._send(404)
      return
    unwanted = query.get("ifGenerationNotMatch")
    if unwanted is not None and int(unwanted) == generation:
      self._send(304)
      return
    data = self.fs.store[path].getvalue()
    asked, status = self.headers.get("Range"), 200
    if query.get("alt") != "media":
      self._send(200, self._described(bucket, path))
      return
    if asked:
      first, _, last = asked.removeprefix("bytes=").partition("-")
      start, stop = int(first), int(last) + 1 if last else len(data)
      status = 206
      if start >= len(data) and data:
        self._send(416)
        return
      whole, data = len(data), data[start:stop]
      self.send_response(status)
      end = start + len(data) - 1
      self.send_header("Content-Range", f"bytes {start}-{end}/{whole}")
      self.send_header("Content-Length", str(len(data)))
      self.send_header("x-goog-generation", str(generation))
      self.end_headers()
      self.wfile.write(data)
      return
    self._send(status, data, generation)

  def _described(self, bucket, path):
    return {
      "name": path.removeprefix(f"/{bucket}/"),
      "bucket": bucket,
      "generation": str(self._generation(path)),
      "metageneration": "1",
      "size": str(self.fs.store[path].getbuffer().nbytes),
      "updated": "2025-01-01T00:00:00Z",
      "timeCreated": "2025-01-01T00:00:00Z",
      "storageClass": "STANDARD",
      "etag": "x",
      "id": path,
    }

  def _list(self, bucket, query):
    start = f"/{bucket}/{query.get('prefix', '')}"
    low, high = query.get("startOffset", ""), query.get("endOffset")
    names = sorted(p for p in self.fs.store if p.startswith(start))
    items = [self._described(bucket, path) for path in names]
    items = [
      i
      for i in items
      if i["name"] >= low and (high is None or i["name"] < high)
    ]
    self._send(200, {"kind": "storage#objects", "items": items})

  def do_POST(self):
    bucket, _, query = self._parts()
    data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
    path = f"/{bucket}/{query['name']}"
    if self._mismatch(path, query):
      self._send(412)
      return
    self.fs.pipe_file(f"gs:/{path}", data)
    self._send(200, self._described(bucket, path))

  def do_DELETE(self):
    bucket, name, query = self._parts()
    path = f"/{bucket}/{name}"
    if self._mismatch(path, query):
      self._send(412)
    elif self._generation(path):
      del self.fs.store[path]
      self._send(204)
    else:
      self._send(404)


def upload(fs, folder, target) -> None:
  """Copies a folder of the disk to `gs://…`."""
  for path in sorted(folder.rglob("*")):
    if path.is_file():
      name = f"{target}/{path.relative_to(folder).as_posix()}"
      fs.pipe_file(name, path.read_bytes())


@contextlib.contextmanager
def serving(monkeypatch):
  """Inside, `gs://` is here; yields what fsspec sees of it."""
  Files.store, Files.pseudo_dirs = {}, [""]
  for name in Files.protocol:
    fsspec.register_implementation(name, Files, clobber=True)
  backend.fsspec_backend._get_filesystem.cache_clear()
  fs = Files()
  fs.pipe_file("gs://bucket/.exists", b"")
  _Server.fs, _Server.generations = fs, {}
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  address = f"http://127.0.0.1:{server.server_port}"
  monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
  monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
  flat = mock.Mock(hierarchical_namespace_enabled=False)
  monkeypatch.setattr(gcs_utils, "get_bucket", lambda name: flat)
  try:
    yield fs
  finally:
    server.shutdown()
    server.server_close()
    backend.fsspec_backend._get_filesystem.cache_clear()
