"""One module's own forward as a graph of calls. What torch.fx would silently get wrong, or bake in, is refused."""

import inspect
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate
from torch.fx.proxy import Attribute
from torch.overrides import TorchFunctionMode, resolve_name

from syncbn import recompute


class Untraceable(BaseException):
    """Why a forward cannot be had as a graph. No Exception, lest the forward catch it."""


def own_graph(module: nn.Module) -> fx.Graph:
    """The calls that module's forward makes to torch and to its children, which are not looked into.

    Python values that the forward reads, flags of the module say, are in it as they are now.

    Raises:
        Untraceable: they are not the same calls in training and in eval, for any input, or not only calls. The module
            is then as it was before.
    """
    _check_arguments(module)
    _check_words(type(module))
    modes = [(m, m.training) for m in module.modules()]
    graphs = []
    try:
        # In two worlds that have nothing in common, so that what a forward asks of its world shows
        for training in (True, False):
            for m, _ in modes:
                # Not .train() and .eval(), which some modules override to do more
                m.training = training
            with torch.set_grad_enabled(training), _autocast(not training):
                graphs.append(_traced(module))
    finally:
        for m, training in modes:
            m.training = training
    first, second = (graph.python_code("self").src for graph in graphs)
    if first != second:
        raise Untraceable("its forward is not the same in training and eval, with and without grad and autocast")
    return graphs[0]


def iadd(x: Any, y: Any) -> Any:
    """x += y. (operator.iadd would be printed as a statement, which is wrong where x is a number in use elsewhere.)"""
    x += y
    return x


def _check_arguments(module: nn.Module) -> None:
    _, *given = inspect.signature(type(module).forward).parameters.values()
    plain = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    if [(parameter.kind, parameter.default) for parameter in given] != [plain]:
        raise Untraceable("its forward does not take just one argument: a trace cannot tell which may be None")


_QUESTIONS: dict[str, str] = dict.fromkeys(
    ("isinstance", "hasattr", "getattr", "type", "is_tensor"), "asks for the type of a value"
)
_QUESTIONS["random"] = "draws random numbers in Python"


def _check_words(kind: type[nn.Module]) -> None:
    """Refuse what a trace would answer once for all, and wrongly: its values are no Tensors yet."""
    for word in _words(kind.forward, kind, set()):
        if word in _QUESTIONS:
            raise Untraceable(f"its forward {_QUESTIONS[word]}")


def _words(function: Any, kind: type[nn.Module], seen: set[Any]) -> Iterator[str]:
    """The names in the code of a function, and of what it calls of its class and its file; not torch's."""
    function = inspect.unwrap(function)
    if not isinstance(function, FunctionType) or function in seen or (function.__module__ or "").startswith("torch."):
        return
    seen.add(function)
    codes = [function.__code__]
    for code in codes:
        codes.extend(constant for constant in code.co_consts if isinstance(constant, CodeType))
        for name in code.co_names:
            yield name
            yield from _words(getattr(kind, name, None) or function.__globals__.get(name), kind, seen)


def _traced(module: nn.Module) -> fx.Graph:
    held = _held(module)
    try:
        with _FromInputOnly():
            graph = _Tracer().trace(module)
    except Exception as error:
        message = str(error).strip().partition("\n")[0]
        raise Untraceable(f"its forward cannot be traced: {type(error).__name__}: {message}") from error
    finally:
        changed = _put_back(held)
    if changed:
        raise Untraceable("its forward changes attributes")
    return graph


class _Traced:
    """What our traced values add to fx's: in-place operators, which fx takes for their out-of-place kin."""

    def __getattr__(self, name: str) -> "_Attribute":
        return _Attribute(self, name)  # pyright: ignore[reportArgumentType]

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node", "root", "attr", "_node"):
            raise Untraceable(f"its forward sets .{name} of a value")
        object.__setattr__(self, name, value)

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", iadd, (self, other), {})

    def _refused(self, _: Any) -> Any:
        raise Untraceable("its forward uses an in-place operator other than +=")

    __isub__ = __imul__ = __itruediv__ = __ifloordiv__ = __imod__ = __ipow__ = __imatmul__ = _refused
    __iand__ = __ior__ = __ixor__ = __ilshift__ = __irshift__ = _refused


class _Value(_Traced, fx.Proxy):
    pass


class _Attribute(_Traced, Attribute):
    pass


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        self.modes = _modes()
        return super().trace(root, concrete_args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if type(m).__call__ is not nn.Module.__call__:
            raise Untraceable(f"{type(m).__name__}, which its forward calls, has a __call__ of its own")
        return super().call_module(m, forward, args, kwargs)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if self.modes != _modes():
            raise Untraceable(_MODE)
        return super().create_node(*args, **kwargs)

    def to_bool(self, obj: Any) -> bool:
        raise Untraceable("its forward branches on a value")

    def iter(self, obj: Any) -> Any:
        raise Untraceable("its forward iterates over a value")

    def create_arg(self, a: Any) -> Any:
        if type(a) is OrderedDict:
            return self.create_node("call_function", OrderedDict, (self.create_arg(list(a.items())),), {})
        if isinstance(a, tuple | list | dict) and type(a) not in (tuple, list, dict) and not hasattr(a, "_fields"):
            raise Untraceable(f"its forward makes a {type(a).__name__}")
        return super().create_arg(a)


class _FromInputOnly(TorchFunctionMode):
    """Refuses what is computed from no traced value: its result would be a constant of the graph."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        traced: list[Any] = []
        map_aggregate((args, kwargs or {}), lambda a: traced.append(a) if isinstance(a, _Traced) else None)
        # Of which _modes tells
        if not traced and func is not torch._C._set_grad_enabled:
            raise Untraceable(f"its forward uses {resolve_name(func) or func} of what is no input of it")
        return func(*args, **kwargs or {})


_MODE = "a part of its forward runs under no_grad, autocast or checkpoint, or has a backward of its own"
_AUTOCAST = ("cpu", "cuda", "xpu", "mps")


def _modes() -> list[Any]:
    """The modes that change what a call does, and that a graph does not record."""
    casts = [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in _AUTOCAST]
    return [*casts, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), recompute.possible()]


@contextmanager
def _autocast(enabled: bool) -> Iterator[None]:
    before = [torch.is_autocast_enabled(device) for device in _AUTOCAST]
    try:
        for device in _AUTOCAST:
            torch.set_autocast_enabled(device, enabled)
        yield
    finally:
        for device, was in zip(_AUTOCAST, before, strict=True):
            torch.set_autocast_enabled(device, was)


def _held(module: nn.Module) -> list[tuple[Any, list[Any]]]:
    """The attributes of every module within, and what lists, dicts and sets among them hold."""
    containers = [c for m in module.modules() for c in (vars(m), *vars(m).values()) if isinstance(c, dict | list | set)]
    return [(container, _contents(container)) for container in containers]


def _contents(container: Any) -> list[Any]:
    return [*container, *container.values()] if isinstance(container, dict) else [*container]


def _put_back(held: list[tuple[Any, list[Any]]]) -> bool:
    """Make the containers hold what they did; whether any had to."""
    touched = False
    for container, before in held:
        after = _contents(container)
        if len(after) != len(before) or any(a is not b for a, b in zip(after, before, strict=True)):
            touched = True
            half = len(before) // 2
            container.clear()
            if isinstance(container, list):
                container.extend(before)
            elif isinstance(container, dict):
                container.update(zip(before[:half], before[half:], strict=True))
            else:
                container.update(before)
    return touched
