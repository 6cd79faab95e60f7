"""Steps of a program for blocks in which each layer reads all earlier results, as in DenseNet.

A block's results lie side by side in one map. So a concatenation costs only the copy of its newest part, and its
gradient is added up in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fastadv.engine.cpu_pass import Pass, as_buffer
from fastadv.engine.cpu_steps import ProgramStep
from fastadv.engine.layers import CopiedScaleShift

_OPS = torch.ops.fastadv


@dataclass(eq=False)
class Block:
    """Concatenations of which each continues the one before."""

    channels: int = 0  # of the last


@dataclass
class _Maps:
    """A block's maps in one pass."""

    results: Tensor
    filled: int  # channels
    gradient: Tensor | None = None


class DenseNormStep(ProgramStep):
    """``relu(cat(results) * scale + shift)`` per channel, the ReLU optional.

    Args:
        node: the last node of the step.
        block: shared by the steps of the block.
        part: scale and shift.
        new: the results that this step's concatenation has more than the one before.
        relu: whether there is one.
    """

    def __init__(
        self, node: fx.Node, block: Block, part: CopiedScaleShift, new: list[fx.Node], relu: bool
    ) -> None:
        super().__init__(node, new, relu)
        self._block, self._part = block, part
        self._channels = part.scale.numel()
        block.channels = max(block.channels, self._channels)

    def forward(self, run: Pass) -> None:
        """Put the newest results beside the others; then one pass."""
        values = [run.values[source] for source in self.inputs]
        maps = run.blocks.get(self._block)
        if maps is None:
            batch, _, *size = values[0].shape
            maps = _Maps(run.memory.take((batch, self._block.channels, *size)), 0)
            run.blocks[self._block] = maps
        for value in values:
            end = maps.filled + value.shape[1]
            maps.results[:, maps.filled : end] = value
            maps.filled = end
        x = maps.results[:, : self._channels]
        out = run.memory.take(x.shape)
        _OPS.strided_affine_(out, x, self._part.scale, self._part.shift, self.rectifies)
        run.values[self.node] = out

    def backward(self, run: Pass) -> None:
        """Add to the block's gradient, and hand on the part that is complete now."""
        maps, scale = run.blocks[self._block], self._part.scale
        add = maps.gradient is not None
        if maps.gradient is None:
            maps.gradient = run.memory.take(maps.results.shape)
            maps.gradient[:, self._channels :] = 0
        at_all, gradient = maps.gradient[:, : self._channels], run.gradient(self.node)
        _OPS.strided_scale_(at_all, as_buffer(gradient, run.memory.dtype), scale, add)
        end = self._channels
        for source in reversed(self.inputs):
            first = end - run.values[source].shape[1]
            run.arrive_tensor(source, as_buffer(maps.gradient[:, first:end], run.memory.dtype))
            end = first


def dense_steps(
    nodes: list[fx.Node],
    parts: dict[fx.Node, nn.Module],
    covered: set[fx.Node],
    relu_behind: Callable[[fx.Node], fx.Node | None],
) -> list[ProgramStep]:
    """Steps for blocks of at least two concatenations, each used by a BatchNorm of its own alone.

    Args:
        nodes: of the graph.
        parts: the layers that nodes call.
        covered: nodes that have a step; those of these steps are added.
        relu_behind: the ReLU that alone uses a node.
    """
    order = {node: place for place, node in enumerate(nodes)}
    chains: dict[fx.Node, list[tuple[fx.Node, list[fx.Node]]]] = {}
    for node in nodes:
        joined = _joined(node)
        if not joined or node in covered or not isinstance(_norm(node, parts), CopiedScaleShift):
            continue
        chain = chains.setdefault(joined[0], [])
        before = chain[-1][1] if chain else []
        after = not chain or order[next(iter(node.users))] > order[_end(chain[-1][0], relu_behind)]
        if after and len(joined) > len(before) and joined[: len(before)] == before:
            chain.append((node, joined))
    steps: list[ProgramStep] = []
    for chain in chains.values():
        if len(chain) < 2:
            continue
        block, taken = Block(), 0
        for node, joined in chain:
            (norm,) = node.users
            relu = relu_behind(norm)
            part = parts[norm]
            assert isinstance(part, CopiedScaleShift)
            steps.append(DenseNormStep(relu or norm, block, part, joined[taken:], relu is not None))
            covered.update({node, norm, relu or norm})
            taken = len(joined)
    return steps


def _end(node: fx.Node, relu_behind: Callable[[fx.Node], fx.Node | None]) -> fx.Node:
    """The end of the step of a concatenation."""
    (norm,) = node.users
    return relu_behind(norm) or norm


def _joined(node: fx.Node) -> list[fx.Node]:
    """The results that a node concatenates along the channels; empty for other nodes."""
    if node.target not in (torch.cat, torch.concat) or not node.args:
        return []
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    joined = node.args[0]
    if axis not in (1, -3) or not isinstance(joined, (list, tuple)) or not joined:
        return []
    sources = [t for t in joined if isinstance(t, fx.Node) and t.op != "get_attr"]
    distinct = len(set(sources)) == len(joined) and len(node.args) + len(node.kwargs) <= 2
    return sources if distinct else []


def _norm(node: fx.Node, parts: dict[fx.Node, nn.Module]) -> nn.Module | None:
    """The layer that alone uses a node."""
    users = list(node.users)
    return parts.get(users[0]) if len(users) == 1 else None
