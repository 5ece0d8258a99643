"""pytest plugin of .ci/run: a test that may not be skipped fails the run.

Those marked `shared`, where LAVIT_SHARED names the folder; every other one
too, where LAVIT_NO_SKIPS is "all": that lane lists what it runs by name.
"""

import os

import pytest

_ALL = os.environ.get("LAVIT_NO_SKIPS") == "all"
_SHARED = "LAVIT_SHARED" in os.environ
_SKIPPED: list[str] = []


def pytest_runtest_logreport(report):
  """Collects the tests that were skipped and may not be."""
  if not report.skipped or hasattr(report, "wasxfail"):
    return
  if _SHARED if "shared" in report.keywords else _ALL:
    _SKIPPED.append(report.nodeid)


def pytest_collectreport(report):
  """Collects whole modules, skipped for want of the folder or a package."""
  if not report.skipped:
    return
  if _SHARED if "LAVIT_SHARED" in str(report.longrepr) else _ALL:
    _SKIPPED.append(report.nodeid)


def pytest_sessionfinish(session, exitstatus):
  """Turns an otherwise good run into a failure."""
  if _SKIPPED and exitstatus == pytest.ExitCode.OK:
    session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
  """Names them."""
  for nodeid in _SKIPPED:
    terminalreporter.write_line(
      f"FAILED {nodeid}: skipped, which this run does not allow (see the"
      " reason with -rs, and .ci/no_skips.py)."
    )
