"""Random cases of the operator on 2 and 3 ranks, against batch norm of the whole batch in float64.

python -m tests.op.fuzz --minutes 30     for so long, from a seed that nobody had
python -m tests.op.fuzz --seed 17        one case again

Each seed is a case. One that fails is shrunk: the smallest that still fails is printed.
"""

import argparse
import sys
import time
import warnings
from ast import literal_eval
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from syncbn import SyncBatchNorm, kernels
from syncbn.collectives import Spec
from tests.op.fuzz_case import Case, Share, Tensors, draw, mended, parameters, tensors
from tests.op.fuzz_check import check
from tests.ranks import run_ranks

# Cases sent to the ranks at once
CHUNK = 60
HANG_S = 30


@dataclass(frozen=True)
class Failure:
    case: Case
    faults: list[str]

    def __str__(self) -> str:
        return "\n".join([str(self.case), *(f"  {line}" for line in self.faults[:8])])


def failures(seeds: Iterable[int]) -> Iterator[Failure | None]:
    """For each seed's case what is wrong with it, or None."""
    chunk: list[Case] = []
    for seed in seeds:
        chunk.append(draw(seed))
        if len(chunk) == CHUNK:
            yield from _failures_of(chunk)
            chunk = []
    yield from _failures_of(chunk)


def _failures_of(cases: list[Case]) -> list[Failure | None]:
    answers: dict[int, list[dict[str, Any]]] = {}
    for world in {len(case.ranks) for case in cases}:
        chosen = [case for case in cases if len(case.ranks) == world]
        try:
            answered = run_ranks(answers_of, world, chosen, timeout_s=HANG_S + len(chosen))
        except Exception:
            # One of them raised or hung, and took the ranks with it: which?
            return [failure_of(case) for case in cases]
        answers |= {case.seed: list(each) for case, each in zip(chosen, zip(*answered, strict=True), strict=True)}
    checked = ((case, check(case, answers[case.seed])) for case in cases)
    return [Failure(case, faults) if faults else None for case, faults in checked]


def failure_of(case: Case) -> Failure | None:
    """What is wrong with one case."""
    try:
        answered = run_ranks(answers_of, len(case.ranks), [case], timeout_s=HANG_S)
    except Exception as error:
        return Failure(case, [f"{type(error).__name__}: {error}"])
    faults = check(case, [each[0] for each in answered])
    return Failure(case, faults) if faults else None


def answers_of(rank: int, cases: list[Case]) -> list[dict[str, Any]]:
    """What a rank finds in each case."""
    answers = []
    for case in cases:
        with patch.object(kernels, "choose", lambda x: kernels.eager) if case.kernels == "eager" else nullcontext():
            answers.append(answer_of(rank, case))
    return answers


def answer_of(rank: int, case: Case, device: str = "cpu") -> dict[str, Any]:
    """What a rank finds in a case."""
    layer = layer_of(case, rank).to(device)
    given = [_leaves(case, rank, call, device) for call in range(case.calls)]
    answers: list[dict[str, Any] | None] = []
    waiting: list[tuple[Tensor, Tensor]] = []
    for regions in [given] if case.one_region else [[each] for each in given]:
        try:
            answers += _forward(case, layer, regions)
        except ValueError as error:
            # That the whole batch has one value is for the check to know
            if "one value per channel" not in str(error):
                raise
            answers.append(None)
            continue
        waiting += [(answer["y"], each.dy) for answer, each in zip(answers[-len(regions) :], regions, strict=True)]
        if case.backward == "at-once":
            _backward(case, [waiting.pop()])
    for pairs in [waiting] if case.backward == "together" else [[pair] for pair in waiting]:
        _backward(case, pairs)
    for answer, (x, _, residual, _) in zip(answers, given, strict=True):
        if answer is not None:
            answer |= {"y": answer["y"].detach().cpu(), "dx": _grad(x), "dresidual": _grad(residual)}
    return {"calls": answers, "gradients": {name: _grad(p) for name, p in layer.named_parameters()}}


def layer_of(case: Case, rank: int) -> SyncBatchNorm:
    """The case's layer."""
    layer = SyncBatchNorm(
        case.channels,
        case.eps,
        case.momentum,
        case.affine,
        case.tracks,
        bias=case.bias,
        activation="relu" if case.relu == "layer" else None,
        group=_spec(rank, tuple(case.groups()), str(case.group_of(rank))),
        reduction=case.reduction,
        dtype=getattr(torch, case.parameters),
    )
    with torch.no_grad():
        for name, value in parameters(case).items():
            getattr(layer, name).copy_(value)
    return layer


@cache
def _spec(rank: int, groups: tuple[tuple[int, ...], ...], group: str) -> Spec:
    """The group of all cases that have those batches: ranks agree on it once, and not in each case."""
    return Spec(literal_eval(group) if group != "world" else group)


def _leaves(case: Case, rank: int, call: int, device: str) -> Tensors:
    given = Tensors(*(None if t is None else t.to(device) for t in tensors(case, rank, call)))
    given.x.requires_grad_(case.ranks[rank].needs_grad)
    if given.residual is not None:
        given.residual.requires_grad_()
    return given


