"""In what ranks differ, in words."""

import pytest

from syncbn.trainer.rank import agreement

DIFFERENCES = {
    "alike": ([{"torch": "2", "words": ["a", "b"]}, {"torch": "2", "words": ["b", "a"]}], None),
    "version": (
        [{"torch": "2"}, {"torch": "3"}, {"torch": "3"}],
        "torch: 2 on rank 0 of host a, 3 on ranks 1, 2 of host b",
    ),
    "words": (
        [{"words": ["x", "y=1"]}, {"words": ["x", "y=2", "z"]}],
        "words: y=1 on rank 0 of host a, y=2 z on rank 1 of host b",
    ),
    "none-there": ([{"words": []}, {"words": ["x"]}], "words: nothing on rank 0 of host a, x on rank 1 of host b"),
    "many": ([{"f": []}, {"f": [*"uvwxyz"]}], "f: nothing on rank 0 of host a, u v w and 3 more on rank 1 of host b"),
    "both": (
        [{"p": "1", "q": "1"}, {"p": "2", "q": "2"}],
        "p: 1 on rank 0 of host a, 2 on rank 1 of host b; q: 1 on rank 0 of host a, 2 on rank 1 of host b",
    ),
}


@pytest.mark.parametrize(("held", "line"), DIFFERENCES.values(), ids=DIFFERENCES)
def test_what_differs_is_named_with_who_has_what(held, line):
    assert agreement.difference(held, "abb"[: len(held)]) == line


def test_a_process_tells_its_packages_code_and_words():
    traits = agreement.traits()
    assert traits["python"].startswith("3.")
    assert traits["torch"][0].isdecimal()
    assert any(part.startswith("trainer/rank/agreement.py (") for part in traits["syncbn's code"])
