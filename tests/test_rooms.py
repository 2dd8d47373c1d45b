"""Who may import whom among tests and benchmarks: a test file is nobody's library."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
# An import, or a model named on a command line as file:function
OF_A_TEST = re.compile(r"^\s*(?:from|import) [\w.]*\btest_|\bimport test_|\btests\.[\w.]*test_\w+:", re.M)
OF_TESTS = re.compile(r"^\s*(?:from|import) tests\b", re.M)
OF_BENCHMARKS = re.compile(r"^\s*(?:from|import) benchmarks\b", re.M)


def importing(pattern, folder):
    """The files of a folder that import what the pattern says."""
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    return {str(file.relative_to(ROOT)) for file in files if pattern.search(file.read_text())}


def test_no_test_file_is_imported():
    assert importing(OF_A_TEST, "tests") | importing(OF_A_TEST, "benchmarks") == set()


def test_benchmarks_need_no_test_and_only_their_own_tests_need_them():
    assert importing(OF_TESTS, "benchmarks") == set()
    assert {file for file in importing(OF_BENCHMARKS, "tests") if not file.startswith("tests/benchmarks/")} == set()
