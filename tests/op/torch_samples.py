"""Batch norm's rows of the tables by which torch tests itself, read out of the torch that is installed.

They are read in a process of their own, as torch.testing._internal sets flags of the process that imports it.
"""

import multiprocessing
import pickle
import sys
import types
import unittest
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class ModuleRow(NamedTuple):
    """A sample of a ModuleInfo: how nn's class of that name is made, and what its forward is given."""

    name: str
    training: bool
    dtype: torch.dtype
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    x: Tensor
    # What torch's own reference makes of it; None where torch gives no reference
    want: Tensor | None


class ErrorRow(NamedTuple):
    """What nn's class of that name refuses, when it is made or when it is called."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    x: Tensor | None
    error: type[Exception]


class OpRow(NamedTuple):
    """A sample of one of the functions that nn.BatchNorm calls."""

    name: str
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float
    eps: float


Rows = tuple[list[ModuleRow], list[ErrorRow], list[OpRow]]


@cache
def rows() -> Rows:
    """All of them."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pickle.loads(pool.apply(_pickled))


def _pickled() -> bytes:
    try:
        import expecttest  # noqa: F401
    except ImportError:
        # Of it torch's test cases derive; the tables, in the same file, do not need it
        stub = types.ModuleType("expecttest")
        vars(stub)["TestCase"] = unittest.TestCase
        sys.modules["expecttest"] = stub
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

    modules = [info for info in module_db if "BatchNorm" in info.module_cls.__name__]
    modules = [info for info in modules if "Lazy" not in info.module_cls.__name__]
    ops = {info.name: info for info in op_db if info.name in _ARGUMENTS and not info.variant_test_name}
    rows: Rows = (
        [row for info in modules for row in _module_rows(info)],
        [row for info in modules for row in _error_rows(info)],
        [row for info in ops.values() for row in _op_rows(info)],
    )
    return pickle.dumps(rows)


def _samples(info: Any, make: Any, training: bool, dtype: torch.dtype) -> list[Any]:
    torch.manual_seed(0)
    return list(make(info, device="cpu", dtype=dtype, requires_grad=False, training=training))


def _module_rows(info: Any) -> list[ModuleRow]:
    rows = []
    for dtype in info.dtypes:
        for training in (True, False):
            for sample in _samples(info, info.module_inputs_func, training, dtype):
                made, given = sample.constructor_input, sample.forward_input
                want = None
                if sample.reference_fn is not None:
                    module = info.module_cls(*made.args, **made.kwargs, dtype=dtype).train(training)
                    want = sample.reference_fn(module, list(module.parameters()), *given.args, **given.kwargs).detach()
                (x,) = given.args
                name = info.module_cls.__name__
                rows.append(ModuleRow(name, training, dtype, made.args, made.kwargs, x.detach(), want))
    return rows


def _error_rows(info: Any) -> list[ErrorRow]:
    if info.module_error_inputs_func is None:
        return []
    rows = []
    for sample in _samples(info, info.module_error_inputs_func, True, torch.float64):
        made, given = sample.module_error_input.constructor_input, sample.module_error_input.forward_input
        x = None if given is None or "FORWARD" not in str(sample.error_on) else given.args[0].detach()
        rows.append(ErrorRow(info.module_cls.__name__, made.args, made.kwargs, x, sample.error_type))
    return rows


# How each function takes what it is given
_ARGUMENTS = {
    "nn.functional.batch_norm": ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    "native_batch_norm": ("weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
    "_native_batch_norm_legit": ("weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
    "_batch_norm_with_update": ("weight", "bias", "running_mean", "running_var", "momentum", "eps"),
}
_DEFAULTS = {
    "weight": None,
    "bias": None,
    "running_mean": None,
    "running_var": None,
    "training": False,
    "momentum": 0.1,
    "eps": 1e-5,
}


def _op_rows(info: Any) -> list[OpRow]:
    rows = []
    for dtype in sorted(info.dtypes, key=str):
        torch.manual_seed(0)
        for sample in info.sample_inputs("cpu", dtype):
            names = _ARGUMENTS[info.name]
            if len(sample.args) == 5 and info.name == "_native_batch_norm_legit":
                # Its overload without running statistics
                names = ("weight", "bias", "training", "momentum", "eps")
            given = _DEFAULTS | {"training": "training" not in names}
            given |= dict(zip(names, sample.args, strict=False)) | sample.kwargs
            given.pop("cudnn_enabled", None)
            rows.append(OpRow(info.name, sample.input, **given))
    return rows