def _forward(case: Case, layer: SyncBatchNorm, given: list[Tensors]) -> list[dict[str, Any]]:
    """y of each call, and the buffers after it; the calls are one region, where there is recomputation."""
    buffers = []

    def region(*xs: Tensor | None) -> tuple[Tensor, ...]:
        ys = []
        for x, residual, each in zip(xs[::2], xs[1::2], given, strict=True):
            ys.append(layer(x, residual, each.mask, "relu" if case.relu == "call" else None))
            buffers.append({name: b.to("cpu", copy=True) for name, b in layer.named_buffers()})
        return tuple(ys)

    inputs = [t for each in given for t in (each.x, each.residual)]
    if case.recompute is None:
        ys = region(*inputs)
    else:
        ys = checkpoint(region, *inputs, use_reentrant=case.recompute == "reentrant")
    answers = [{"y": y, "buffers": b, "eval": None} for y, b in zip(ys, buffers, strict=True)]
    if case.evaluates:
        layer.eval()
        with torch.no_grad():
            relu = "relu" if case.relu == "call" else None
            answers[0]["eval"] = layer(given[0].x, given[0].residual, activation=relu).cpu()
        layer.train()
    return answers


def _backward(case: Case, pairs: list[tuple[Tensor, Tensor]]) -> None:
    # Alone and with nothing that needs a gradient there is none to run
    pairs = [(y, dy) for y, dy in pairs if y.requires_grad]
    with warnings.catch_warnings():
        # create_graph keeps the graph alive: there are no more steps that would suffer
        warnings.simplefilter("ignore")
        torch.autograd.backward([y for y, _ in pairs], [dy for _, dy in pairs], create_graph=case.create_graph)


def _grad(t: Tensor | None) -> Tensor | None:
    """t.grad, taken from it, so that a graph of it can go."""
    if t is None or t.grad is None:
        return None
    gradient, t.grad = t.grad.detach().cpu(), None
    return gradient


def shrunk(failure: Failure) -> Failure:
    """The simplest case that still fails, by changes of which each makes it simpler."""
    while True:
        smaller = (failure_of(case) for case in _simpler(failure.case))
        simpler = next((f for f in smaller if f is not None), None)
        if simpler is None:
            return failure
        failure = simpler


def _simpler(case: Case) -> Iterator[Case]:
    """Cases that are simpler in one thing, the largest steps first."""
    ranks = case.ranks
    if len(ranks) > 1:
        for rank in range(len(ranks)):
            yield mended(replace(case, ranks=ranks[:rank] + ranks[rank + 1 :]))
    plain = {"dtype": "float64", "parameters": "float64", "residual_dtype": "float64"}
    changes: list[dict[str, Any]] = [plain, *({f.name: f.default} for f in fields(Case)[2:])]
    changes += [{"channels": case.channels // 2}, {"calls": case.calls - 1}]
    of_ranks: list[Callable[[Share], dict[str, Any]]] = [
        lambda share: {"size": share.size[1:]},
        lambda share: {"size": tuple(max(1, s // 2) for s in share.size)},
        lambda share: {"size": tuple(max(1, s - 1) for s in share.size)},
        lambda share: {"images": share.images // 2},
        lambda share: {"images": max(0, share.images - 1)},
        *(lambda share, f=f: {f.name: f.default} for f in fields(Share)[2:]),
    ]
    shares = [tuple(replace(share, **change(share)) for share in ranks) for change in of_ranks]
    shares += [
        (*ranks[:i], replace(share, **change(share)), *ranks[i + 1 :])
        for change in of_ranks[1:]
        for i, share in enumerate(ranks)
    ]
    for simpler in [replace(case, **change) for change in changes] + [replace(case, ranks=s) for s in shares]:
        if simpler.channels > 0 and simpler.calls > 0 and simpler != case and mended(simpler) != case:
            yield mended(simpler)


def fuzz(seeds: Iterable[int], report: Callable[[str], None] = print, until: float | None = None) -> int:
    """How many cases failed, of the seeds' until that time.monotonic(). The first that fails is shrunk, and ends it."""
    begun, reported, done = time.monotonic(), time.monotonic(), 0
    for seed, failure in _paired(seeds):
        done += 1
        if failure is not None:
            report(
                f"FAILED, again by: python -m tests.op.fuzz --seed {seed}\n{failure}\n\nShrunk to\n{shrunk(failure)}"
            )
            return 1
        now = time.monotonic()
        if now - reported > 20:
            reported = now
            report(f"{done} cases, {done / (now - begun):.0f} a second, up to seed {seed}")
        if until is not None and now > until:
            break
    report(f"{done} cases, none failed")
    return 0


def _paired(seeds: Iterable[int]) -> Iterator[tuple[int, Failure | None]]:
    taken: list[int] = []

    def remembered() -> Iterator[int]:
        for seed in seeds:
            taken.append(seed)
            yield seed

    for done, failure in enumerate(failures(remembered())):
        yield taken[done], failure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=0.5)
    parser.add_argument("--seed", type=int, help="run that case alone")
    parser.add_argument("--first", type=int, help="the first seed; without it, by the clock")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.seed is not None:
        print(draw(args.seed))
        return fuzz([args.seed])
    first = int(time.time()) * 1000 if args.first is None else args.first
    print(f"seeds from {first}", flush=True)
    seeds = iter(range(first, sys.maxsize))
    return fuzz(seeds, lambda line: print(line, flush=True), time.monotonic() + 60 * args.minutes)


if __name__ == "__main__":
    sys.exit(main())
