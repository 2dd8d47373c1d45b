"""What the ranks should have found: batch norm of each group's whole batch in float64, and how near is near enough.

Tolerances follow the errors through the formula. u is the relative error that the operator promises for statistics and
sums, of float32 five digits, relative to the sum of absolute values; and each output is rounded once to its dtype, one
with a residual twice. What is added up may cancel: so errors are those of the terms, not of what is left.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn import kernels
from tests.op.fuzz_case import HALVES, LAST, Case, Tensors, counts, parameters, tensors

EPS = torch.finfo(torch.float64).eps
PROMISE = {"float64": 1e-13, "float32": 1e-5, "bfloat16": 1e-5, "float16": 1e-5}


class Near(NamedTuple):
    """Values in float64, and how far from them each may be."""

    value: Tensor
    error: Tensor

    def faults(self, got: Tensor, name: str) -> list[str]:
        """One line, if got is not near, or nothing. What is too large for got's dtype is not looked at."""
        if got.shape != self.value.shape:
            return [f"{name} has shape {tuple(got.shape)}, not {tuple(self.value.shape)}"]
        tolerance = self.error + rounding(self.value, got.dtype)
        held = self.value.abs() + tolerance < torch.finfo(got.dtype).max
        off = ((got.double() - self.value).abs() / tolerance).where(held, 0)
        if off.numel() == 0 or (off <= 1).all():
            return []
        # NaN is the worst
        worst = off.nan_to_num(nan=torch.inf).flatten().argmax().item()
        g, v, t = (float(s.flatten()[worst]) for s in (got, self.value, tolerance))
        return [f"{name} is {g:.9g}, not {v:.9g}: off by {abs(g - v):.2g}, tolerance {t:.2g}"]


def rounding(values: Tensor, dtype: torch.dtype) -> Tensor:
    """A unit in the last place of each."""
    kind = torch.finfo(dtype)
    return kind.eps * values.abs().clamp(min=kind.smallest_normal)


def check(case: Case, answers: list[dict[str, Any]]) -> list[str]:
    """What is wrong with the answers of the ranks, in lines."""
    return [line for ranks in case.groups() for line in _check_group(case, ranks, [answers[r] for r in ranks])]


def _check_group(case: Case, ranks: tuple[int, ...], answers: list[dict[str, Any]]) -> list[str]:
    faults: list[str] = []
    affine = {name: t.double() for name, t in parameters(case).items()}
    sums = {name: Near(torch.zeros_like(t), torch.zeros_like(t)) for name, t in affine.items()}
    running = _Running(case)
    for call in range(case.calls):
        got = [a["calls"][call] for a in answers]
        where = f"call {call}, " if case.calls > 1 else ""
        if counts(case, ranks, call) == 1:
            faults += [f"{where}rank {r}: one value is not refused" for r, g in zip(ranks, got, strict=True) if g]
            continue
        if not all(got):
            return [*faults, f"{where}refused, though the whole batch has {counts(case, ranks, call)} values"]
        given = [tensors(case, rank, call) for rank in ranks]
        batch = _Batch(case, given, affine, torch.cat([_rows(g["y"]) for g in got]) > 0)
        running.move(batch.mean, batch.var, batch.count, batch.mean_error, batch.var_error)
        for name, near in batch.sums().items():
            sums[name] = Near(*(a + b for a, b in zip(sums[name], near, strict=True)))
        expected = {name: _split(near, given) for name, near in batch.outputs().items()}
        for i, (rank, tensor, answer) in enumerate(zip(ranks, given, got, strict=True)):
            lines = _check_layout(tensor, answer)
            share = case.ranks[rank]
            wanted = {"y": True, "dx": share.needs_grad, "dresidual": share.residual}
            for name, nears in expected.items():
                if answer[name] is not None:
                    lines += Near(*(_unrows(t, tensor.x) for t in nears[i])).faults(answer[name], name)
                elif wanted[name]:
                    lines.append(f"there is no {name}")
            lines += running.faults(answer["buffers"])
            lines += _check_eval(case, affine, tensor, answer)
            faults += [f"{where}rank {rank}: {line}" for line in lines]
    for name, near in sums.items():
        # Each rank's share of each call is rounded to the parameter's dtype, and so is their sum
        shares = [a["gradients"][name].double() for a in answers if a["gradients"][name] is not None]
        faults += near.faults(sum(shares, torch.zeros(case.channels).double()), f"the sum of {name}.grad")
    return [*faults, *_differences(ranks, answers)]


