"""Record the operations of a model's forward pass: every torch function that it calls, with its arguments.

The live model runs on a few images while a `TorchFunctionMode` of the calling thread watches. So a recording sees
what the model *does now*, whatever decided it: attributes, configuration objects, globals, hooks, wrappers.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastadv.engine import ragged, randomness
from fastadv.engine import recorded_functions as functions
from fastadv.engine.errors import Unrecordable
from fastadv.engine.hidden_draws import may_hide_draws, watched_for_draws
from fastadv.engine.operands import leads_to, tensors_in, version_of
from fastadv.engine.own_functions import is_checkpoint, reads_for_itself, sees_own_functions
from fastadv.engine.recorded_places import NOTHING, Places
from fastadv.engine.recording import RecordedOp, Recording, Ref, item, refs
from fastadv.engine.recording_mode import recording_mode, warm_up, without_graph
from fastadv.engine.unseen_operations import UnseenOperations, others_below, unwatched
from fastadv.engine.watched_size import SizeComparisons, watched

_RAGGED = "its forward looks at a size that depends on values ({})"


def record(
    model: nn.Module, images: Tensor, *, careful: bool, gradients: bool = True, warmup: int = 0
) -> Recording:
    """Run a model on images in eval mode, record its operations, and restore its modes, buffers and attributes.

    Args:
        model: the live model.
        images: [B, ...]; not written to.
        careful: also look for random numbers that torch does not draw, and into autograd functions. This is done
            when an engine is built, and where a model is known to have such functions.
        gradients: keep the autograd graph. Without it a large batch takes little memory.
        warmup: calls after which the model does the same, such as one that fills a cache.

    Raises:
        Unrecordable: with the reason why no copy of this model can be made.
        Exception: whatever the model itself raises.
    """
    with recording_mode(model):
        warm_up(model, images, warmup)
        return recorded(model, images, careful=careful, gradients=gradients)


def recorded(
    model: nn.Module,
    images: Tensor,
    *,
    careful: bool,
    gradients: bool = True,
    make: Callable[[Tensor, bool], Recorder] | None = None,
) -> Recording:
    """As `record`, for a model in `recording_mode`, by a recorder of another kind unless None."""
    make = make or Recorder
    with torch.enable_grad(), nullcontext() if gradients else without_graph(model):
        if not careful:
            return make(images, gradients).run(model)
        found: list[Recording] = []

        def run() -> None:
            recorder = make(images, gradients)
            with sees_own_functions(recorder, Recorder.run.__code__):
                found.append(recorder.run(model))

        generator = randomness.drawing_generator(model, run)
        if generator is not None:
            raise Unrecordable(f"its forward draws random numbers ({generator})")
        return found[-1]


class Recorder(TorchFunctionMode):
    """Watches one forward pass of the calling thread.

    Attributes:
        recording: what it has seen.
        inside: how many autograd functions, or functions of torch, run now; each is recorded as one operation.
        profile: Python's profile function during this pass; None if it has none.
        refusal: why no copy can be made; empty where nothing speaks against it.
        draws: whether the model was seen to draw a random number of torch's.
    """

    def __init__(self, images: Tensor, gradients: bool = True) -> None:
        super().__init__()
        self.recording = Recording(gradients=gradients)
        self._places = Places(self.recording)
        self._ragged: set[int] = set()  # places of tensors whose shape depends on values
        # The arguments of the function that has just run, as `referred` gives them, if `call` has asked.
        self._referred: tuple[Any, Any] | None = None
        self.inside, self.refusal, self.draws = 0, "", False
        self.profile: Callable[..., object] | None = None
        self._handling = 0  # of functions of torch, whose operators are seen with them
        self._comparisons = SizeComparisons()
        self._device = images.device.type
        self._knows_autocast = torch.amp.is_autocast_available(self._device)
        leaf = images.detach().clone().requires_grad_(gradients)
        self.recording.images = leaf

    def run(self, model: nn.Module) -> Recording:
        """Record the model on a copy of the images that is no leaf, so that it may write to it."""
        recording = self.recording
        batch = recording.images.clone()
        self._places.add(batch, depends=True)
        with self, UnseenOperations(self._is_seeing, self._places.depends, self._note_unseen):
            result = model(batch)
        self._comparisons.on = False  # the model may keep sizes
        recording.comparisons = self._comparisons.seen
        recording.hashes_sizes = self._comparisons.hashed
        if self.refusal:  # the model may have caught the exception
            raise Unrecordable(self.refusal)
        if not isinstance(result, Tensor):
            raise Unrecordable(f"its forward returns a {type(result).__name__}, not one tensor")
        place = self._places.of(result)
        if place is None or self._places.is_stale(result):
            raise self._refuse(functions.UNSEEN)
        recording.output, recording.logits = place, result
        return recording

    def _refuse(self, reason: str) -> Unrecordable:
        self.refusal = self.refusal or reason  # the first one tells most
        return Unrecordable(self.refusal)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one function, and record it if its result is a tensor."""
        if (
            func is Tensor.dim
        ):  # asked most often, and neither draws, reads, writes nor makes anything
            return func(*args)
        outermost = not self.inside
        self._handling += 1
        self._see_code(not outermost)
        try:
            return self._handle(func, args, kwargs or {}, sys._getframe(1))
        finally:
            self._handling -= 1
            self._see_code(True)

    def _see_code(self, on: bool) -> None:
        """Let the profile function see code, or let it rest, as it would be called at each step of our own."""
        if self.profile is not None:
            sys.setprofile(self.profile if on else None)

    def _is_seeing(self) -> bool:
        return self._handling > 0 or self.inside > 0

    def _note_unseen(self) -> None:
        self.refusal = self.refusal or functions.UNSEEN

    def _handle(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], caller: types.FrameType
    ) -> Any:
        name = functions.name_of(func)
        if self.inside:
            self._check_draws(func, name, args, kwargs)
            return func(*args, **kwargs)
        if name == "__get__":
            read = getattr(func.__self__, "__name__", "")
            if read == "shape":
                found = func(*args, **kwargs)
                self._check_what_is_read("shape", [args[0]])
                return watched(found, self._comparisons)
            # Which takes hooks that nobody sees.
            if read == "grad_fn" and not is_checkpoint(caller):
                raise self._refuse("its forward looks into the graph of its gradients")
            if (
                read == "is_leaf"
                and self._places.of(args[0]) == 0
                and reads_for_itself(func, caller)
            ):
                raise self._refuse("its forward asks whether its images are a leaf")
            if read not in functions.TENSOR_PROPERTIES:
                asks = reads_for_itself(func, caller) and not self._places.depends(args[0])
                if asks and not leads_to(args[0], self.recording.images):
                    raise self._refuse("its forward asks whether its weights require grad")
                return func(*args, **kwargs)
        if name == "__set__" and func.__self__.__name__ == "data":
            raise self._refuse("its forward exchanges the data of a tensor")
        operands = tensors_in((args, kwargs))
        self._check_draws(func, name, args, kwargs)
        self._check_what_stays(name, args, kwargs)
        versions, self._referred = [version_of(t) for t in operands], None
        self.enter()  # an autograd function that torch itself calls is part of this function
        self._see_code(True)
        try:
            with unwatched(func, operands):
                result = self.call(func, args, kwargs)
        finally:
            self._see_code(False)
            self.leave()
        written = [t for t, v in zip(operands, versions, strict=True) if version_of(t) != v]
        written = written or functions.uncounted(name, args, kwargs, result, self._places.depends)
        made = tensors_in((result,))
        if not made and not written:
            self._check_what_is_read(name, operands)
            if (
                result is not None
                and may_hide_draws(func)
                and any(map(self._places.depends, operands))
            ):
                raise self._refuse(f"its forward takes numbers that others compute ({name})")
            if name in functions.SIZES:
                return watched(result, self._comparisons)
            if name == "__len__":  # Python makes a plain integer of it, which nobody can watch
                self._comparisons.note(result)
        elif name not in functions.NO_OPERATION:
            self._record(func, name, args, kwargs, result, written, self._referred)
        return result

    def enter(self) -> None:
        """Take what follows for a part of one function, until `leave`."""
        self.inside += 1
        self._comparisons.on = False

    def leave(self) -> None:
        """End what `enter` has begun."""
        self.inside -= 1
        self._comparisons.on = self.inside == 0

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one function of torch; the next recorded op is its."""
        if not may_hide_draws(func):
            return func(*args, **kwargs)
        device = self.recording.images.device
        result, drawn = watched_for_draws(lambda: func(*args, **kwargs), device)
        if drawn:
            self.draws = True
            raise self._refuse(f"its forward draws random numbers (in {func})")
        return result

    def _check_draws(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if randomness.draws(func, name, args, kwargs):
            self.draws = True
            raise self._refuse(f"its forward draws random numbers ({name})")

    def _check_what_stays(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse a function before it changes the model's parameters or their gradients."""
        if name in functions.REFUSED:
            raise self._refuse(functions.REFUSED[name])
        for target in functions.targets_of(name, args, kwargs):
            if self._places.of(target) is None or self._places.is_the_models(target):
                raise self._refuse(f"its forward writes into the model's own tensors ({name})")

    def _check_what_is_read(self, name: str, operands: list[Tensor]) -> None:
        if name in functions.READS and any(map(self._places.depends, operands)):
            raise self._refuse(f"its forward looks at values that depend on the images ({name})")
        if name in ragged.SIZES and any(map(self._is_ragged, operands)):
            raise self._refuse(_RAGGED.format(name))

    def _is_ragged(self, tensor: Tensor) -> bool:
        """Whether the shape of a tensor depends on values of the images."""
        return bool(self._ragged) and self._places.of(tensor) in self._ragged

    def _becomes_ragged(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], written: list[Tensor]
    ) -> bool:
        """Whether the shape of a function's result depends on values of the images.

        Raises:
            Unrecordable: the number of its results does.
        """
        if self._ragged:
            keeps = bool(written) or name in ragged.KEEPS_SHAPE
            if any(map(self._is_ragged, tensors_in(args[:1] if keeps else (args, kwargs)))):
                if name in ragged.CUTS:
                    raise self._refuse(_RAGGED.format(name))
                return True
        return any(map(self._places.depends, ragged.deciding(name, args, kwargs)))

    def _record(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        written: list[Tensor],
        before: tuple[Any, Any] | None = None,
    ) -> None:
        recording = self.recording
        self._note_surroundings()
        before = before or (self.referred(args), self.referred(kwargs))
        depends = any(recording.depends[ref.place] for ref in refs(before))
        is_ragged = self._becomes_ragged(name, args, kwargs, written)
        if written:
            self._note_write(name, args, written)
            result = written[0]
        place = len(recording.values)
        single = isinstance(result, Tensor)
        if single and not written and self._places.of(result) is not None:
            return  # the function has returned its argument
        grad, dim = torch.is_grad_enabled(), result.dim() if single else None
        recording.ops.append(RecordedOp(func, *before, place, grad, bool(written), dim))
        if single:
            self._places.add(result, depends)
        else:
            self._add_several(result, place, depends)
        if is_ragged:
            self._ragged.update(range(place, len(recording.values)))

    def _note_surroundings(self) -> None:
        """Note what the forward pass has entered around the operation that is recorded now."""
        below = others_below()
        if below is not None:
            raise self._refuse(f"its forward enters {below}, which may change what torch computes")
        if self._knows_autocast and torch.is_autocast_enabled(self._device):
            self.recording.autocast = True

    def _note_write(self, name: str, args: tuple[Any, ...], written: list[Tensor]) -> None:
        target = written[0]
        if any(map(self._places.is_the_models, written)):
            raise self._refuse(f"its forward writes into the model's own tensors ({name})")
        if len({id(t) for t in written}) > 1 or not args or args[0] is not target:
            raise self._refuse(f"its forward writes into several tensors at once ({name})")
        self._places.note_write(target)

    def _add_several(self, result: Any, place: int, depends: bool) -> None:
        """Give each tensor of a tuple its place, behind the place of the tuple itself."""
        self.recording.values.append(NOTHING)
        self.recording.depends.append(depends)
        if not isinstance(result, (tuple, list)):
            raise self._refuse(f"a function of its forward returns a {type(result).__name__}")
        for number, part in enumerate(result):
            where = len(self.recording.values)
            if isinstance(part, Tensor):
                grad, args = torch.is_grad_enabled(), (Ref(place), number)
                op = RecordedOp(item, args, {}, where, grad, False, part.dim())
                self.recording.ops.append(op)
                self._places.add(part, depends)
            elif part is not None:
                raise self._refuse("a function of its forward returns nested tuples")

    def referred(self, value: Any) -> Any:
        """The value with a `Ref` for each tensor."""
        if value.__class__ in functions.KEPT:
            return value  # as most arguments are
        if isinstance(value, Tensor):
            return Ref(self._place(value))
        if isinstance(value, (tuple, list)):
            return (list if isinstance(value, list) else tuple)(map(self.referred, value))
        if isinstance(value, dict):
            return {k: self.referred(v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(*map(self.referred, (value.start, value.stop, value.step)))
        if isinstance(value, functions.CODE):
            raise self._refuse("its forward hands code of its own to a function of torch")
        plain = functions.plain_argument(value)
        if plain is None:
            raise self._refuse(f"its forward hands a {type(value).__name__} to a function of torch")
        return plain

    def _place(self, tensor: Tensor) -> int:
        if self._places.is_stale(tensor):
            raise self._refuse("its forward changes part of a tensor in place")
        place = self._places.of(tensor)
        if place is not None:
            return place
        if leads_to(tensor, self.recording.images):
            raise self._refuse(functions.UNSEEN)
        return self._places.add_of_model(tensor)

    def record_own_function(self, cls: Any, args: tuple[Any, ...], result: Any) -> None:
        """Record a call of an autograd function that torch does not hand to modes."""
        self.recording.own_functions = True
        # An autograd function switches gradients off for its own code.
        with torch._C.DisableTorchFunction(), torch.enable_grad(), suppress(Unrecordable):
            self._record(cls.apply, "apply", args, {}, result, [])
