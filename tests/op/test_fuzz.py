"""The plain suite's share of the fuzzer, always the same seeds; and that the fuzzer tells what it finds."""

from dataclasses import fields
from unittest.mock import patch

import pytest

from tests.op import fuzz
from tests.op.fuzz_case import Case, Share, draw

SEEDS = range(900)


@pytest.mark.plain("range(0, 300)")
@pytest.mark.parametrize("seeds", [SEEDS[i : i + 300] for i in SEEDS[::300]], ids=str)
def test_random_cases_equal_the_whole_batch(seeds):
    lines = []
    assert fuzz.fuzz(seeds, lines.append) == 0, "\n".join(lines)
    assert lines[-1] == "300 cases, none failed"


def test_every_choice_is_drawn():
    cases = [draw(seed) for seed in SEEDS]
    assert {len(case.ranks) for case in cases} == {2, 3}
    for kind, drawn in (Case, cases), (Share, [share for case in cases for share in case.ranks]):
        assert all(len({getattr(value, f.name) for value in drawn}) > 1 for f in fields(kind))


def has_a_mask_in_half_precision(case):
    fails = case.dtype == "float16" and any(share.mask == "element" and share.images for share in case.ranks)
    return fuzz.Failure(case, ["a fault"]) if fails else None


def test_a_case_that_fails_is_told_with_its_seed_and_shrunk():
    seed = next(seed for seed in SEEDS if has_a_mask_in_half_precision(draw(seed)))
    lines = []

    with patch.multiple(
        fuzz,
        failures=lambda seeds: (has_a_mask_in_half_precision(draw(s)) for s in seeds),
        failure_of=has_a_mask_in_half_precision,
    ):
        assert fuzz.fuzz(SEEDS, lines.append) == 1

    (text,) = lines
    assert f"python -m tests.op.fuzz --seed {seed}\n" in text
    assert text.endswith(f"Shrunk to\nseed {seed}: dtype='float16'\n  rank 0: images=1, mask='element'\n  a fault")
