"""Whatever a config holds, it is a Config or one line of an error, and never anything else."""

import math
from dataclasses import fields, is_dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from syncbn.trainer.config import Config, as_dict, from_yaml, to_yaml, typed
from syncbn.trainer.errors import UserError
from syncbn.trainer.option import flat

KNOWN = as_dict(Config())
WORDS = sorted({value for value in flat(KNOWN).values() if isinstance(value, str)})

plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 20),
    st.integers(),
    st.sampled_from([2**31, 2**63, -(2**63), 10**30, 10**400]),
    st.floats(),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e308, -0.0, 5e-324, 0.5]),
    st.text(max_size=8),
    st.sampled_from(
        [*WORDS, "", "a" * 10_000, "\0", "é\n", "${seed}", "${nothing.there}", "${", "???", "nan", "1e999"]
    ),
    st.binary(max_size=4),
)
anything = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=5,
)


def nearly(example):
    """Values with the config's keys and others: mostly what could stand there, now and then anything."""
    if not isinstance(example, dict):
        alike = st.just(example) | (st.floats() if isinstance(example, float) else st.integers(-1, 9))
        return alike | anything
    right = st.fixed_dictionaries({}, optional={key: nearly(value) for key, value in example.items()})
    strange = st.dictionaries(st.text(max_size=6) | st.integers() | st.none(), anything, max_size=1)
    return st.builds(lambda one, other: {**other, **one}, right, strange | st.just({})) | anything


no_float = st.sampled_from([math.nan, math.inf, -math.inf, 10**400])
floats = sorted(key for key, value in flat(KNOWN).items() if isinstance(value, float))
one_wrong = st.builds(lambda key, value: nested(key, value), st.sampled_from(floats), no_float) | st.sampled_from(
    sorted(flat(KNOWN))
).flatmap(lambda key: st.builds(lambda value: nested(key, value), st.floats() | anything))


def nested(key, value):
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def floats_of(config):
    for each in fields(config):
        value = getattr(config, each.name)
        if is_dataclass(value):
            yield from floats_of(value)
        else:
            yield from (v for v in (value if isinstance(value, list) else [value]) if isinstance(v, float))


def taken_or_refused(values):
    try:
        return typed(values)
    except UserError as error:
        return str(error)


def check(values):
    config = taken_or_refused(values)
    if isinstance(config, str):
        assert config
        assert config.isprintable()
        assert len(config) <= 1000
    else:
        assert isinstance(config, Config)
        assert all(math.isfinite(value) for value in floats_of(config))
        assert from_yaml(to_yaml(config)) == config  # so it comes to the ranks as it is


@given(one_wrong)
@settings(max_examples=120, deadline=None, derandomize=True)
def test_one_strange_value_is_taken_or_told_in_one_line(values):
    check(values)


@given(nearly(KNOWN).filter(lambda values: isinstance(values, dict)))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_strange_values_are_taken_or_told_in_one_line(values):
    check(values)
