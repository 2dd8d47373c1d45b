"""Which activation a model does after each batch norm, and how it is left to a norm that has its own."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.nn import functional as F

import syncbn
from syncbn.trainer.norms import swap
from syncbn.trainer.norms.activated import Activated

MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.Mish, nn.GELU, nn.Hardswish, nn.Hardtanh, nn.Sigmoid, nn.Tanh
)  # fmt: skip
FUNCTIONS = (
    F.relu, F.relu_, F.relu6, F.leaky_relu, F.elu, F.silu, F.mish, F.gelu, F.hardswish, F.sigmoid, F.tanh,
    torch.relu, torch.relu_, torch.sigmoid, torch.tanh,
)  # fmt: skip
METHODS = ("relu", "relu_", "sigmoid", "tanh")

Make = Callable[..., Activated]
"""A norm for the channels of a tensor like=[C], with activates= and nonlinear=, as Activated has them."""


@dataclass
class Sequel:
    """What follows the calls of one layer, in all places of the model.

    alone: in an nn.Sequential, an activation that is to be left to the layer. traced: an activation that the call now
    asks for. kept: why an activation stays. linear: none follows.
    """

    alone: list[tuple[nn.Sequential, str]] = field(default_factory=list)
    traced: bool = False
    kept: str = ""
    linear: bool = False


def convert(model: nn.Module, make: Make) -> list[str]:
    """Put a norm of make's in the place of every batch norm and of the activation after it; what is to be told.

    Where a module's forward is not to be had as a graph, the layer does its own nonlinearity, and the model's
    activation stays after it; else, where no activation follows, the layer does none.
    """
    layers = swap.plain(model)
    sequels: dict[nn.Module | None, Sequel] = {layer: Sequel() for layer in layers.values()}
    in_chains(model, sequels)
    in_forwards(model, layers, sequels)
    names_by_reason: dict[str, list[str]] = defaultdict(list)
    for name, layer in layers.items():
        sequel = sequels[layer]
        if sequel.alone and (sequel.linear or sequel.kept or sequel.traced):
            sequel.alone, sequel.kept = [], sequel.kept or "it is shared with places where that is not so"
        for chain, activation in sequel.alone:
            chain._modules[activation] = nn.Identity()
        if sequel.kept:
            names_by_reason[sequel.kept].append(name or "the model itself")
        activates = bool(sequel.alone or sequel.kept)
        like = next(t for t in (layer.weight, layer.running_mean, torch.empty(layer.num_features)) if t is not None)
        swap.become(layer, make(like=like.detach(), activates=activates, nonlinear=activates or sequel.traced))
    return [
        f"{len(names)} layers do their own nonlinearity and the model's activation stays ({', '.join(names[:3])}"
        f"{', ...' if len(names) > 3 else ''}): {why}"
        for why, names in names_by_reason.items()
    ]


# In nn.Sequential


def in_chains(model: nn.Module, sequels: Mapping[nn.Module | None, Sequel]) -> None:
    """Note what follows each layer in an nn.Sequential."""
    for chain in [m for m in model.modules() if isinstance(m, nn.Sequential) and _is_chain(m)]:
        for name, after in itertools.pairwise([*chain._modules, ""]):
            sequel, activation = sequels.get(chain._modules[name]), chain._modules.get(after)
            if sequel is None:
                continue
            if not isinstance(activation, MODULES):
                sequel.linear = True
            elif type(activation) not in MODULES or syncbn.has_hooks(activation):
                sequel.kept = "it has hooks, or is of a class of its own"
            else:
                sequel.alone.append((chain, after))


def _is_chain(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward and "forward" not in vars(module)


# In the forwards of other modules


class _Calls(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def in_forwards(model: nn.Module, layers: Mapping[str, nn.Module], sequels: Mapping[nn.Module | None, Sequel]) -> None:
    """Have forwards that call the layers leave the activation to them, where they can, and note what follows each."""
    callers = dict(_callers(model, sequels))
    inside = {name for name, layer in layers.items() if any(layer in called for called in callers.values())}
    if not inside:
        return
    # Its rewriting of calls is what is wanted: layer(x, activation="relu"), layer(x, residual=..., activation="relu")
    reports: list[syncbn.Conversion] = []
    syncbn.convert(model, include=[*inside], fuse=True, report=reports.append)
    names = {module: name for name, module in model.named_modules()}
    for caller, called in callers.items():
        graph = None if names[caller] in reports[0].unfused else _graph(caller)
        if graph is None:
            for layer in called:
                sequels[layer].kept = reports[0].unfused.get(names[caller], "its forward cannot be traced")
            continue
        for node in graph.nodes:
            layer = _module(node, caller)
            if layer in called:
                _note(node, caller, sequels[layer])


def _callers(
    model: nn.Module, sequels: Mapping[nn.Module | None, Sequel]
) -> Iterator[tuple[nn.Module, set[nn.Module]]]:
    """The modules, other than chains, that call the layers in their forward, and which."""
    callers: dict[nn.Module, set[nn.Module]] = defaultdict(set)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, layer in modules.items():
        if layer not in sequels:
            continue
        while name:
            name = name.rpartition(".")[0]
            if type(modules[name]).forward is not nn.Module.forward:
                callers[modules[name]].add(layer)
                break
    yield from ((caller, called) for caller, called in callers.items() if not _is_chain(caller))


def _graph(module: nn.Module) -> fx.Graph | None:
    try:
        return _Calls().trace(module)
    except Exception:  # whatever the module's code raises in it
        return None


def _note(call: fx.Node, caller: nn.Module, sequel: Sequel) -> None:
    if call.kwargs.get("activation") and "residual" not in call.kwargs:
        sequel.traced = True
    elif any(_is_activation(user, caller) for user in call.users):
        sequel.kept = "it is no ReLU of the layer's alone, or has hooks"
    else:
        sequel.linear = True


def _is_activation(node: fx.Node, caller: nn.Module) -> bool:
    if node.op == "call_function":
        return node.target in FUNCTIONS
    if node.op == "call_method":
        return node.target in METHODS
    return isinstance(_module(node, caller), MODULES)


def _module(node: fx.Node, caller: nn.Module) -> nn.Module | None:
    return caller.get_submodule(str(node.target)) if node.op == "call_module" else None
