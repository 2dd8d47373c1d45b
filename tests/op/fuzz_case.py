"""A random case of the operator: what a few ranks do with one layer, and the tensors they do it with."""

import random
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn import groups

HALVES = ("bfloat16", "float16")
# *S, images and C of sums long enough that a short accumulator shows, most of all where they are of one value
LONG = [((5003,), 2, 2), ((25601,), 1, 1), ((70, 73), 3, 2), ((64, 64), 33, 1), ((300, 301), 1, 1), ((), 3000, 2)]
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Share:
    """What one rank brings to every call. Defaults are the simplest that there is, where shrinking ends."""

    images: int = 2
    size: tuple[int, ...] = ()
    # "sample", "element": some count; "all" and "nothing": those with a mask that says so
    mask: str | None = None
    residual: bool = False
    needs_grad: bool = True
    # Its second and third call have the input of the first, bit by bit
    repeats: bool = False
    layout: str = "contiguous"
    dy_layout: str = "contiguous"


@dataclass(frozen=True)
class Case:
    """A layer, and what each rank does with it. `seed` is that of the tensors' values."""

    seed: int
    ranks: tuple[Share, ...]
    channels: int = 1
    dtype: str = "float64"
    parameters: str = "float64"
    residual_dtype: str = "float64"
    affine: bool = True
    bias: bool = True
    # Of whom it is: "layer" or "call"
    relu: str | None = None
    eps: float = 1e-5
    momentum: float | None = 0.1
    tracks: bool = True
    # "world", 1, "pairs" (a list of ranks each) or "samples"
    group: Any = "world"
    samples: int = 1
    reduction: str = "auto"
    # Of whose operators: "cpu" (in C) or "eager"
    kernels: str = "cpu"
    # |mean| / σ, σ, the distance of the ranks' means in σ, and the size of dy
    mean: float = 0.0
    std: float = 1.0
    apart: float = 0.0
    gradient: float = 1.0
    calls: int = 1
    recompute: str | None = None
    # All calls in one checkpointed region
    one_region: bool = False
    # When the calls' backwards run: "together", "in-turn" after all forwards, or "at-once" after each
    backward: str = "together"
    create_graph: bool = False
    # An eval forward after each call
    evaluates: bool = False

    def __str__(self) -> str:
        ranks = "\n".join(f"  rank {rank}: {_changes(share)}" for rank, share in enumerate(self.ranks))
        return f"seed {self.seed}: {_changes(self, 'ranks', 'seed')}\n{ranks}"

    def groups(self) -> list[tuple[int, ...]]:
        """The ranks of each batch."""
        world = len(self.ranks)
        if self.group == "world":
            return [tuple(range(world))]
        if self.group == 1:
            return [(rank,) for rank in range(world)]
        if self.group == "pairs":
            return _pairs(world)
        wanted = groups.plain({"samples": self.samples})
        return sorted(set(groups.divide([groups.Place(wanted, "", share.images) for share in self.ranks])))

    def group_of(self, rank: int) -> Any:
        """The layer's group on that rank."""
        if self.group == "samples":
            return {"samples": self.samples}
        return next(list(p) for p in self.groups() if rank in p) if self.group == "pairs" else self.group


def _pairs(world: int) -> list[tuple[int, ...]]:
    """The first rank and the last form a batch, and those between them another."""
    between = tuple(range(1, world - 1))
    return [(0, world - 1), between] if between else [tuple(range(world))]


def _changes(value: Case | Share, *but: str) -> str:
    """The fields that are not at their defaults."""
    changed = {f.name: getattr(value, f.name) for f in fields(value) if f.name not in but}
    return ", ".join(f"{n}={v!r}" for n, v in changed.items() if v != type(value).__dataclass_fields__[n].default)


class Tensors(NamedTuple):
    """What one rank gives to one call."""

    x: Tensor
    dy: Tensor
    residual: Tensor | None
    mask: Tensor | None


def tensors(case: Case, rank: int, call: int) -> Tensors:
    """What that rank gives to that call: the same bits wherever it is asked for."""
    share, dtype = case.ranks[rank], getattr(torch, case.dtype)
    shape = (share.images, case.channels, *share.size)
    own = torch.Generator().manual_seed(97 * case.seed + 10 * rank + (0 if share.repeats else call))
    of_call = torch.Generator().manual_seed(89 * case.seed + 10 * rank + call + 5)
    noise = torch.randn(shape, generator=own, dtype=torch.float64)
    mask = _mask(share, own)
    if mask is not None:
        # What is masked must not show in the statistics
        noise = noise.where(mask.view(mask.shape[0], 1, *(mask.shape[2:] or [1] * len(share.size))), 8 * noise + 5)
    x = case.std * (case.mean + case.apart * rank + noise)
    residual = None
    if share.residual:
        residual = torch.randn(shape, generator=of_call, dtype=torch.float64).to(getattr(torch, case.residual_dtype))
    x = laid_out(x.to(dtype), share.layout)
    return Tensors(x, _gradient(case, share, noise, of_call), residual, mask)


def parameters(case: Case) -> dict[str, Tensor]:
    """weight and bias, where the layer has them; the same on every rank."""
    generator = torch.Generator().manual_seed(case.seed + 3)
    weight, bias = torch.randn(2, case.channels, generator=generator, dtype=torch.float64)
    named = {"weight": weight, "bias": bias} if case.bias else {"weight": weight}
    return {name: t.to(getattr(torch, case.parameters)) for name, t in named.items()} if case.affine else {}


