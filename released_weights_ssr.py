"""Reads the two files in which the authors of SSR-Encoder released their weights, and detects other files that users
pass by mistake."""

import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load_file

from . import internals_ssr


def read_released_weights(
    aligner: str | os.PathLike | Mapping[str, torch.Tensor],
    layers: str | os.PathLike | Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    layer_names: Sequence[str],
) -> dict[str, torch.Tensor]:
    """Reads the two released files or state dicts (see [`SSREncoder.from_released`]) and returns a state dict for an encoder.

    `expected` is the state dict of the encoder, of which only names and shapes are used. `layer_names` are the names of
    its modules for the UNet's layers, in the order of the released file."""
    names = {
        "aligner": {_released_aligner_name(name): name for name in expected if not name.startswith("layers.")},
        # the released file numbers all attention layers; every second one is a cross-attention layer
        "layers": {
            f"{2 * index + 1}.{part}_SSR.weight": f"layers.{name}.{part}.weight"
            for index, name in enumerate(layer_names)
            for part in ("to_k", "to_v")
        },
    }
    released = {"aligner": _read_state_dict("aligner", aligner), "layers": _read_state_dict("layers", layers)}
    _check_released_names(released, names)
    state_dict = {}
    for argument in released:
        for released_name, name in names[argument].items():
            tensor = released[argument][released_name]
            _check_released_tensor(argument, released_name, tensor, expected[name])
            state_dict[name] = tensor
    return state_dict


def _released_aligner_name(name: str) -> str:
    if name.startswith("norm."):
        return name
    if name.startswith(("to_q.", "to_k.")):
        return f"aligner.{name}"
    return f"aligner.processor.{name}"


# Kinds of files that users may pass, with a test of the tensor names for each. The first kind that matches is used.
# The error message then says what the file is.
_KINDS: dict[str, Callable[[set[str]], bool]] = {
    "the released aligner (pytorch_model.bin)": lambda names: any(name.startswith("aligner.") for name in names),
    "the released layers (pytorch_model_1.bin)": lambda names: any("_SSR." in name for name in names),
    "an encoder that `save_pretrained` wrote, which `SSREncoder.from_pretrained` loads": lambda names: (
        any(name.startswith("layers.") for name in names) and "to_q.weight" in names or "to_out.0.weight" in names
    ),
    "a LoRA": lambda names: any("lora" in name.lower() for name in names),
    "an IP-Adapter": lambda names: any(name.startswith(("ip_adapter", "image_proj")) for name in names),
    "a whole Stable Diffusion checkpoint": lambda names: any(
        name.startswith("model.diffusion_model.") for name in names
    ),
}
_ALIGNER, _LAYERS = list(_KINDS)[:2]


def _kind(names: set[str]) -> str | None:
    return next((kind for kind, fits in _KINDS.items() if fits(names)), None)


def _check_released_names(
    released: Mapping[str, Mapping[str, torch.Tensor]], names: Mapping[str, Mapping[str, str]]
) -> None:
    kinds = {argument: _kind(set(tensors)) for argument, tensors in released.items()}
    if (kinds["aligner"], kinds["layers"]) == (_LAYERS, _ALIGNER):
        raise ValueError(
            f"`aligner` and `layers` are in the wrong order: `aligner` is {_LAYERS}, `layers` is {_ALIGNER}."
        )
    for argument, wanted in (("aligner", _ALIGNER), ("layers", _LAYERS)):
        missing = sorted(names[argument].keys() - released[argument].keys())
        extra = sorted(released[argument].keys() - names[argument].keys())
        if (missing or extra) and kinds[argument] not in (None, wanted):
            twice = ", as the other file is" if len(set(kinds.values())) == 1 else ""
            raise ValueError(f"`{argument}` has to be {wanted}, but is {kinds[argument]}{twice}.")
        if missing or extra:
            raise ValueError(
                f"`{argument}` does not hold the released tensors: missing {internals_ssr.shorten_names(missing) or 'none'},"
                f" unexpected {internals_ssr.shorten_names(extra) or 'none'}."
            )


def _check_released_tensor(argument: str, name: str, tensor: Any, expected: torch.Tensor) -> None:
    shape = expected.shape
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.layout != torch.strided:
        what = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ValueError(f"`{argument}` holds {name} as {what}, but it has to be a tensor of floats.")
    if tensor.shape != shape:
        raise ValueError(f"`{argument}` holds {name} of shape {tuple(tensor.shape)}, but {tuple(shape)} was expected.")
    # the weights are converted to the dtype of the encoder
    if tensor.is_meta or not internals_ssr.is_finite(tensor, expected.dtype):
        raise ValueError(f"`{argument}` holds {name} with values that are not finite numbers in {expected.dtype}.")


def _read_state_dict(argument: str, source: Any) -> Mapping[str, torch.Tensor]:
    state_dict = source
    if not isinstance(source, Mapping):
        try:
            path = os.fspath(source)
            if path.endswith(".safetensors"):
                state_dict = load_file(path)
            else:
                state_dict = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise
        except Exception as error:  # a parser that reads arbitrary bytes may raise anything
            # the message of an `UnpicklingError` advises to load the file with code execution enabled
            lines = not isinstance(error, pickle.UnpicklingError) and str(error).splitlines()
            reason = lines[0] if lines else "it is not a file of tensors"
            raise ValueError(f"`{argument}`: {source} holds no weights that can be read: {reason}") from error
    if not isinstance(state_dict, Mapping) or not all(isinstance(name, str) for name in state_dict):
        raise ValueError(f"`{argument}` has to hold tensors by name, but holds {type(state_dict).__name__}.")
    return state_dict
