"""Trace a model into a graph without touching it, and refuse what a graph cannot express."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

_ROOT = "model"  # where the model is in the wrapper that is traced


class Untraceable(Exception):
    """Why a model cannot be copied; the attack then runs the live model."""


def trace(model: nn.Module) -> tuple[fx.Graph, nn.Module]:
    """The graph of a model's logits in eval mode, free of in-place operations and assertions.

    Args:
        model: the live model. It is not run: a stand-in is, which shares its tensors and nothing else.

    Returns:
        The graph, whose targets are the model's own paths, and the stand-in, which also holds the constants
        that tracing has found.

    Raises:
        Untraceable: for hooks, random numbers, gradients of the model's own, sections without gradient,
            control flow that depends on data or buffers, writes into parts of tensors, and what fails.
    """
    for name, module in model.named_modules():
        if _has_hooks(module):
            raise Untraceable(f"module {name or type(model).__name__!r} has hooks")
    try:
        root = _OneArgument(stand_in(model)).eval()
        with torch.enable_grad(), _no_own_gradients(), _no_random_numbers():
            graph = _Tracer().trace(root)
    except Untraceable:
        raise
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        reason = str(error).strip().splitlines()
        raise Untraceable(f"it cannot be traced: {reason[0] if reason else error!r}") from error
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            path = str(node.target)
            node.target = "" if path == _ROOT else path.removeprefix(f"{_ROOT}.")
    result = next(node for node in graph.nodes if node.op == "output").args[0]
    if not isinstance(result, fx.Node):
        raise Untraceable(f"its forward returns a {type(result).__name__}, not one tensor")
    traced = root.model
    for name, value in vars(root).items():
        if isinstance(value, Tensor):  # constants that the model's code makes from nothing traced
            setattr(traced, name, value)
    modules = dict(traced.named_modules())
    _drop_assertions(graph, modules)
    _drop_what_does_nothing(graph, modules)
    _call_norms_as_modules(graph, modules)
    _make_out_of_place(graph, modules)
    return graph, traced


class _OneArgument(nn.Module):
    """Calls a model with its images alone, so that optional arguments keep their defaults."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


def stand_in(model: nn.Module) -> nn.Module:
    """A copy that shares every tensor with the model; its modules and attributes are its own.

    Running it leaves no trace in the model: nothing that a forward pass may keep as an attribute.
    """
    shared = [*model.parameters(), *model.buffers()]
    shared += [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    return copy.deepcopy(model, {id(t): t for t in shared})


def _has_hooks(module: nn.Module) -> bool:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name, None) for name in names)


class _Tracer(fx.Tracer):
    """Records what the model does, with the refusals of `trace`."""

    proxy_buffer_attributes = True  # a buffer is read anew in every pass; a branch on one fails

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Torch's own modules are leaves, unless their forward was replaced on the instance."""
        leaf = super().is_leaf_module(m, module_qualified_name) or isinstance(m, nn.SyncBatchNorm)
        return leaf and "forward" not in vars(m)

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any
    ) -> fx.Node:
        """Record one operation."""
        if not torch.is_grad_enabled():
            raise Untraceable("part of its forward runs without gradient")
        if kind in ("call_function", "call_method") and _draws(target, args, kwargs):
            raise Untraceable("its forward draws random numbers")
        reshapes = kind == "call_method" and target == "view"
        if reshapes and not any(isinstance(a, torch.dtype) for a in args):
            target = "reshape"  # the copy's maps are channels-last, where a view may be impossible
        return super().create_node(kind, target, args, kwargs, *rest, **named)


_RANDOM = frozenset(
    ("randn_like", "rand_like", "randint_like", "normal", "normal_", "uniform_", "random_", "rrelu",
     "bernoulli", "bernoulli_", "exponential_", "multinomial", "poisson")
)  # fmt: skip
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout)


