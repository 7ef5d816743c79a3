"""NumPy or torch: whose array it is, its view on the host, and the way back. A tensor brings torch; nothing here
imports it."""

import sys
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

Array = TypeVar("Array", "NDArray[Any]", "torch.Tensor")


def torch_of(*values: object) -> Any:
    """The torch module when one of the values is a tensor, otherwise None."""
    torch = sys.modules.get("torch")
    if torch is not None:
        for value in values:
            if isinstance(value, torch.Tensor):
                return torch
    return None


def to_host(values: Any) -> "NDArray[Any]":
    """A NumPy array of the same values, detached.

    A CPU tensor is viewed, not copied; any other device costs one transfer. bfloat16 and the 8-bit floats, which
    NumPy lacks, become float32.
    """
    if torch_of(values) is None:
        return np.asarray(values)
    try:
        host: NDArray[Any] = values.numpy(force=True)
    except TypeError:
        host = values.float().numpy(force=True)
    return host


def like(indices: "NDArray[np.int64]", owner: Any) -> Any:
    """The indices as the owner's kind of array, on its device."""
    torch = torch_of(owner)
    if torch is None:
        return indices
    tensor = torch.from_numpy(indices)
    return tensor if owner.is_cpu else tensor.to(owner.device)


def pairs_like(pairs: list[tuple["NDArray[np.int64]", "NDArray[np.int64]"]], owner: Any) -> list[tuple[Any, Any]]:
    """Pairs of index arrays as `like` does them, with one transfer for all to another device."""
    torch = torch_of(owner)
    if torch is None or not pairs:
        return pairs
    if owner.is_cpu:
        wrap = torch.from_numpy
        return [(wrap(rows), wrap(columns)) for rows, columns in pairs]
    arrays = [indices for pair in pairs for indices in pair]
    parts = iter(like(np.concatenate(arrays), owner).split([len(indices) for indices in arrays]))
    return list(zip(parts, parts))


def floating(**values: Any) -> tuple[Any, list[Any]]:
    """The module to compute with (numpy or torch) and the values as floating arrays fit to compute in.

    Integers and booleans become the default float, half precisions float32 (an area of 256 x 256 pixels already
    overflows float16); everything else keeps its dtype.

    Raises:
        TypeError: for arrays and tensors mixed, or values that are not real numbers.
    """
    torch = torch_of(*values.values())
    if torch is None:
        arrays = [np.asarray(value) for value in values.values()]
        for name, array in zip(values, arrays):
            if array.dtype.kind not in "biuf":
                raise TypeError(f"{name} has dtype {array.dtype}; expected real numbers")
        return np, [
            array.astype(np.float64 if array.dtype.kind in "biu" else np.float32)
            if array.dtype.kind in "biu" or array.dtype == np.float16
            else array
            for array in arrays
        ]
    tensors = []
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} is a {type(value).__name__} among tensors; convert it with torch.as_tensor first")
        if value.is_complex():
            raise TypeError(f"{name} has dtype {value.dtype}; expected real numbers")
        if not value.is_floating_point():
            value = value.to(torch.get_default_dtype())
        tensors.append(value.float() if value.dtype.itemsize < 4 else value)
    return torch, tensors


def detached(values: Any) -> Any:
    """The values without their history; arrays have none."""
    return values if torch_of(values) is None else values.detach()


def in_dtype_of(owner: Any, values: Any) -> Any:
    """The values in the owner's own dtype where that is a floating one: the way back from `floating`."""
    if torch_of(values) is not None:
        return values.to(owner.dtype) if owner.is_floating_point() else values
    dtype = getattr(owner, "dtype", None)
    return values.astype(dtype, copy=False) if dtype is not None and dtype.kind == "f" else values


def reject(xp: Any, wrong: Any, values: Any, name: str) -> None:
    """Raise ValueError naming the first of the wrong entries, if there are any."""
    if bool(wrong.any()):
        where = tuple(xp.argwhere(wrong)[0].tolist())
        raise ValueError(f"{name} is {values[where].item():g} at {where}")