def _differences(ranks: tuple[int, ...], answers: list[dict[str, Any]]) -> list[str]:
    """Buffers that are not the same bits on all ranks."""
    first, *others = ([call["buffers"] if call else {} for call in a["calls"]] for a in answers)
    return [
        f"{name} of rank {rank} is not the bits of rank {ranks[0]}"
        for rank, calls in zip(ranks[1:], others, strict=True)
        for mine, theirs in zip(first, calls, strict=True)
        for name in mine
        if name not in theirs or not torch.equal(mine[name], theirs[name])
    ]


class _Batch:
    """One call of one group: everything as rows [M, C] of all ranks in float64."""

    def __init__(self, case: Case, given: Sequence[Tensors], affine: dict[str, Tensor], positive: Tensor):
        self.case, self.affine = case, affine
        x = torch.cat([_rows(t.x) for t in given]).requires_grad_()
        here = torch.cat([_mask_rows(t) for t in given]).unsqueeze(1)
        residual = torch.cat([torch.zeros_like(_rows(t.x)) if t.residual is None else _rows(t.residual) for t in given])
        self.count = here.sum().double()
        n = self.count.clamp(min=1)
        mean = x.where(here, 0).sum(0) / n
        var = (x - mean).where(here, 0).square().sum(0) / n
        z = (x - mean) / (var + case.eps).sqrt()
        weight = affine.get("weight", torch.ones(case.channels).double()).clone().requires_grad_()
        bias = affine.get("bias", torch.zeros(case.channels).double()).clone().requires_grad_()
        normalised = z * weight + bias
        # Where y is within its rounding of 0, the operator's own y says what relu let through
        g = torch.cat([_rows(t.dy) for t in given])
        self.g = g * positive if case.relu else g
        self.dx, self.dweight, self.dbias = torch.autograd.grad(normalised, (x, weight, bias), self.g)
        self.mean, self.var, self.z, self.normalised = (t.detach() for t in (mean, var, z, normalised))
        self.residual, self.here, self.weight, self.bias = residual, here, weight.detach().abs(), bias.detach().abs()
        self._errors(n, len(given))

    def _errors(self, n: Tensor, ranks: int) -> None:
        """Errors of mean, in units of σ, and of var, in units of itself; of z, everywhere."""
        self.u = PROMISE[self.case.dtype]
        self.invstd = (self.var + self.case.eps).rsqrt()
        far = self.mean.abs() * self.invstd
        # A sum of squares, in float64, holds mean² as well
        summed = 8 * EPS * far.square() if self.case.reduction != "gather" and ranks > 1 else 0
        self.of_mean, self.of_var = self.u + 8 * EPS * far, self.u + 8 * EPS * far + summed
        z = self.z.abs()
        largest = z.max(0).values if len(z) else torch.zeros_like(far)
        self.of_z = self.of_mean + z * self.of_var + self.u * largest / 10
        self.mean_error = self.of_mean / self.invstd
        self.var_error = self.of_var * (self.var + self.case.eps) * n / (n - 1).clamp(min=1)
        self.n = n

    def outputs(self) -> dict[str, Near]:
        case, z, g = self.case, self.z.abs(), self.g.abs()
        dtype = getattr(torch, case.dtype)
        y = self.normalised + self.residual
        error = self.weight * (self.of_z + self.u * z / 10) + self.u * self.bias / 10
        error = error + rounding(self.normalised, dtype) + rounding(self.residual, dtype)
        if case.dtype in HALVES and "eager" in (case.kernels, kernels.in_use()):
            # aten's pass, x * scale + (bias - mean * scale) in float32: of digits that x, if not constant, never had
            error += self.weight * self.mean.abs() * self.invstd * torch.finfo(torch.float32).eps
        mean_g, mean_gz = g.sum(0) / self.n, (g * z).sum(0) / self.n
        through_mean = (self.u + self.of_var) * (g + mean_g)
        through_var = (self.u + self.of_var) * z * mean_gz + self.of_z * mean_gz
        # mean_gz has the error of mean in each of its terms
        through_var += z * (g * self.of_z).sum(0) / self.n
        error_dx = self.weight * self.invstd * (through_mean + through_var)
        return {
            "y": Near(y.relu() if case.relu else y, error),
            "dx": Near(self.dx, error_dx),
            "dresidual": Near(self.g, torch.zeros_like(g)),
        }

    def sums(self) -> dict[str, Near]:
        """Gradients of the parameters, and the terms' error; each rank's share is rounded for itself, and added up."""
        g, z = self.g.abs(), self.z.abs()
        kind = torch.finfo(getattr(torch, self.case.parameters))
        rounded = self.u + (1 + self.case.calls) * kind.eps
        sums = {
            "weight": (self.dweight, (g * z).sum(0), (g * self.of_z).sum(0)),
            "bias": (self.dbias, g.sum(0), 0),
        }
        # A share that the parameter's dtype cannot hold says nothing
        return {
            name: Near(value, (rounded * terms + error).where(terms < kind.max / self.case.calls, torch.inf))
            for name, (value, terms, error) in sums.items()
            if name in self.affine
        }


