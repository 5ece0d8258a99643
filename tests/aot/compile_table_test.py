"""The table of full-size programs: rows kept, faults reported, no compiler.

`lavit compile` is a stand-in here; see tests/aot/compile_test.py for it.
"""

import json
import pathlib
import subprocess
import sys
import types

import pytest

from lavit_jax.aot import libtpu

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"


def _memory(total):
  return {"total": total, "share": total / 16e9, "of": 16e9}


def _report(name, boundary=1e9, **changes):
  """A report as `lavit compile --json` prints one."""
  made = {
    "program": f"step of {name}",
    "tokens_per_device": 8.0,
    "fits": True,
    "why_not": "",
    "unread": "",
    "warnings": [],
    "memory": _memory(2e9),
    "boundaries": [{"program": "moments", "memory": _memory(boundary)}],
    "collectives": [{"bytes": 3e9}],
    "executed_over_model": 1.1,
    "roofline": {
      "step_s": 0.1,
      "step_s_no_overlap": 0.2,
      "mfu": 0.8,
      "mfu_no_overlap": 0.4,
    },
    "compile_s": 60.0,
  }
  return made | changes


@pytest.fixture
def bench(monkeypatch, tmp_path):
  """The script, with two rows and a compiler that counts its calls."""
  monkeypatch.syspath_prepend(FOLDER)
  monkeypatch.setattr(libtpu, "versions", lambda: {"jax": "1", "libtpu": "2"})
  import compile_table

  rows = (
    compile_table.Row("tokenizer", "v5e:2x4", phases=True),
    compile_table.Row("pixels_sdxl", "tpu7x:2x2x1"),
  )
  monkeypatch.setattr(compile_table, "ROWS", rows)
  stand_in = types.SimpleNamespace(
    reports={
      "tokenizer": [_report("random", 1.5e9), _report("codes")],
      "pixels_sdxl": _report("latents", compile_s=900.0),
    },
    calls=[],
    table=compile_table,
    out=tmp_path / "made" / "table.json",
  )

  def run(command, **_):
    name = pathlib.Path(command[command.index("--config") + 1]).stem
    stand_in.calls.append(name)
    return types.SimpleNamespace(stdout=json.dumps(stand_in.reports[name]))

  monkeypatch.setattr(subprocess, "run", run)

  def main(*words):
    words = ["compile_table.py", "--json", str(stand_in.out), *words]
    monkeypatch.setattr(sys, "argv", words)
    return compile_table.main()

  stand_in.main = main
  return stand_in


def test_rows_are_compiled_once_and_shown_with_their_versions(bench, capsys):
  assert bench.main("--only", "tokenizer") == 0
  assert bench.main() == 0
  assert bench.calls == ["tokenizer", "pixels_sdxl"]
  out, err = capsys.readouterr()
  assert "jax 1, libtpu 2" in out
  assert "| `tokenizer.py` | v5e:2x4 | 8 | 2.0 GB, 12% | 1.5 GB |" in out
  assert "900 s |" in out, "SDXL's time is reported"
  assert "step of" not in err


def test_an_interrupted_table_goes_on_and_a_change_compiles_again(
  bench, monkeypatch
):
  bench.reports["pixels_sdxl"] = None

  def interrupted(command, **_):
    raise KeyboardInterrupt

  assert bench.main("--only", "tokenizer") == 0
  with monkeypatch.context() as inside:
    inside.setattr(subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
      bench.main()
  bench.reports["pixels_sdxl"] = _report("latents")
  assert bench.main() == 0
  assert bench.calls == ["tokenizer", "pixels_sdxl"]
  monkeypatch.setattr(libtpu, "versions", lambda: {"jax": "1", "libtpu": "3"})
  bench.main("--only", "tokenizer")
  monkeypatch.setattr(bench.table, "code", lambda: "changed")
  bench.main("--only", "tokenizer")
  assert bench.calls[2:] == ["tokenizer", "tokenizer"]


@pytest.mark.parametrize(
  ("changes", "reported"),
  [
    ({"fits": False, "why_not": "96% of HBM"}, "does not fit: 96% of HBM"),
    ({"compile_s": 401.0}, "compiled for 401 s"),
    ({"warnings": ["kmeans takes 3 GB"]}, "kmeans takes 3 GB"),
  ],
)
def test_a_row_with_a_fault_is_reported_and_fails(
  bench, capsys, changes, reported
):
  bench.reports["tokenizer"][0] |= changes  # not the phase that is shown
  assert bench.main() == 1
  err = capsys.readouterr().err
  assert f"tokenizer.py v5e:2x4: step of random: {reported}" in err
  assert bench.main() == 1, "kept rows are judged too"
