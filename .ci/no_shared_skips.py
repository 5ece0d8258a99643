"""pytest plugin of .ci/run: a skipped test marked `shared` fails the run."""

import pytest

_SKIPPED: list[str] = []


def pytest_runtest_logreport(report):
  """Collects the skipped tests that carry the marker."""
  expected = hasattr(report, "wasxfail")
  if report.skipped and not expected and "shared" in report.keywords:
    _SKIPPED.append(report.nodeid)


def pytest_collectreport(report):
  """Collects whole modules skipped for want of the folder."""
  if report.skipped and "LAVIT_SHARED" in str(report.longrepr):
    _SKIPPED.append(report.nodeid)


def pytest_sessionfinish(session, exitstatus):
  """Turns an otherwise good run into a failure."""
  if _SKIPPED and exitstatus == pytest.ExitCode.OK:
    session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
  """Names them."""
  for nodeid in _SKIPPED:
    terminalreporter.write_line(
      f"FAILED {nodeid}: marked `shared` and skipped, though LAVIT_SHARED is"
      " set; see why with -rs."
    )
