"""Loading a model that a command names by one word: a run directory, a file of weights, or a function."""

from __future__ import annotations

from pathlib import Path

from fastadv.commands.images import Images
from fastadv.commands.judged import JudgedModel, model_of_file, model_of_run
from fastadv.digest import digest_of
from fastadv.models import names_code
from fastadv.trainers.checkpoint import LATEST, find_checkpoint
from fastadv.trainers.run_directory import RunDirectory

_DIGITS = 7  # this number of a hash's digits tells models with one name apart


def model_by_word(
    word: str, network: str | None, images: Images, role: str, network_option: str
) -> JudgedModel:
    """Load a model.

    Args:
        word: a run directory, a file of weights, or module:function, which returns a trained model and whose code
            then runs.
        network: the network's name, for a file of weights, or for a run whose network is a user's own function.
        images: the images, which have the number of classes and of channels.
        role: the option that gives ``word``, for messages.
        network_option: the option that gives ``network``, for messages.

    Raises:
        FileNotFoundError: if there is nothing with this name.
        ValueError: if the network is missing or has no effect, or if the weights do not fit.
    """
    path = Path(word)
    if path.is_file():
        if network is None:
            raise ValueError(
                f"{network_option} must be given with {role} {word}, a file of weights, and name its network"
            )
        return model_of_file(network, word, None, images)
    if path.is_dir():
        find_checkpoint(RunDirectory(word).path, LATEST)  # raises if the folder is no run
        return model_of_run(word, LATEST, network)
    if names_code(word):
        if network is not None:
            raise ValueError(
                f"{network_option} must be left out with {role} {word}, a function, got {network!r}"
            )
        return model_of_file(word, None, None, images)
    raise FileNotFoundError(
        f"{word}: no such file or folder; {role} must be a run directory, a file of weights with "
        f"{network_option}, or module:function"
    )


def digest_name(judged: JudgedModel) -> tuple[str, str]:
    """Return the hash of a model's weights, and the model's name with the first digits of the hash."""
    digest = digest_of(judged.model.state_dict())
    return digest, f"{judged.name} {digest[:_DIGITS]}"
