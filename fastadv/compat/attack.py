"""The base of the attacks in `fastadv.compat`: reading images and labels, choosing targets, saving results."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fastadv.attacks import Attack as OwnAttack
from fastadv.attacks.arguments import check_labels, module_device
from fastadv.attacks.options import AttackType, names_checked
from fastadv.compat.inputs import check_channels, check_normalised, integer_labels, target_classes
from fastadv.compat.saved import load_results, write_results
from fastadv.compat.their_names import THEIR_NAMES, in_names_of_a_call, in_their_names
from fastadv.models import Normalized
from fastadv.ops.synonyms import SYNONYMS
from fastadv.ops.values import (
    check_bool,
    check_choice,
    check_path,
    did_you_mean,
    integer,
    number,
    shown,
)
from fastadv.seeding import draw_seed

Images = TypeVar("Images", Tensor, "np.ndarray[Any, Any]")
TargetFunction = Callable[[Tensor, Tensor], Tensor]
BY_LABEL = "targeted(label)"


class Attack(metaclass=AttackType):
    """Base of the attacks in `fastadv.compat`.

    Args:
        model: a module from images [B, C, H, W] in 0..1 to logits; see `set_normalization_used` for others.
        make: a function that makes the attack of `fastadv` for a model.

    Attributes:
        own: the attack of `fastadv` that does the work. Its settings, such as ``eps`` and ``steps``, are also
            attributes of this object. A value that is set is checked, and holds from the next call on.
    """

    def __init__(self, model: nn.Module, make: Callable[[nn.Module], OwnAttack]) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a module, got {shown(model)}")
        self.model = model
        with in_their_names():
            self.own = make(model)
        self.normalization_used: dict[str, Tensor] | None = None
        self._mode = "default"
        self._target_function: TargetFunction | None = None

    @property
    def device(self) -> torch.device:
        """The device of the model, to which images are moved."""
        return module_device(self.model) or torch.device("cpu")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("own", "model"):
            raise AttributeError(name)
        setting = THEIR_NAMES.get(name, name)
        if setting == "passes" or setting in _settings_of(self.own):
            return getattr(self.own, setting)
        raise self._no_attribute(name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = vars(self).get("own")
        if own is None or name.startswith("_") or name == "normalization_used":
            super().__setattr__(name, value)
            return
        if name in ("model", "targeted"):
            instead = "make a new attack" if name == "model" else "call a set_mode method"
            raise AttributeError(f"{name} of {type(self).__name__} cannot be set; {instead}")
        name = THEIR_NAMES.get(name, name)
        if name != "passes" and name not in _settings_of(own):
            raise self._no_attribute(name)
        with in_their_names():
            setattr(own, name, value)

    def _no_attribute(self, name: str) -> AttributeError:
        hint = did_you_mean(name, _settings_of(self.own), SYNONYMS)
        return AttributeError(f"{type(self).__name__} has no attribute {name!r}{hint}")

    def __repr__(self) -> str:
        settings: dict[str, object] = {
            "model_name": type(self.model).__name__,
            "device": str(self.device),
        }
        settings |= {name: getattr(self.own, name) for name in _settings_of(self.own)}
        settings["attack_mode"] = self._mode
        settings["normalization_used"] = self.normalization_used is not None
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in settings.items())})"

    @names_checked
    def __call__(
        self,
        inputs: Images,
        labels: Tensor | np.ndarray[Any, Any] | None = None,
        *,
        epsilons: float | Sequence[float] | None = None,
    ) -> Any:
        """Attack a batch.

        Args:
            inputs: images [B, C, H, W]: floating-point in 0..1, or normalised after `set_normalization_used`, or
                bytes 0..255.
            labels: [B], integers of any width; the targets in the mode "targeted(label)". By default the labels
                are the model's own predictions.
            epsilons: radii for this call, one or several; the step size changes in proportion.

        Returns:
            The adversarial images, on the device of ``inputs``, as a NumPy array if ``inputs`` is one. For bytes
            they are float32 in 0..1. For several radii, a list with the images for each radius.

        Raises:
            TypeError: if the labels are no integers, or the attack in `fastadv` raises it.
            ValueError: if labels are missing in the mode "targeted(label)", if the images are not normalised by
                the numbers of `set_normalization_used`, or if the attack in `fastadv` raises it.
        """
        x, back = self._taken(inputs)
        y = self._labels(x, labels)
        if self._target_function is not None:
            given = inputs if isinstance(inputs, Tensor) else torch.as_tensor(inputs, device="cpu")
            found = self._target_function(given.to(self.device), y)
            y = target_classes(found, y, self._mode == BY_LABEL)
        if epsilons is None:
            return back(self._named(x, y, None))
        radii = epsilons.tolist() if isinstance(epsilons, Tensor | np.ndarray) else epsilons
        if not isinstance(radii, list | tuple):
            return back(self._named(x, y, number("epsilons", radii)))
        if not radii:
            raise ValueError(f"epsilons must be one radius or several, got {shown(epsilons)}")
        return [back(self._named(x, y, number("epsilons", eps))) for eps in radii]

    forward = __call__

    def _labels(self, x: Tensor, labels: Tensor | np.ndarray[Any, Any] | None) -> Tensor:
        """The labels of a call, or the model's own predictions if there are no labels."""
        if labels is not None:
            return integer_labels(labels).to(self.device)
        if self._mode == BY_LABEL:
            raise ValueError(
                f"labels must be given in the mode {BY_LABEL}, where they are the targets"
            )
        return self._logits(x).argmax(1)

    def _named(self, x: Tensor, y: Tensor, eps: float | None) -> Tensor:
        """`_perturbed`, with errors in the words of the caller."""
        labels = "labels" if self._mode in ("default", BY_LABEL) else "targets"
        with in_names_of_a_call(labels, "eps" if eps is None else "epsilons"):
            return self._perturbed(x, y, eps)

    def _perturbed(self, x: Tensor, y: Tensor, eps: float | None) -> Tensor:
        return self.own(x, y, eps=eps)

    def get_mode(self) -> str:
        """Return the mode: default, or targeted with the way targets are chosen."""
        return self._mode

    def set_mode_default(self) -> None:
        """Attack without targets: lead images away from their labels."""
        self._set_mode("default", None)

    def set_mode_targeted_by_label(self, quiet: bool = False) -> None:
        """Use the labels of a call as targets."""
        self._set_mode(BY_LABEL, lambda images, labels: labels)

    def set_mode_targeted_by_function(
        self, target_map_function: TargetFunction, quiet: bool = False
    ) -> None:
        """Let a function of images and labels choose the targets [B]."""
        if not callable(target_map_function):
            raise TypeError(
                f"target_map_function must be a function, got {shown(target_map_function)}"
            )
        self._set_mode("targeted(custom)", target_map_function)

    def set_mode_targeted_random(self, quiet: bool = False) -> None:
        """Aim at a random class other than the label."""
        self._set_mode("targeted(random)", self._random_targets)

    def set_mode_targeted_least_likely(self, kth_min: int = 1, quiet: bool = False) -> None:
        """Aim at the least likely class other than the label, or at the kth least likely."""
        rank = integer("kth_min", kth_min, at_least=1)

        def targets(images: Tensor, labels: Tensor) -> Tensor:
            logits = self._logits(self._taken(images)[0])
            with in_names_of_a_call("labels", "eps"):
                check_labels(labels, logits.shape[1])
            if rank >= logits.shape[1]:
                raise ValueError(
                    f"kth_min must be less than the {logits.shape[1]} classes, got {rank}"
                )
            others = logits.scatter(1, labels.unsqueeze(1), torch.inf)
            return others.argsort(1)[:, rank - 1]

        self._set_mode("targeted(least-likely)", targets)

    def _random_targets(self, images: Tensor, labels: Tensor) -> Tensor:
        classes = self._logits(self._taken(images)[0][:1]).shape[1]
        with in_names_of_a_call("labels", "eps"):
            check_labels(labels, classes)
        generator = torch.Generator().manual_seed(draw_seed())
        steps = torch.randint(1, classes, (len(labels),), generator=generator, device="cpu")
        return (labels + steps.to(labels.device)) % classes

    def _set_mode(self, mode: str, function: TargetFunction | None) -> None:
        if "targeted" not in _settings_of(self.own):
            raise ValueError(f"{type(self).__name__} has no targeted mode")
        self.own.targeted = function is not None
        self._mode, self._target_function = mode, function

    def set_model_training_mode(
        self,
        model_training: bool = False,
        batchnorm_training: bool = False,
        dropout_training: bool = False,
    ) -> None:
        """Attack the model in eval mode, or with all three True in train mode, which moves BatchNorm's statistics.

        Raises:
            ValueError: if some flags are True and others are not. No attack here mixes the modes.
        """
        check_bool("model_training", model_training)
        parts = {"batchnorm_training": batchnorm_training, "dropout_training": dropout_training}
        for name, flag in parts.items():
            if not check_bool(name, flag) and model_training:
                raise ValueError(f"{name} must be True where model_training is, got False")
        self.own.train_mode = "moving" if model_training else False

    def set_normalization_used(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Take images that are normalised by these numbers, for a model that expects such images.

        The radius and the bounds still refer to images in 0..1.

        Args:
            mean: the mean of each channel of images in 0..1.
            std: the standard deviation of each channel.

        Raises:
            ValueError: if a mean is outside 0..1, such as a mean of images in 0..255.
        """
        wrapped = Normalized(self.model, mean, std).to(self.device)
        if not 0 <= wrapped.mean.min() <= wrapped.mean.max() <= 1:
            raise ValueError(f"mean must be the mean of images in 0..1, got {shown(mean)}")
        # Only the wrapper's own flag: the modules inside keep their modes.
        wrapped.training = self.model.training
        self.own.model = wrapped
        self.normalization_used = {"mean": wrapped.mean, "std": wrapped.std}

    def save(
        self,
        data_loader: Iterable[tuple[Tensor, Tensor]],
        save_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
        return_verbose: bool = False,
        save_predictions: bool = False,
        save_clean_inputs: bool = False,
        save_type: str = "float",
    ) -> tuple[float, float, float] | None:
        """Attack all batches of a loader, and write the results into a file for ``torch.load``.

        Args:
            data_loader: batches of images and labels.
            save_path: the file, written at the end in one piece; None writes no file.
            verbose: print accuracy and distance.
            return_verbose: return accuracy and distance.
            save_predictions: add ``preds``, the predicted classes of the adversarial images.
            save_clean_inputs: add ``clean_inputs``.
            save_type: ``"float"``: images in 0..1; ``"int"``: bytes.

        Returns:
            With ``return_verbose``, the robust accuracy in percent, the mean L2 distance of the adversarial images
            that are misclassified, and the seconds that the last batch took. Else None.

        Raises:
            OSError: if the file cannot be written.
            ValueError: if ``save_type`` is unknown, if there is no batch, or if ``verbose`` or ``return_verbose``
                is true in the mode "targeted(label)".
        """
        if self._mode == BY_LABEL and (verbose or return_verbose):
            raise ValueError(
                f"verbose and return_verbose must be False in the mode {BY_LABEL}: its labels are targets, "
                "from which no accuracy follows"
            )
        check_choice("save_type", save_type, ("float", "int"))
        if save_path is not None:
            check_path("save_path", save_path)
        check_bool("verbose", verbose)
        check_bool("return_verbose", return_verbose)
        check_bool("save_predictions", save_predictions)
        check_bool("save_clean_inputs", save_clean_inputs)
        content, distance, seconds = self._attack_all(data_loader)
        accuracy = 100 * (content["preds"] == content["labels"]).float().mean().item()
        if save_path is not None:
            kept = {"preds": save_predictions, "clean_inputs": save_clean_inputs}
            content = {name: value for name, value in content.items() if kept.get(name, True)}
            write_results(save_path, content, save_type)
        if verbose:
            print(f"robust accuracy {accuracy:.2f} %, L2 distance {distance:.5f}")
        return (accuracy, distance, seconds) if return_verbose else None

    def _attack_all(
        self, data_loader: Iterable[tuple[Tensor, Tensor]]
    ) -> tuple[dict[str, Tensor], float, float]:
        """Attack all batches of a loader.

        Returns:
            Images, labels and predictions under their names in the file; the mean L2 distance of the adversarial
            images that are misclassified, 0 without any; and the seconds of the last batch.
        """
        if isinstance(data_loader, Tensor | tuple) or not isinstance(data_loader, Iterable):
            raise TypeError(
                f"data_loader must be a DataLoader or a list of batches (images, labels), got {shown(data_loader)}"
            )
        names = ("adv_inputs", "labels", "preds", "clean_inputs")
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        distances = []
        for batch in data_loader:
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                raise TypeError(
                    f"data_loader must give batches (images, labels), got {shown(batch)}"
                )
            began = time.perf_counter()
            inputs, labels = batch
            clean = self._taken(inputs)[0]
            adv = self._result_taken(self(inputs, labels), inputs)
            found = self._logits(adv).argmax(1)
            wrong = found != integer_labels(labels).to(found.device)
            distances.append((adv - clean).flatten(1).norm(dim=1)[wrong].cpu())
            for name, values in zip(names, (adv, labels, found, clean), strict=True):
                parts[name].append(values.detach().cpu())
            seconds = time.perf_counter() - began
        if not distances:
            raise ValueError("data_loader must have at least one batch, got 0")
        broken = torch.cat(distances)
        content = {name: torch.cat(values) for name, values in parts.items()}
        return content, broken.mean().item() if len(broken) else 0.0, seconds

    load = staticmethod(load_results)

    def _taken(
        self, inputs: Tensor | np.ndarray[Any, Any]
    ) -> tuple[Tensor, Callable[[Tensor], Any]]:
        """Images in 0..1 where the model is, and the way back to the caller's kind of images."""
        from_numpy = isinstance(inputs, np.ndarray)
        given = torch.from_numpy(np.ascontiguousarray(inputs)) if from_numpy else inputs
        if not isinstance(given, Tensor):
            raise TypeError(f"inputs must be a tensor or a NumPy array, got {shown(inputs)}")
        x, used = given.to(self.device), self.normalization_used
        if x.dtype == torch.uint8:
            x = x.float() / 255
        elif used is not None:
            check_channels(x, used["mean"])
            x = (x * used["std"].to(x) + used["mean"].to(x)).detach()
            check_normalised(x)
            x = x.clamp(0, 1)  # rounding may lead a little out of the bounds

        def back(adv: Tensor) -> Any:
            if used is not None and given.dtype != torch.uint8:
                adv = (adv - used["mean"].to(adv)) / used["std"].to(adv)
            adv = adv.to(given.device)
            return adv.numpy() if from_numpy else adv

        return x, back

    def _result_taken(self, adv: Images, of: Images) -> Tensor:
        """The adversarial images that a call with the images ``of`` returned, in 0..1 on the model's device."""
        if str(of.dtype).rpartition(".")[2] == "uint8":  # results for bytes are not normalised
            return torch.as_tensor(adv, device="cpu").to(self.device)
        return self._taken(adv)[0]

    def _logits(self, x: Tensor) -> Tensor:
        """The model's logits for images in 0..1, in eval mode."""
        return self.own.logits_of_model(x)


def _settings_of(own: OwnAttack) -> tuple[str, ...]:
    return (*(field.name for field in fields(own.settings) if field.init), "seed")
