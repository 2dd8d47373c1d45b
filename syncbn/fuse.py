"""Let batch norm do the ReLU after it, and the addition between: a module's forward is rewritten, nothing else.

A fused module is the object it was, of a class derived from its own whose forward is made from a trace of the old one.
The layers stay plain batch norms: what is to be done after the normalisation is said in each call.
"""

import functools
import itertools
import linecache
import types
import zlib
from collections import Counter
from collections.abc import Callable, Container, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from syncbn.module import SyncBatchNorm
from syncbn.patterns import Tell, rewrite, unfit, unfit_relu
from syncbn.trace import Untraceable, own_graph

RELU, ADD_RELU = "BN→ReLU", "BN→add→ReLU"


def fuse_calls(model: nn.Module, layers: Container[object]) -> dict[str, str]:
    """Fuse, in place, what model's modules do after calling one of the layers.

    Returns: name of each layer, or of the module that calls it -> why it could not be, where something of the kind was.
    """
    unfused: dict[str, str] = {}
    for name, module in _callers(model, layers).items():
        try:
            _fuse_module(module, layers, lambda layer, why, n=name: unfused.update({f"{n}.{layer}".lstrip("."): why}))
        except Untraceable as why:
            unfused[name] = str(why)
    return unfused


def unfuse(model: nn.Module) -> None:
    """Give every fused module its class and its forward back."""
    for module in model.modules():
        if (recipe := _recipe(module)) is not None:
            change_class(module, recipe.kind)


def fused_calls(model: nn.Module) -> dict[str, int]:
    """How often model's modules have batch norm do more: RELU and ADD_RELU -> number."""
    counts: Counter[str] = Counter()
    for module in model.modules():
        if (recipe := _recipe(module)) is not None:
            in_chain = 0 if recipe.source else sum(itertools.starmap(_pair, _pairs(module)))
            counts.update({RELU: recipe.relus + in_chain, ADD_RELU: recipe.adds})
    return dict(+counts)


def change_class(module: nn.Module, to: type[nn.Module]) -> None:
    """Make module a `to`, with the parametrisations that torch keeps in a class of the module's own."""
    if is_parametrized(module):
        own = {name: value for name, value in vars(type(module)).items() if name not in ("__dict__", "__weakref__")}
        to = type(f"Parametrized{to.__name__}", (to,), own)
    module.__class__ = to


class _Recipe(NamedTuple):
    """What makes a fused class, in this process or that of a pickle; without a source, that of a Sequential."""

    kind: type[nn.Module]
    source: str = ""
    names: tuple[tuple[str, Any], ...] = ()
    relus: int = 0
    adds: int = 0


def _recipe(module: nn.Module) -> _Recipe | None:
    # Its own: a class that someone derives from a fused one is theirs
    return vars(type_before_parametrizations(module)).get("_syncbn_recipe")


def _callers(model: nn.Module, layers: Container[object]) -> dict[str, nn.Module]:
    """The modules around the layers, the nearest that have a forward (a ModuleList has none), by name."""
    modules = dict(model.named_modules(remove_duplicate=False))
    callers: dict[nn.Module, str] = {}
    for name, layer in modules.items():
        while name and layer in layers:
            name = name.rpartition(".")[0]
            if type(modules[name]).forward is not nn.Module.forward:
                callers.setdefault(modules[name], name)
                break
    return {name: module for module, name in callers.items()}


