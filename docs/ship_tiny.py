"""Makes lavit_jax/weights/tiny from a finished run, with a record of it.

  python docs/ship_tiny.py runs/quickstart

Parts are stored as float16; README.md beside them holds the steps, the seed,
the seconds and the held-out metrics of each stage.
"""

import json
import pathlib
import shutil
import sys

import jax.numpy as jnp

from lavit_jax.core.storage import checkpoints

_TARGET = pathlib.Path(__file__).parents[1] / "lavit_jax" / "weights" / "tiny"


def main(workdir: str) -> None:
  """Copies every part of WORKDIR/model and writes the record."""
  source = pathlib.Path(workdir) / "model"
  shutil.rmtree(_TARGET, ignore_errors=True)
  _TARGET.mkdir(parents=True)
  shutil.copyfile(source / "tokenizer.model", _TARGET / "tokenizer.model")
  lines = ["# How these weights were made", ""]
  lines += ["Each part by `lavit train` with the config in its part.json, then"]
  lines += ["`python docs/ship_tiny.py`; float16.", ""]
  lines += [
    "| part | steps | seed | parameters | held out |",
    "|---|---|---|---|---|",
  ]
  for name in checkpoints.parts_in(source):
    part = checkpoints.load_part(source, name)
    meta = {k: v for k, v in part.meta.items() if k not in ("format", "part")}
    meta = _with_relative_paths(meta, pathlib.Path(workdir))
    checkpoints.save_part(_TARGET, name, part.params, meta, dtype=jnp.float16)
    held_out = ", ".join(f"{k} {v:.3g}" for k, v in meta["metrics"].items())
    seed = meta["config"]["seed"]
    lines.append(
      f"| {name} | {meta['step']} | {seed} | {meta['parameters']:,} |"
      f" {held_out} |"
    )
  for path in _TARGET.rglob("commit_success.txt"):  # names a folder of here
    path.write_text("Checkpoint commit was successful\n")
  report = pathlib.Path(workdir) / "report" / "metrics.json"
  if report.exists():
    metrics = json.loads(report.read_text())
    lines += ["", "```json", json.dumps(metrics, indent=1), "```"]
  (_TARGET / "README.md").write_text("\n".join(lines) + "\n")
  size = sum(f.stat().st_size for f in _TARGET.rglob("*") if f.is_file())
  print(f"{_TARGET}: {size / 1e6:.1f} MB")


def _with_relative_paths(meta, workdir):
  """Returns the stored description without this machine's folders."""
  text = json.dumps(meta)
  for path in (str(workdir.absolute()), str(workdir)):
    text = text.replace(path, "runs/tiny")
  return json.loads(text)


if __name__ == "__main__":
  main(sys.argv[1])
