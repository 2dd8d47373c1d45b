"""Each kind of fault that the operator has had, over every make of the kernels, dtype, mask and way of recomputation.

The cases are the fuzzer's, and so are what is wanted and how near.
"""

from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import product
from unittest.mock import patch

import pytest
import torch

from syncbn import kernels
from syncbn.kernels import eager, native
from tests.op import fuzz
from tests.op.fuzz_case import Case, Share
from tests.op.fuzz_check import check

triton = pytest.importorskip("syncbn.kernels.triton", reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="torch's kernels for SyncBatchNorm run on CUDA alone")
KERNELS = {
    "eager": eager,
    "triton": triton,
    "native": pytest.param(native, marks=on_cuda),
}
COMPILERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
DTYPES = ["float64", "float32", "bfloat16", "float16"]
MASKS = [None, "sample", "element", "all", "nothing"]
EXTRAS = [{}, {"relu": "layer"}, {"residual": True}, {"residual": True, "relu": "call"}]
WAYS = [
    {},
    {"recompute": "non-reentrant"},
    {"recompute": "reentrant"},
    {"create_graph": True},
    {"recompute": "non-reentrant", "create_graph": True},
]
# What each fault needs to show
KINDS = {
    "halves-that-cancel": (Share(images=6, size=(5,)), {"gradient": 900.0, "std": 0.01}),
    "a-constant-gradient": (Share(images=8, dy_layout="one-value"), {"gradient": 900.0, "std": 0.01}),
    "a-gradient-with-gaps": (Share(images=257, dy_layout="one-value"), {"channels": 4}),
    "channels-last": (Share(images=3, size=(4, 3), layout="last", dy_layout="last"), {"channels": 5, "mean": 100.0}),
    "a-sliced-input": (Share(images=3, size=(4, 3), layout="sliced", dy_layout="pooled"), {"channels": 5}),
}


def case_of(dtype, share, mask, residual=False, **options):
    """A case of one rank, by float32 parameters where x is in half precision."""
    wide = "float64" if dtype == "float64" else "float32"
    options = {"channels": 3, "parameters": wide} | options
    return Case(1, (replace(share, mask=mask, residual=residual),), dtype=dtype, residual_dtype=dtype, **options)


@contextmanager
def by(make):
    """Layers that compute by those kernels, or compiled by a backend of that name."""
    with ExitStack() as stack:
        if isinstance(make, str):
            made = fuzz.layer_of
            stack.enter_context(patch.object(fuzz, "layer_of", lambda *args: compiled(made(*args), make)))
        else:
            stack.enter_context(patch.object(kernels, "choose", lambda x: make))
        yield


def compiled(layer, backend):
    # Each case compiles anew, and there is a limit to that
    torch._dynamo.reset()
    layer.compile(fullgraph=True, backend=backend)
    return layer


def faults(make, cases):
    with by(make):
        return [f"{case}\n{line}" for case in cases for line in check(case, [fuzz.answer_of(0, case, DEVICE)])]


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # of dx that fp16 cannot hold
@pytest.mark.parametrize("make", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_values(kind, dtype, make):
    share, options = KINDS[kind]
    combinations = list(product(MASKS, EXTRAS))
    if make is triton and DEVICE == "cpu":
        # The interpreter takes its time: each dtype meets each combination in some of the kinds
        combinations = combinations[(list(KINDS).index(kind) + DTYPES.index(dtype)) % len(KINDS) :: len(KINDS)]
    assert not faults(make, [case_of(dtype, share, mask, **options, **extra) for mask, extra in combinations])


@pytest.mark.parametrize("make", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ways_of_recomputation(dtype, make):
    share = Share(images=5, size=(2, 3))
    cases = [
        case_of(dtype, share, mask, calls=2, **extra, **way)
        for (mask, extra), way in product(zip((None, "element"), EXTRAS[::3], strict=True), WAYS)
    ]
    assert not faults(make, cases)


@pytest.mark.parametrize("backend", COMPILERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled(dtype, backend):
    share, options = KINDS["halves-that-cancel"]
    extra = {"residual": True, "relu": "layer"}
    cases = [case_of(dtype, share, mask, **options, **extra) for mask in (None, "element")]
    assert not faults(backend, cases)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_kinds_of_values(kind, dtype):
    share, options = KINDS[kind]
    cases = [case_of(dtype, share, mask, **options, **extra) for mask, extra in product(MASKS, EXTRAS)]
    assert not faults("aot_eager", cases)


@pytest.mark.parametrize("dtype", DTYPES)
def test_calls_that_repeat_on_one_rank_alone(dtype):
    wide = "float64" if dtype == "float64" else "float32"
    ranks = [(Share(images=3, size=(2,), repeats=True, mask=m), Share(images=3, size=(2,), mask=m)) for m in MASKS[:3]]
    cases = [
        Case(seed, ranks, 2, dtype, wide, dtype, calls=3, one_region=one, **way)
        for seed, (ranks, way, one) in enumerate(product(ranks, WAYS, [False, True]))
        if not (one and not way.get("recompute"))
    ]
    assert not [str(failure) for failure in fuzz._failures_of(cases) if failure is not None]
