"""The attack copy: a frozen, traced, BatchNorm-folded image of a live model in a narrow dtype.

An attack runs a model 2K times at fixed weights, so what depends on the weights alone is done once: BatchNorm
of eval mode becomes part of the convolution before it, weights are stored in the compute dtype and in
channels-last order, and no parameter requires grad. `AttackCopy.refresh` brings live weights over without
changing an address, so that captured graphs and compiled programs stay valid.
"""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastadv.engine.packed_convolution import PackedConv2d
from fastadv.engine.tracing import trace

_FEW_WEIGHTS = 2**16  # of a linear layer


class CopiedConv2d(nn.Module):
    """A convolution with the BatchNorm behind it folded in: ``conv(x, w * s) + (b - mean) * s + beta``."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None, dtype: torch.dtype) -> None:
        super().__init__()
        assert not isinstance(conv.padding, str)
        self.stride, self.padding = conv.stride, conv.padding
        self.dilation, self.groups = conv.dilation, conv.groups
        self.weight: Tensor
        self.bias: Tensor | None
        weight = torch.empty_like(conv.weight, dtype=dtype, memory_format=torch.channels_last)
        self.register_buffer("weight", weight, persistent=False)
        has_bias = conv.bias is not None or norm is not None
        bias = torch.empty(conv.out_channels, dtype=dtype, device=conv.weight.device)
        self.register_buffer("bias", bias if has_bias else None, persistent=False)
        self.packed: PackedConv2d | None = None

    def pack(self, conv: nn.Conv2d) -> None:
        """Keep the weights in the forms of our own kernels, as far as they serve."""
        self.packed = PackedConv2d(conv, self.bias is not None)
        if self.packed.forward is not None and self.packed.backward is not None:
            self.weight = self.weight.new_empty(0)  # `forward` would read weights gone stale

    def refresh(self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> None:
        """Copy the live weights."""
        scale, bias = None, conv.bias
        if norm is not None:
            scale, shift = scale_and_shift(norm)
            bias = shift if bias is None else shift + bias * scale
        if self.packed is not None:
            self.packed.refresh(conv.weight, scale, bias)
        if self.weight.numel():
            by_channel = None if scale is None else scale[:, None, None, None]
            self.weight.copy_(conv.weight if by_channel is None else conv.weight * by_channel)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve in the copy's dtype."""
        x = x.to(self.weight.dtype)
        return F.conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )

    def input_gradient(self, gradient: Tensor, x: Tensor) -> Tensor:
        """The gradient in ``x`` of a gradient at the result."""
        return torch.ops.aten.convolution_backward(
            gradient,
            x.to(self.weight.dtype),
            self.weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            (0, 0),
            self.groups,
            (True, False, False),
        )[0]