def _fuse_module(module: nn.Module, layers: Container[object], tell: Tell) -> None:
    old = _recipe(module)
    kind = old.kind if old else type_before_parametrizations(module)
    if isinstance(module, torch.jit.ScriptModule):
        raise Untraceable("TorchScript: fuse before scripting")
    if "forward" in vars(module):
        raise Untraceable("its forward was replaced on the object")
    if (kind.__reduce__, kind.__reduce_ex__) != (object.__reduce__, object.__reduce_ex__):
        raise Untraceable(f"{kind.__name__} has its own way to be pickled")
    if kind.forward is nn.Sequential.forward:
        recipe = _paired(module, _Recipe(kind), layers, tell)
    else:
        graph = own_graph(module)
        relus, adds = rewrite(graph, module, layers, tell)
        made = _Recipe(kind, *_printed(graph), *((old.relus + relus, old.adds + adds) if old else (relus, adds)))
        recipe = made if relus + adds else None
    if recipe is not None:
        try:
            change_class(module, _class(recipe))
        except TypeError as error:
            raise Untraceable(f"no class can be derived from its own: {error}") from error


# The class of a fused module


def _printed(graph: fx.Graph) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """The code of a forward, and the globals that it names."""
    for node in graph.nodes:
        node.type = None  # Annotations would be imported
    graph.lint()
    code, given = graph.python_code("self"), _always_there()
    used = compile(code.src, "", "exec").co_consts[0].co_names
    return code.src, tuple((name, value) for name, value in code.globals.items() if name in used and name not in given)


@functools.cache
def _class(recipe: _Recipe) -> type[nn.Module]:
    """Modules alike share a class, and so the code that torch.compile knows."""

    def __reduce_ex__(self: nn.Module, protocol: int) -> Any:
        make, (_, *args), *state = recipe.kind.__reduce_ex__(self, protocol)  # pyright: ignore
        return _made, (make, tuple(recipe), *args), *state

    kind = recipe.kind
    forward = _compiled(recipe) if recipe.source else _chain
    own = {"forward": forward, "__reduce_ex__": __reduce_ex__, "__module__": kind.__module__, "_syncbn_recipe": recipe}
    return types.new_class(f"Fused{kind.__name__}", (kind,), exec_body=lambda names: names.update(own))


def _made(make: Callable[..., nn.Module], recipe: tuple[Any, ...], *args: Any) -> nn.Module:
    return make(_class(_Recipe(*recipe)), *args)


def _compiled(recipe: _Recipe) -> Callable[..., Any]:
    """The function that recipe.source tells, which tracebacks and torch.compile can read."""
    file = f"<fused {recipe.kind.__module__}.{recipe.kind.__qualname__} {zlib.crc32(recipe.source.encode()):08x}>"
    linecache.cache[file] = (len(recipe.source), None, recipe.source.splitlines(keepends=True), file)
    names = {**_always_there(), **dict(recipe.names)}
    exec(compile(recipe.source, file, "exec"), names)
    return names["forward"]


def _always_there() -> dict[str, Any]:
    """The global names that fx may use without telling."""
    return dict(fx.Graph().python_code("self").globals)


# nn.Sequential: it may be changed, and sliced, at any time, so the pairs are found anew in each forward


def _paired(chain: nn.Module, recipe: _Recipe, layers: Container[object], tell: Tell) -> _Recipe | None:
    fits = False
    for name, (layer, after) in zip(chain._modules, _pairs(chain), strict=True):
        if layer in layers and type(after) is nn.ReLU:
            fits = fits or _pair(layer, after)
            if why := unfit(layer) or unfit_relu(after):
                tell(name, why)
    return recipe if fits else None


def _chain(self: nn.Sequential, input: Any) -> Any:
    taken = False
    for layer, after in _pairs(self):
        if taken:
            taken = False
        elif taken := _pair(layer, after):
            input = layer(input, activation="relu")
        else:
            input = layer(input)
    return input


def _pairs(chain: nn.Module) -> Iterator[tuple[nn.Module, nn.Module | None]]:
    """Each module of a Sequential, and the next."""
    modules = list(chain._modules.values())
    return zip(modules, [*modules[1:], None], strict=True)  # pyright: ignore[reportReturnType]


def _pair(layer: nn.Module, after: nn.Module | None) -> bool:
    return type(after) is nn.ReLU and isinstance(layer, SyncBatchNorm) and not (unfit(layer) or unfit_relu(after))