def laid_out(t: Tensor, layout: str) -> Tensor:
    """t in other strides; what lies between its values is NaN."""
    if layout == "last":
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "turned":
        return t.movedim(2, -1).contiguous().movedim(-1, 2) if t.dim() > 3 else laid_out(t, "transposed")
    if layout == "sliced":
        within = t.new_full((t.size(0), t.size(1) + 2, *(2 * s for s in t.shape[2:])), torch.nan)
        view = within[(slice(None), slice(1, -1), *[slice(None, None, 2)] * (t.dim() - 2))]
        view.copy_(t)
        return view
    return t


def _gradient(case: Case, share: Share, noise: Tensor, generator: torch.Generator) -> Tensor:
    """dy, correlated with x; that of a sum or of a mean over pixels is a view of fewer values."""
    shape = {"one-value": (), "pooled": (*noise.shape[:2], *[1] * (noise.dim() - 2))}.get(share.dy_layout, noise.shape)
    dy = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.2
    if shape == noise.shape:
        dy += 0.5 * noise
    return laid_out((case.gradient * dy).to(getattr(torch, case.dtype)).expand(noise.shape), share.dy_layout)


def _mask(share: Share, generator: torch.Generator) -> Tensor | None:
    if share.mask is None:
        return None
    shape = (share.images,) if share.mask == "sample" else (share.images, 1, *share.size)
    drawn = torch.rand(shape, generator=generator)
    return drawn < {"all": 2.0, "nothing": -1.0}.get(share.mask, 0.6)


def counts(case: Case, ranks: tuple[int, ...], call: int) -> int:
    """How many values of a channel those ranks have together under their masks."""
    total = 0
    for rank in ranks:
        share = case.ranks[rank]
        values = share.images * torch.Size(share.size).numel()
        if share.mask not in (None, "all"):
            mask = tensors(case, rank, call).mask
            assert mask is not None
            values = int(mask.sum()) * (values // max(mask.numel(), 1))
        total += values
    return total


def draw(seed: int) -> Case:
    """The case of that seed."""
    rng = random.Random(seed)

    def pick(*values: Any) -> Any:
        return rng.choice(values)

    def rarely(value: Any, usual: Any, chance: float = 0.2) -> Any:
        return value if rng.random() < chance else usual

    world = pick(2, 2, 3)
    size, images, channels = _sizes(rng)
    if rarely(True, False, 0.04):
        images = [0] * world
    else:
        images = [rarely(0, rng.randint(1, images), 0.15) for _ in range(world)]
    dtype = pick("float64", "float32", "float32", *HALVES)
    masks = pick((None,), (None,), (None,), ("sample",), ("element",), ("sample", "element", "all", "nothing", None))
    layouts = pick(("contiguous",), ("last",), ("contiguous", "last", "transposed", "turned", "sliced"))
    gradients = pick(("contiguous",), layouts, ("one-value",), ("pooled", "one-value", "sliced", "last", "turned"))
    if size in [long for long, _, _ in LONG if long]:
        gradients = pick(gradients, ("one-value",))
    residuals = pick((False,), (False,), (True,), (True, False))
    calls = pick(1, 1, 2, 3)
    recompute = pick(None, None, "non-reentrant", "reentrant")
    other_size = tuple(max(1, s - 1) for s in size)
    ranks = tuple(
        Share(
            images[rank],
            rarely(other_size, size),
            pick(*masks),
            pick(*residuals),
            recompute == "reentrant" or rarely(False, True),
            calls > 1 and rarely(True, False, 0.4),
            pick(*layouts),
            pick(*gradients),
        )
        for rank in range(world)
    )
    wide = "float64" if dtype == "float64" else "float32"
    case = Case(
        seed,
        ranks,
        channels,
        dtype,
        parameters=pick(dtype, wide, wide),
        residual_dtype=rarely(wide, dtype),
        affine=rarely(False, True),
        bias=rarely(False, True),
        relu=pick(None, None, "layer", "call"),
        eps=pick(1e-5, 1e-5, 1e-3, 0.1),
        momentum=pick(0.1, 0.7, None, 1.0),
        tracks=rarely(False, True),
        group=pick("world", "world", "world", 1, "pairs", "samples"),
        samples=rng.randint(1, 2 * max(*images, 1)),
        reduction=pick("auto", "all_reduce", "gather"),
        kernels=pick("cpu", "eager"),
        mean=pick(0.0, 1.0, 100.0, 1e4),
        std=pick(1.0, 3.0, 0.01),
        apart=rarely(5.0, 0.0, 0.3),
        gradient=rarely(900.0, 1.0, 0.1),
        calls=calls,
        recompute=recompute,
        one_region=recompute is not None and pick(False, True),
        backward=pick("together", "in-turn", "at-once"),
        create_graph=recompute != "reentrant" and rarely(True, False, 0.15),
        evaluates=rarely(True, False),
    )
    return mended(case)


def _sizes(rng: random.Random) -> tuple[tuple[int, ...], int, int]:
    """*S, at most so many images, and C."""
    if rng.random() < 0.05:
        return rng.choice(LONG)
    dims = rng.choice([0, 0, 1, 2, 2, 2, 3])
    longest = {0: 1, 1: 40, 2: 12, 3: 6}[dims]
    size = (1,) * dims if rng.random() < 0.1 else tuple(rng.randint(1, longest) for _ in range(dims))
    images = rng.choice([1, 2, 6, 33]) if dims else rng.choice([1, 2, 8, 40, 300])
    return size, images, rng.choice([1, 2, 3, 5, 8, 17, 70])


def mended(case: Case) -> Case:
    """The case, less what cannot be asked for together."""
    alone = any(counts(case, ranks, call) == 1 for ranks in case.groups() for call in range(case.calls))
    one_region = case.one_region and case.recompute is not None and not alone
    # One region has one backward; eval forwards would be a part of it
    return replace(
        case,
        one_region=one_region,
        backward="together" if one_region else case.backward,
        evaluates=case.evaluates and case.tracks and not one_region,
    )
