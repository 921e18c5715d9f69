"""A sample that somebody brings: whether it is what the training needs, and a copy of it.

Shape letters: T tokens of the sample, N taps, H target hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from torchspec.core.errors import SampleError
from torchspec.core.interfaces.algorithm import TrainingSample
from torchspec.core.interfaces.features import Features, NormState
from torchspec.core.ops.given import no_floats, no_numbers

NEEDED = ("tokens", "loss_mask", "hidden_states", "last", "norm_state")
OPTIONAL = ("name", "epoch")
"""Of what describes a sample."""


@dataclass(frozen=True, kw_only=True)
class Required:
    """What a sample must bring.

    tap_layers   decoder layers, 0-based, of whose outputs [T, hidden_size] each are needed, beside the last layer's
    vocab_size   ids are below it
    longest      most tokens
    dtype, place what copies of hidden states are made in, and where
    """

    tap_layers: tuple[int, ...]
    hidden_size: int
    vocab_size: int
    longest: int
    dtype: torch.dtype
    place: torch.device

    @property
    def hf_hidden_states(self) -> tuple[int, ...]:
        """Where the taps are in `hidden_states` of a model of transformers, whose first entry is the embedding.

        The last entry there is the output of the last layer with the final norm applied: `last`, "post_norm"; a tap of
        the last layer is not there.
        """
        return tuple(layer + 1 for layer in self.tap_layers)


def brought(
    required: Required,
    tokens: Tensor | Sequence[int],
    loss_mask: Tensor | Sequence[bool],
    hidden_states: Mapping[int, Tensor] | Tensor,
    last: Tensor,
    *,
    norm_state: NormState,
    name: str,
    epoch: int = 0,
    check_room: Callable[[int], None] = lambda nbytes: None,
) -> tuple[Features, TrainingSample]:
    """Copies, in the dtype and place that are required. `check_room` is given their bytes before they are made.

    Raises SampleError naming the sample and everything that is wrong with it.
    """
    wrong = [] if isinstance(name, str) else [f"name is {name!r}, expected text"]
    if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
        wrong.append(f"epoch is {epoch!r}, expected a whole number, 0 or more")
    ids_T, mask_T = _listed_numbers(tokens, "tokens", wrong), _listed_numbers(loss_mask, "loss_mask", wrong)
    taps = _by_layer(required, hidden_states)
    if ids_T is not None:
        wrong += _wrong_tokens(required, ids_T, mask_T)
    if norm_state not in get_args(NormState):
        wrong.append(f"norm_state is {norm_state!r}, expected one of {', '.join(get_args(NormState))}")
    length = None if ids_T is None else ids_T.numel()
    wrong += taps if isinstance(taps, list) else _wrong_shapes(required, length, {**taps, "last": last})
    _refuse(name, wrong)
    assert isinstance(taps, dict)
    assert ids_T is not None
    assert mask_T is not None
    check_room((len(taps) + 1) * last.numel() * required.dtype.itemsize)
    to: dict[str, Any] = {"dtype": required.dtype, "device": required.place}
    parts = [tensor.detach().to(**to) for tensor in taps.values()]
    taps_TNH = torch.stack(parts, dim=1) if parts else last.new_zeros(len(last), 0, required.hidden_size, **to)
    last_TH = last.detach().to(**to, copy=True).contiguous()
    unfit = [f"hidden states of layer {layer}" for n, layer in enumerate(required.tap_layers)
             if not _finite(taps_TNH[:, n])]  # fmt: skip
    unfit += [] if _finite(last_TH) else ["last"]
    _refuse(name, [f"{what}: not finite in {_named(required.dtype)}" for what in unfit])
    ids_T = ids_T.to("cpu", torch.int64, copy=True)
    features = Features(
        input_ids_T=ids_T,
        taps_TNH=taps_TNH,
        last_TH=last_TH,
        tap_layers=required.tap_layers,
        norm_state=norm_state,
    )
    mask_T = mask_T.to("cpu", torch.bool, copy=True)
    return features, TrainingSample(sample_id=name, input_ids_T=ids_T, loss_mask_T=mask_T)


def arguments(number: int, given: object) -> dict[str, Any]:
    """Of sample `number` of several, that it has what `brought` takes of it. Its number is its name by default."""
    if not isinstance(given, Mapping):
        wrong = [f"is of type {type(given).__name__}, expected a mapping with {', '.join(NEEDED)}"]
    else:
        wrong = [f"{key} is missing" for key in NEEDED if key not in given]
        known = (*NEEDED, *OPTIONAL)
        wrong += [f"{key} is not known (choices: {', '.join(known)})" for key in given if key not in known]
    _refuse(str(number), wrong)
    assert isinstance(given, Mapping)
    return {**given, "name": str(number) if given.get("name") is None else given["name"]}


def _refuse(name: str, wrong: Sequence[str]) -> None:
    if wrong:
        raise SampleError(f"sample {name!r} is not taken:\n" + "\n".join(f"  - {each}" for each in wrong))


def _listed_numbers(given: object, what: str, wrong: list[str]) -> Tensor | None:
    """A tensor of them; None where it adds to what is wrong."""
    try:
        numbers = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        wrong.append(f"{what}: {type(given).__name__}, expected numbers [T] ({error})")
        return None
    if (fault := no_numbers(numbers)) is not None:
        wrong.append(f"{what}: {fault}")
        return None
    return numbers.detach()


def _by_layer(required: Required, given: object) -> dict[object, Tensor] | list[str]:
    """The required taps, in their order; or what is wrong."""
    layers = required.tap_layers
    if not isinstance(given, Tensor | Mapping):
        return [f"hidden_states is a {type(given).__name__}, expected tensors by layer, or one [T, {len(layers)}, "
                f"{required.hidden_size}]"]  # fmt: skip
    if isinstance(given, Tensor):
        if (fault := no_floats(given)) is not None:
            return [f"hidden_states: {fault}"]
        if given.ndim != 3 or given.shape[1] != len(layers):
            return [f"hidden_states has shape {list(given.shape)}, expected [T, {len(layers)}, "
                    f"{required.hidden_size}]: layers {_listed(layers)} in this order"]  # fmt: skip
        return {layer: given[:, n] for n, layer in enumerate(layers)}
    missing = [layer for layer in layers if layer not in given]
    if missing:
        return [f"hidden_states has the layers {_listed(given) or 'none'}, and {_listed(missing)} of those that are "
                f"required ({_listed(layers)}) are missing"]  # fmt: skip
    return {layer: given[layer] for layer in layers}


def _wrong_tokens(required: Required, ids_T: Tensor, mask_T: Tensor | None) -> list[str]:
    if ids_T.ndim != 1 or not ids_T.numel() or ids_T.is_floating_point() or ids_T.dtype == torch.bool:
        return [f"tokens are {_named(ids_T.dtype)} of shape {list(ids_T.shape)}, expected whole numbers [T], T > 0"]
    wrong = []
    low, high = (int(edge) for edge in ids_T.long().aminmax())  # not every integer has a minimum in torch
    if low < 0 or high >= required.vocab_size:
        wrong.append(f"tokens are from {low} to {high}, the target's from 0 to {required.vocab_size - 1}")
    if ids_T.numel() > required.longest:
        wrong.append(f"{ids_T.numel()} tokens are more than {required.longest} (the target's context, or a packed row)")
    if mask_T is None:
        return wrong
    if mask_T.shape != ids_T.shape:
        wrong.append(f"loss_mask has shape {list(mask_T.shape)}, expected [{ids_T.numel()}] as tokens")
    elif mask_T.dtype != torch.bool and bool(((mask_T != 0) & (mask_T != 1)).any()):
        wrong.append("loss_mask holds other values than 0 and 1")
    return wrong


def _wrong_shapes(required: Required, length: int | None, given: Mapping[object, object]) -> list[str]:
    """Of the taps, by layer, and `last`. `length` None: nobody knows it."""
    wrong = []
    for key, tensor in given.items():
        what = "last" if key == "last" else f"hidden states of layer {key}"
        if (fault := no_floats(tensor)) is not None:
            wrong.append(f"{what}: {fault}")
            continue
        assert isinstance(tensor, Tensor)
        rows = tensor.shape[0] if length is None and tensor.ndim else length
        if tuple(tensor.shape) != (rows, required.hidden_size):
            wrong.append(f"{what}: shape {list(tensor.shape)}, expected [{rows}, {required.hidden_size}] (T, H)")
    return wrong


def _finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(layers: Sequence[int] | Mapping[int, Tensor]) -> str:
    return ", ".join(map(str, layers))