class CopiedScaleShift(nn.Module):
    """BatchNorm of eval mode with no convolution before it, as in pre-activation nets: ``x * s + t``."""

    def __init__(self, norm: nn.BatchNorm2d, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale: Tensor
        self.shift: Tensor
        self._dtype = dtype
        assert norm.running_mean is not None
        for name in ("scale", "shift"):
            values = torch.empty_like(norm.running_mean, dtype=torch.float32)
            self.register_buffer(name, values, persistent=False)

    def refresh(self, norm: nn.BatchNorm2d, _: None) -> None:
        """Copy the live statistics and weights."""
        scale, shift = scale_and_shift(norm)
        self.scale.copy_(scale)
        self.shift.copy_(shift)

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift each channel."""
        channels = (1, -1, *[1] * (x.dim() - 2))
        scale, shift = (t.to(self._dtype).view(channels) for t in (self.scale, self.shift))
        return torch.addcmul(shift, x.to(self._dtype), scale)


class CopiedLinear(nn.Module):
    """A linear layer."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor | None
        self.small = False
        for name, value in (("weight", linear.weight), ("bias", linear.bias)):
            values = None if value is None else torch.empty_like(value, dtype=dtype)
            self.register_buffer(name, values, persistent=False)

    def pack(self) -> None:
        """Keep few weights in float32: narrow ones save less time than it takes to convert to and fro."""
        self.small = self.weight.numel() <= _FEW_WEIGHTS
        if self.small:
            self.float()

    def refresh(self, linear: nn.Linear, _: None) -> None:
        """Copy the live weights."""
        self.weight.copy_(linear.weight)
        if self.bias is not None:
            self.bias.copy_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply in the dtype of the weights."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class CopiedModule(nn.Module):
    """Any other module with numbers of its own, in the copy's dtype."""

    def __init__(self, live: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = copy.deepcopy(live).to(dtype).requires_grad_(False)
        self._dtype = dtype

    def refresh(self, live: nn.Module, _: None) -> None:
        """Copy the live parameters and buffers."""
        own = (*self.inner.parameters(), *self.inner.buffers())
        theirs = (*live.parameters(), *live.buffers())
        for mine, value in zip(own, theirs, strict=True):
            mine.copy_(value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the inner module on arguments in its dtype."""
        cast = [_cast(a, self._dtype) for a in args]
        return self.inner(*cast, **{k: _cast(v, self._dtype) for k, v in kwargs.items()})


def scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """BatchNorm of eval mode as ``x * scale + shift``, both [C]."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    return value


class AttackCopy(nn.Module):
    """A model's attack copy. It knows the live model's parts by name and holds no reference to it.

    Args:
        model: the live model; it is traced in eval mode and keeps its own modes.
        dtype: of weights and activations; logits come out in float32.
        pack: hold convolutions in the form of our own CPU kernel where it serves. Such a copy is run by
            `fastadv.engine.cpu_program.Program`, not called.

    Raises:
        Untraceable: with the reason, when the model cannot be copied.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, pack: bool = False) -> None:
        super().__init__()
        graph, traced = trace(model)
        parts = _copy_modules(graph, traced, dtype)
        constants = _copy_constants(graph, traced)
        graph.lint()
        root: dict[str, Any] = {part.name: part.copy for part in parts}
        root.update({name: value for name, (_, value) in constants.items()})
        self.graph_module = fx.GraphModule(root, graph)
        self.graph_module.graph.eliminate_dead_code()
        self.graph_module.recompile()
        self._autocast = dtype if dtype in (torch.bfloat16, torch.float16) else None
        self._parts = [part for part in parts if isinstance(part.copy, _REFRESHED)]
        # What the model does not have was made by its forward pass, from nothing that changes.
        self._constants = {n: p for n, (p, _) in constants.items() if _has(model, p)}
        if pack:
            live = dict(model.named_modules())
            for part in parts:
                module = live[part.module]
                if isinstance(part.copy, CopiedConv2d) and isinstance(module, nn.Conv2d):
                    part.copy.pack(module)
                elif isinstance(part.copy, CopiedLinear):
                    part.copy.pack()
        self.eval()
        self.refresh(model)

    @torch.no_grad()
    def refresh(self, model: nn.Module) -> None:
        """Copy the live model's weights and statistics into the copy's own memory."""
        live = dict(model.named_modules())
        for part in self._parts:
            norm = live[part.norm] if part.norm is not None else None
            part.copy.refresh(live[part.module], norm)  # type: ignore[operator]
        for name, path in self._constants.items():
            getattr(self.graph_module, name).copy_(operator.attrgetter(path)(model))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, C] in float32 of images [B, ...]."""
        with self.autocast(x.device):
            return self.graph_module(x).float()

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context of a pass: it casts what the model's own code does with its own parameters."""
        return torch.autocast(device.type, self._autocast, enabled=self._autocast is not None)


def _has(model: nn.Module, path: str) -> bool:
    try:
        operator.attrgetter(path)(model)
    except AttributeError:
        return False
    return True


@dataclass(frozen=True)
class _Part:
    """A copied module: its name in the copy, and the live module and folded BatchNorm by path."""

    name: str
    copy: nn.Module
    module: str
    norm: str | None


_REFRESHED = (CopiedConv2d, CopiedScaleShift, CopiedLinear, CopiedModule)


def _copy_modules(graph: fx.Graph, model: nn.Module, dtype: torch.dtype) -> list[_Part]:
    """Copy the module of every call, so that one shared by two calls can be folded differently."""
    live = dict(model.named_modules())
    norms = _fold_norms(graph, live)
    parts: list[_Part] = []
    for node in list(graph.nodes):
        if node.op != "call_module":
            continue
        path = str(node.target)
        norm = norms.get(node)
        made = _copy_of(live[path], live[norm] if norm is not None else None, dtype)
        node.target = f"part{len(parts)}"
        parts.append(_Part(node.target, made, path, norm))
    return parts


def _copy_of(module: nn.Module, norm: nn.Module | None, dtype: torch.dtype) -> nn.Module:
    if _is_plain_conv(module):
        assert norm is None or _is_plain_norm(norm)
        return CopiedConv2d(module, norm, dtype)
    if _is_plain_norm(module):
        return CopiedScaleShift(module, dtype)
    if type(module) is nn.Linear:
        return CopiedLinear(module, dtype)
    if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
        return CopiedModule(module, dtype)
    return copy.deepcopy(module)


def _is_plain_conv(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    return (
        type(module) is nn.Conv2d
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def _is_plain_norm(module: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    """Whether a module is BatchNorm; a call of a subclass is in the graph only if it does nothing else."""
    norm = isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm))
    return norm and module.running_mean is not None


def _fold_norms(graph: fx.Graph, live: dict[str, nn.Module]) -> dict[fx.Node, str]:
    """Take every BatchNorm that alone uses a convolution's result out of the graph: its path by node."""
    folded: dict[fx.Node, str] = {}
    for node in list(graph.nodes):
        users = list(node.users)
        if node.op != "call_module" or len(users) != 1 or users[0].op != "call_module":
            continue
        norm = str(users[0].target)
        if _is_plain_conv(live[str(node.target)]) and _is_plain_norm(live[norm]):
            users[0].replace_all_uses_with(node)
            graph.erase_node(users[0])
            folded[node] = norm
    return folded


def _copy_constants(graph: fx.Graph, model: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """Copy what the model's own code reads, parameters and buffers, each in its own dtype."""
    names: dict[str, str] = {}
    constants: dict[str, tuple[str, Tensor]] = {}
    for node in graph.nodes:
        if node.op != "get_attr":
            continue
        path = str(node.target)
        if path not in names:
            names[path] = f"constant{len(names)}"
            value = operator.attrgetter(path)(model).detach().clone()
            constants[names[path]] = (path, value)
        node.target = names[path]
    return constants