def _draws(target: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation draws random numbers; functional dropout does so by default."""
    if target in _DROPOUTS:
        return bool(kwargs.get("training", args[2] if len(args) > 2 else True))
    return _name(target) in _RANDOM


def _name(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", "")


@contextmanager
def _no_random_numbers() -> Iterator[None]:
    """Refuse numbers drawn outside the graph, which a copy would freeze; put the random state back."""
    before = torch.get_rng_state()
    try:
        yield
        if not torch.equal(before, torch.get_rng_state()):
            raise Untraceable("its forward draws random numbers")
    finally:
        torch.set_rng_state(before)


@contextmanager
def _no_own_gradients() -> Iterator[None]:
    """Refuse autograd functions: tracing sees their forward pass alone."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise Untraceable("its forward has an autograd function of its own")

    function: Any = torch.autograd.Function
    original = function.__dict__["apply"]
    function.apply = staticmethod(refuse)
    try:
        yield
    finally:
        function.apply = original


def _drop_assertions(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Take assertions out, which hold or the live model would not have run, and what nobody reads any more."""
    for node in reversed(list(graph.nodes)):
        called = node.op in ("call_function", "call_method")
        unread = called and not node.users and not _writes_in_place(node, modules)
        if unread or node.target is torch._assert:
            graph.erase_node(node)


_NOTHING_IN_EVAL = (nn.Identity, nn.Dropout, nn.Dropout2d)


def _drop_what_does_nothing(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Take out modules that return their argument, so that a write into their result is one into it."""
    for node in list(graph.nodes):
        if node.op != "call_module" or node.kwargs or len(node.args) != 1:
            continue
        source = node.args[0]
        if isinstance(modules[str(node.target)], _NOTHING_IN_EVAL) and isinstance(source, fx.Node):
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _call_norms_as_modules(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Where a subclass of BatchNorm2d calls the function on its own tensors, call the module instead.

    timm's BatchNorm, which ends in an activation, does so. A copy folds modules.
    """
    for node in list(graph.nodes):
        owner = _owner_of_norm(node, modules) if node.target is F.batch_norm else None
        if owner is not None:
            images, *tensors = node.all_input_nodes
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.call_module(owner, (images,)))
            graph.erase_node(node)
            for tensor in tensors:
                if not tensor.users:
                    graph.erase_node(tensor)


def _owner_of_norm(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    """The path of the module that would compute the same in eval mode as this call of `F.batch_norm`."""
    call = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs)
    call.apply_defaults()
    path = str(getattr(call.arguments["running_mean"], "target", "")).removesuffix(".running_mean")
    owner = modules.get(path)
    if not isinstance(owner, nn.BatchNorm2d) or call.arguments["training"]:
        return None
    names = ("running_mean", "running_var", "weight", "bias")
    own = all(
        getattr(call.arguments[name], "target", None)
        == (None if getattr(owner, name) is None else f"{path}.{name}")
        for name in names
    )
    return path if own and call.arguments["eps"] == owner.eps else None


def _make_out_of_place(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Replace in-place operations: a copy's activations are read again by its backward pass.

    Later readers of what an operation has overwritten read its result instead.

    Raises:
        Untraceable: for writes through views or into items, and operations without a plain twin.
    """
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.target is operator.setitem:
            raise Untraceable("it changes part of a tensor in place")
        if not _writes_in_place(node, modules):
            continue
        target = node.args[0] if node.args else node.kwargs.get("input")
        if isinstance(target, fx.Node):
            others = [target, *(user for user in target.users if user is not node)]
            if any(_may_share_memory(other, modules) for other in others):
                raise Untraceable("it changes part of a tensor in place")
            for later in [user for user in target.users if order[user] > order[node]]:
                later.replace_input_with(target, node)
        _write_anew(node, modules)


def _writes_in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    marked = bool(node.kwargs.get("inplace")) or node.target in (*_OPERATORS, operator.setitem)
    return marked or _ends_in_place(_name(node.target))


def _ends_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _write_anew(node: fx.Node, modules: dict[str, nn.Module]) -> None:
    """Turn one in-place node into its plain twin."""
    if node.op == "call_module":
        modules[str(node.target)].inplace = False  # type: ignore[assignment]
        return
    if node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}
        return
    plain = _name(node.target)[:-1]
    if node.target in _OPERATORS:
        node.target = _OPERATORS[node.target]
    elif node.op == "call_method" and hasattr(Tensor, plain):
        node.target = plain
    elif node.op == "call_function" and (hasattr(torch, plain) or hasattr(F, plain)):
        node.target = getattr(torch, plain, None) or getattr(F, plain)
    else:
        raise Untraceable(f"it calls the in-place operation {_name(node.target)}")


_OPERATORS: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
_VIEWS = frozenset(
    ("view", "reshape", "flatten", "unflatten", "transpose", "permute", "t", "T", "mT", "movedim",
     "swapaxes", "squeeze", "unsqueeze", "expand", "narrow", "select", "chunk", "split", "unbind",
     "getitem", "diagonal", "unfold", "view_as", "expand_as", "detach", "contiguous", "to", "type",
     "float")
)  # fmt: skip


def _may_share_memory(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a result may be a window on another tensor, which a write would change too."""
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], (nn.Flatten, nn.Unflatten))
    views = _name(node.target) in _VIEWS or node.target is getattr
    return node.op in ("placeholder", "get_attr") or views
