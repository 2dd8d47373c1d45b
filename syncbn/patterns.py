"""Where a forward calls batch norm, perhaps adds, and then does ReLU: one call instead, if that is the same."""

import operator
from collections.abc import Callable, Container
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

from syncbn.lazy import LazySyncBatchNorm
from syncbn.module import SyncBatchNorm
from syncbn.trace import iadd

Tell = Callable[[str, str], object]


def rewrite(graph: fx.Graph, module: nn.Module, layers: Container[object], tell: Tell) -> tuple[int, int]:
    """Fuse in the graph of module's forward what can be; how many BN→ReLU and BN→add→ReLU it was.

    Args:
        layers: those of which calls may be fused.
        tell: called with the name of a layer, and why a call of it cannot be.
    """
    relus = adds = 0
    for relu in [node for node in graph.nodes if _is_relu(node, module)]:
        before, why_not_relu = relu.args[0], unfit_relu(_child(relu, module))
        if _calls(before, module, layers):
            if why := _unfit_call(before, relu, module) or why_not_relu:
                tell(before.target, why)
                continue
            before.kwargs = {"activation": "relu"}
            _replace(relu, before)
            relus += 1
        elif addition := _Addition.of(before):
            calls = [node for node in graph.nodes if node in addition.terms and _calls(node, module, layers)]
            # The last first: fewer other calls come between it and the addition
            whys = [(call, addition.unfit(call, module) or why_not_relu) for call in reversed(calls)]
            call = next((call for call, why in whys if not why), None)
            if call is None:
                for unfit_call, why in whys:
                    tell(unfit_call.target, why)
                continue
            with graph.inserting_before(before):
                more = {"residual": addition.other(call), "activation": "relu"}
                _replace(relu, graph.call_module(call.target, call.args, more), before, call)
            adds += 1
    return relus, adds


def unfit(layer: nn.Module) -> str:
    """Why the layer cannot do more than normalise; empty if it can."""
    if isinstance(layer, LazySyncBatchNorm):
        return "lazy: convert with fuse=True again when it knows its channels"
    if type(layer).forward is not SyncBatchNorm.forward or "forward" in vars(layer):
        return "its forward is its own"
    if layer.activation is not None:
        return f"it does {layer.activation} already"
    return "it has hooks, which would see another output" if has_hooks(layer) else ""


def unfit_relu(relu: nn.Module | None) -> str:
    if relu is not None and (has_hooks(relu) or "forward" in vars(relu)):
        return "the ReLU after it has hooks, or a forward of its own"
    return ""


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of module runs hooks, which would miss a call that is left out, or see another output."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(len(one) > 0 for one in hooks)


class _Addition(NamedTuple):
    """A call that adds two terms."""

    call: fx.Node
    terms: tuple[Any, ...]
    in_place: bool

    @staticmethod
    def of(node: Any) -> "_Addition | None":
        if not isinstance(node, fx.Node) or len(node.args) != 2 or node.kwargs not in ({}, {"alpha": 1}):
            return None
        if (in_place := (node.op, node.target) in _ADDS_IN_PLACE) or (node.op, node.target) in _ADDS:
            return _Addition(node, node.args, in_place)
        return None

    def other(self, term: fx.Node) -> Any:
        return self.terms[self.terms[0] is term]

    def unfit(self, call: fx.Node, module: nn.Module) -> str:
        """Why the layer cannot add the other term and do the ReLU where the addition is; empty if it can."""
        other = self.other(call)
        if len(self.call.users) != 1:
            return "the sum is used before the ReLU too"
        if not isinstance(other, fx.Node) or other.op == "get_attr":
            return "what is added to it is a number, a parameter or a buffer: it must have the shape of a batch"
        if other is call:
            return "it is added to itself"
        if self.in_place and self.terms[0] is not call:
            return "it is added in place to what others may see"
        return _unfit_call(call, self.call, module) or _unfit_to_wait(call, self.call, module)


def _unfit_call(call: fx.Node, user: fx.Node, module: nn.Module) -> str:
    if why := unfit(module.get_submodule(str(call.target))):
        return why
    if len(call.args) != 1 or call.kwargs:
        return "it is called with more than x"
    return "" if list(call.users) == [user] else "its output is used elsewhere too"


def _unfit_to_wait(call: fx.Node, until: fx.Node, module: nn.Module) -> str:
    """Why the call would do something else if it were made where the other node is; empty if not."""
    nodes = list(call.graph.nodes)
    between = nodes[nodes.index(call) + 1 : nodes.index(until)]
    layer, x = module.get_submodule(str(call.target)), call.args[0]
    if not between:
        return ""
    maker = _child(x, module)
    if maker is None or type(maker).forward not in _FRESH or list(x.users) != [call]:  # pyright: ignore
        return "what runs between it and the addition might change its input"
    running = any(node.op == "get_attr" and str(node.target).startswith(f"{call.target}.") for node in nodes)
    if running or any(layer in child.modules() for child in (_child(node, module) for node in between) if child):
        return "what runs between it and the addition uses it too"
    return ""


_RELUS = {("call_function", f) for f in (F.relu, torch.relu, torch.relu_)}
_RELUS |= {("call_method", name) for name in ("relu", "relu_")}
_ADDS = {("call_function", operator.add), ("call_function", torch.add), ("call_method", "add")}
_ADDS_IN_PLACE = {("call_function", iadd), ("call_method", "add_")}
# Whose output shares no memory with anything
_CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
_FRESH = {kind.forward for kind in (*_CONVOLUTIONS, nn.Linear)}


def _is_relu(node: fx.Node, module: nn.Module) -> bool:
    return len(node.args) > 0 and ((node.op, node.target) in _RELUS or type(_child(node, module)) is nn.ReLU)


def _calls(node: Any, module: nn.Module, layers: Container[object]) -> bool:
    """Whether node calls one of the layers, which has no activation to do yet."""
    return _child(node, module) in layers and "activation" not in node.kwargs


def _child(node: Any, module: nn.Module) -> nn.Module | None:
    """The module that node calls, if any."""
    return module.get_submodule(str(node.target)) if isinstance(node, fx.Node) and node.op == "call_module" else None


def _replace(old: fx.Node, new: fx.Node, *unused: fx.Node) -> None:
    old.replace_all_uses_with(new)
    for node in (old, *unused):
        node.graph.erase_node(node)
