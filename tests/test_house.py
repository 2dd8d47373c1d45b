"""The house as CONTRIBUTING describes it, where no linter looks: small rooms, few imports, words of the matter."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRAINER = ROOT / "syncbn" / "trainer"
CODE = sorted(path for part in ("syncbn", "tests", "benchmarks") for path in (ROOT / part).rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in CODE}
MOST_IMPORTS = 12  # of other modules of the trainer
MOST_FILES = 12  # in a room of the trainer, besides __init__
NO_NAMES = ("told", "found", "known", "those", "it")
# An import, or a model named on a command line as file:function
OF_A_TEST = re.compile(r"^\s*(?:from|import) [\w.]*\btest_|\bimport test_|\btests\.[\w.]*test_\w+:", re.M)
OF_TESTS = re.compile(r"^\s*(?:from|import) tests\b", re.M)
OF_BENCHMARKS = re.compile(r"^\s*(?:from|import) benchmarks\b", re.M)


def parsed(path: Path) -> ast.AST:
    return ast.parse(path.read_text())


def imports(path: Path) -> set[str]:
    """The modules of this repository that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {full if (full := f"{node.module}.{a.name}") in MODULES else node.module for a in node.names}
    return names & MODULES.keys()


def identifiers(path: Path) -> Iterator[str]:
    for node in ast.walk(parsed(path)):
        for attribute in ("id", "arg", "attr", "name", "asname"):
            if isinstance(name := getattr(node, attribute, None), str):
                yield from name.split(".")


def test_no_module_of_the_trainer_imports_many_others():
    count = {
        str(path.relative_to(ROOT)): len({name for name in imports(path) if name.startswith("syncbn.trainer")})
        for path in TRAINER.rglob("*.py")
    }
    assert max(count.values()) > 3
    assert {name: number for name, number in count.items() if number > MOST_IMPORTS} == {}


def test_no_room_of_the_trainer_has_many_files():
    rooms = {
        str(init.parent.relative_to(TRAINER)): len([*init.parent.glob("*.py")]) - 1
        for init in TRAINER.rglob("*/__init__.py")
    }
    assert "data/sets" in rooms
    assert max(rooms.values()) > 3
    assert {name: number for name, number in rooms.items() if number > MOST_FILES} == {}


def test_identifiers_are_words_of_the_matter():
    assert {
        f"{path.relative_to(ROOT)}: {name}"
        for path in CODE
        for name in identifiers(path)
        if name.strip("_") in NO_NAMES
    } == set()


def importing(pattern: re.Pattern[str], folder: str) -> set[str]:
    """The files of a folder that import what the pattern says."""
    return {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py") if pattern.search(path.read_text())}


def test_no_test_file_is_imported():
    assert importing(OF_A_TEST, "tests") | importing(OF_A_TEST, "benchmarks") == set()


def test_benchmarks_need_no_test_and_only_their_own_tests_need_them():
    assert importing(OF_TESTS, "benchmarks") == set()
    assert {file for file in importing(OF_BENCHMARKS, "tests") if not file.startswith("tests/benchmarks/")} == set()