class _Running:
    """The running buffers in float64, as they should be."""

    def __init__(self, case: Case):
        self.case, self.batches = case, 0
        zeros = torch.zeros(case.channels, dtype=torch.float64)
        self.mean, self.var = Near(zeros, zeros), Near(zeros + 1, zeros)
        # Half-precision parameters have float32 buffers
        self.eps = EPS if case.parameters == "float64" else torch.finfo(torch.float32).eps

    def move(self, mean: Tensor, var: Tensor, count: Tensor, mean_error: Tensor, var_error: Tensor) -> None:
        if count == 0:
            return
        self.batches += 1
        rate = 1 / self.batches if self.case.momentum is None else self.case.momentum
        self.mean = self._moved(self.mean, mean, mean_error, rate)
        self.var = self._moved(self.var, var * count / (count - 1), var_error, rate)

    def _moved(self, near: Near, value: Tensor, error: Tensor, rate: float) -> Near:
        rounded = 4 * self.eps * (near.value.abs() + value.abs())
        return Near(near.value + rate * (value - near.value), near.error + rate * error + rounded)

    def faults(self, buffers: dict[str, Tensor]) -> list[str]:
        if not self.case.tracks:
            return [f"there is a buffer {name}" for name in buffers]
        batches = int(buffers["num_batches_tracked"])
        faults = [] if batches == self.batches else [f"num_batches_tracked is {batches}, not {self.batches}"]
        faults += self.mean.faults(buffers["running_mean"], "running_mean")
        return faults + self.var.faults(buffers["running_var"], "running_var")


def _check_eval(case: Case, affine: dict[str, Tensor], given: Tensors, answer: dict[str, Any]) -> list[str]:
    """y in eval, by the buffers that the rank itself has."""
    if answer["eval"] is None:
        return []
    mean, var = (answer["buffers"][f"running_{name}"].double() for name in ("mean", "var"))
    scale = (var + case.eps).rsqrt() * affine.get("weight", torch.ones(case.channels).double())
    x, bias = _rows(given.x), affine.get("bias", torch.zeros(case.channels).double())
    residual = torch.zeros_like(x) if given.residual is None else _rows(given.residual)
    normalised, dtype = (x - mean) * scale + bias, given.x.dtype
    # torch's own: x * scale plus (bias - mean * scale), in float32
    u = 4 * torch.finfo(torch.float64 if case.dtype == "float64" else torch.float32).eps
    error = u * ((x.abs() + mean.abs()) * scale.abs() + bias.abs())
    error = error + rounding(normalised, dtype) + rounding(residual, dtype)
    y = normalised + residual
    y = y.relu() if case.relu else y
    return Near(_unrows(y, given.x), _unrows(error, given.x)).faults(answer["eval"], "eval's y")


def _check_layout(given: Tensors, answer: dict[str, Any]) -> list[str]:
    """dtype and memory format of what is shaped as x."""
    faults, x = [], given.x
    for name in "y", "dx":
        t = answer[name]
        if t is None:
            continue
        if t.dtype != x.dtype:
            faults.append(f"{name} has dtype {t.dtype}, x {x.dtype}")
        formats = [torch.contiguous_format, *([LAST[x.dim()]] if x.dim() in LAST else [])]
        if not any(t.is_contiguous(memory_format=f) for f in formats if x.is_contiguous(memory_format=f)) and any(
            x.is_contiguous(memory_format=f) for f in formats
        ):
            faults.append(f"{name} has strides {t.stride()}, x {x.stride()}")
    return faults


def _rows(t: Tensor) -> Tensor:
    """[M, C] float64."""
    return t.detach().double().movedim(1, -1).reshape(-1, t.size(1))


def _unrows(rows: Tensor, x: Tensor) -> Tensor:
    return rows.view(x.size(0), *x.shape[2:], x.size(1)).movedim(-1, 1)


def _mask_rows(given: Tensors) -> Tensor:
    shape = (given.x.size(0), *given.x.shape[2:])
    mask = torch.ones(shape, dtype=torch.bool) if given.mask is None else given.mask
    if mask.shape == shape[:1]:
        mask = mask.view(-1, *[1] * (len(shape) - 1))
    elif given.mask is not None:
        mask = mask[:, 0]
    return mask.expand(shape).flatten()


def _split(near: Near, given: Sequence[Tensors]) -> list[Near]:
    """Each rank's rows."""
    sizes = [t.x.numel() // t.x.size(1) for t in given]
    return [Near(*pair) for pair in zip(*(t.split(sizes) for t in near), strict=True)]
