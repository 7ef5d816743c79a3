"""Immiscible Diffusion: deal a batch's noise so that every image is diffused towards noise near to it.

Paper: arXiv 2406.12303 (linear assignment); arXiv 2505.18521 (nearest of k).
Read beside: yhli123/Immiscible-Diffusion at 2980078
    (Linear_Assignment-stable_diffusion/conditional_scratch_train_sd.py,
    KNN-stable_diffusion/conditional_scratch_train_sd.py, KNN-flow_matching/knnpackage/torchcfm/optimal_transport.py).
Deviations: distances come from one matrix product and are rounded to the digits of float16, where the official code
    subtracts all pairs in float16 after scaling both sides by 0.1; processes may hold batches of unequal size; the
    nearest of k is found candidate by candidate, in float32; `buffer` is ours (the authors: "not implemented").
"""

import math
import time
import warnings
from dataclasses import dataclass
from typing import Any, Literal, overload

from counterproof.assign import linear_assignment, quantized_assignment
from counterproof.errors import extra

with extra("generation"):
    import torch
    from torch import Tensor, distributed

__all__ = ["AssignmentStats", "ImmiscibleNoise", "immiscible_noise"]

Method = Literal["linear", "knn"]

# The solver takes O(B^3) time: seconds at 4096, minutes beyond.
_LARGEST_BATCH = 8192


@overload
def immiscible_noise(
    images: Tensor,
    noise: Tensor | None = ...,
    *,
    method: Method = ...,
    k: int = ...,
    norm: int = ...,
    dtype: torch.dtype | str = ...,
    generator: torch.Generator | None = ...,
    return_indices: Literal[False] = ...,
) -> Tensor: ...
@overload
def immiscible_noise(
    images: Tensor,
    noise: Tensor | None = ...,
    *,
    method: Method = ...,
    k: int = ...,
    norm: int = ...,
    dtype: torch.dtype | str = ...,
    generator: torch.Generator | None = ...,
    return_indices: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@torch.no_grad()
def immiscible_noise(
    images: Tensor,
    noise: Tensor | None = None,
    *,
    method: Method = "linear",
    k: int = 4,
    norm: int = 2,
    dtype: torch.dtype | str = "float16",
    generator: torch.Generator | None = None,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Noise for a batch of images, each image's noise near to it. Put in place of ``torch.randn_like(images)``.

    ``"linear"`` (arXiv 2406.12303) deals the batch's noise anew, one for each image, so that the sum of the distances
    is least. It is the same noise in another order, so it stays exactly normal. ``"knn"`` (arXiv 2505.18521) gives
    every image the nearest of its own `k` draws: no solver, works on a single image, but what it returns is no longer
    standard normal (on 64 pixels and k = 4 the standard deviation is about 0.94).

    Images are never moved, so labels and captions stay with them. Noise offset and input perturbation come after
    this call. The training loss falls by construction and must not be compared with that of random noise. Sample with
    a deterministic solver (flow ODE, DDIM with eta 0): an ancestral one assumes noise independent of the image.

    Args:
        images: (B, ...) images or latents, floating, in the range that the model sees.
        noise: (B, ...) standard normal noise to deal, of the images' shape and on their device. None draws it, in the
            images' dtype. For ``"knn"`` it is the first of the `k` candidates.
        method: ``"linear"`` or ``"knn"``.
        k: candidates per image for ``"knn"``; 1 leaves the noise as drawn. The official code takes 4 (flow matching)
            and 64 (Stable Diffusion).
        norm: 2 for Euclidean distance, not squared; 1 for the sum of absolute differences.
        dtype: precision to which ``"linear"`` rounds distances: ``"float16"``, ``"bfloat16"`` or ``"float32"``. Fewer
            digits make the solver faster. ``"knn"`` does not round.
        generator: for what is drawn here; None is torch's default generator, as for ``torch.randn``. A generator of
            another device draws there, and the noise is moved.
        return_indices: also return which noise was taken.

    Returns:
        (B, ...) noise, dtype as `noise`, without gradient. With `return_indices` a pair of it and of (B,) int64
        indices: ``noise[indices]`` for ``"linear"``, the number of the candidate (0 the given one) for ``"knn"``.

    Raises:
        TypeError: when `images` or `noise` is no tensor of floating numbers.
        ValueError: for shapes or devices that differ, NaN or infinity, an unknown `method`, `norm` or `dtype`, `k`
            below 1, or more than 8192 images for ``"linear"``.

    Warns:
        UserWarning: a batch of one image for ``"linear"``: there is nothing to assign.

    Example:
        >>> images = torch.tensor([[0.0], [5.0]])
        >>> immiscible_noise(images, torch.tensor([[4.0], [1.0]])).tolist()
        [[1.0], [4.0]]
    """
    _check_options(method, k, norm, dtype)
    _check_images(images, noise)
    if noise is None:
        noise = _draw(images, len(images), generator)
    _check_finite(images, noise)
    if method == "knn":
        dealt, indices = _nearest(images, noise, k, norm, generator)
    else:
        if len(images) == 1:
            warnings.warn(
                "a batch of one image leaves nothing to assign; use method='knn', or "
                "ImmiscibleNoise(buffer=gradient_accumulation_steps)",
                stacklevel=3,  # past the wrapper of no_grad
            )
        _check_size(len(noise))
        indices = _solve(images, noise, norm, dtype)
        dealt = noise[indices]
    return (dealt, indices) if return_indices else dealt


@dataclass(frozen=True)
class AssignmentStats:
    """What one call of `ImmiscibleNoise` did for the images of this process.

    Attributes:
        distance_before: mean distance of an image to its noise in the order drawn, in the sampler's norm.
        distance_after: the same to the noise returned.
        milliseconds: wall time of the call, other processes waited for.
    """

    distance_before: float
    distance_after: float
    milliseconds: float


class ImmiscibleNoise:
    """`immiscible_noise` for a training loop: over the batches of all processes, or over accumulated micro-batches.

    The more images are dealt noise together, the nearer it gets. `gather` makes one assignment over all processes,
    whose batches may differ in size. `buffer` serves micro-batches that come one after another: noise for that many
    of them is drawn at once, each takes the best of what is left, and nothing is drawn again before all of it has
    been used. So the noise of a whole cycle is exactly normal, though that of a single micro-batch is not: let a
    cycle be an optimizer step (`buffer` = gradient accumulation steps).

    Args:
        method, k, norm, dtype, generator: as for `immiscible_noise`. Processes must draw different noise: give each
            its own seed.
        gather: an ``accelerate.Accelerator``, or a process group of ``torch.distributed``; None keeps to this process.
            All processes of the group must call the sampler equally often.
        buffer: micro-batches that share a pool of noise.

    Attributes:
        stats: `AssignmentStats` of the last call; None before the first.

    Raises:
        ValueError: for options as in `immiscible_noise`, `buffer` below 1, and `gather` or `buffer` with
            ``method="knn"``, which looks at one image at a time.
        TypeError: for another kind of `gather`.

    Example:
        >>> sampler = ImmiscibleNoise(generator=torch.Generator().manual_seed(0))
        >>> noise = sampler(torch.zeros(8, 1, 4, 4) + torch.linspace(-1, 1, 8)[:, None, None, None])
        >>> sampler.stats.distance_after < sampler.stats.distance_before
        True
    """

    def __init__(
        self,
        *,
        method: Method = "linear",
        k: int = 4,
        norm: int = 2,
        dtype: torch.dtype | str = "float16",
        generator: torch.Generator | None = None,
        gather: Any = None,
        buffer: int = 1,
    ) -> None:
        _check_options(method, k, norm, dtype)
        if isinstance(buffer, bool) or not isinstance(buffer, int) or buffer < 1:
            raise ValueError(f"buffer is {buffer!r}; expected a whole number of micro-batches, at least 1")
        if method == "knn" and (gather is not None or buffer > 1):
            raise ValueError("method='knn' looks at one image at a time; leave out gather and buffer")
        if gather is not None and not (hasattr(gather, "num_processes") or hasattr(gather, "rank")):
            raise TypeError(
                f"gather is a {type(gather).__name__}; expected an accelerate.Accelerator or a process group, "
                "e.g. torch.distributed.group.WORLD"
            )
        self.method: Method = method
        self.k = k
        self.norm = norm
        self.dtype = dtype
        self.generator = generator
        self.gather = gather
        self.buffer = buffer
        self.stats: AssignmentStats | None = None
        self._pool: Tensor | None = None  # noise of this cycle, as drawn
        self._free = torch.empty(0, dtype=torch.bool)  # which of it is still unused
        self._served = 0  # images of this cycle so far

    @torch.no_grad()
    def __call__(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Noise for the next batch.

        Args:
            images: (B, ...) images or latents of this process; B may be 0 while another process has some.
            noise: (B, ...) noise to deal; None draws it. Must be None with a buffer, which draws its own.

        Returns:
            (B, ...) noise, without gradient.

        Raises:
            TypeError, ValueError: as `immiscible_noise`; `noise` together with a buffer; images of another shape
                than those that the buffer's noise was drawn for.
            RuntimeError: `gather` before ``torch.distributed`` is initialised.
        """
        started = time.perf_counter()
        _check_images(images, noise)
        group = self._group()
        if self.buffer > 1:
            if noise is not None:
                raise ValueError(f"buffer={self.buffer} draws its own noise; call the sampler with the images only")
            before, dealt = self._from_pool(images, group)
        else:
            before = _draw(images, len(images), self.generator) if noise is None else noise
            if group is not None:
                dealt, _ = _deal(images, before, self.norm, self.dtype, group)
            else:
                dealt = immiscible_noise(
                    images,
                    before,
                    method=self.method,
                    k=self.k,
                    norm=self.norm,
                    dtype=self.dtype,
                    generator=self.generator,
                )
        distances = [_distance(images, values, self.norm).mean() for values in (before, dealt)]
        distance_before, distance_after = torch.stack(distances).tolist()
        self.stats = AssignmentStats(distance_before, distance_after, 1000 * (time.perf_counter() - started))
        return dealt

    def _group(self) -> Any:
        """The process group to gather over; None when there is nobody else."""
        if self.gather is None or getattr(self.gather, "num_processes", 2) == 1:
            return None
        if not (distributed.is_available() and distributed.is_initialized()):
            raise RuntimeError("gather needs torch.distributed to be initialised; start the script with torchrun")
        group = distributed.group.WORLD if hasattr(self.gather, "num_processes") else self.gather
        return group if distributed.get_world_size(group) > 1 else None

    def _from_pool(self, images: Tensor, group: Any) -> tuple[Tensor, Tensor]:
        """The noise in the order drawn and the noise dealt, for these images."""
        if self._pool is not None and self._pool.shape[1:] != images.shape[1:]:
            raise ValueError(
                f"images are {tuple(images.shape[1:])}, the noise in the buffer is {tuple(self._pool.shape[1:])}; "
                "use one ImmiscibleNoise for each shape"
            )
        left = _everywhere(int(self._free.sum()), images.device, group)
        wanted = _everywhere(len(images), images.device, group)
        if sum(left) == 0:
            self._pool = _draw(images, self.buffer * len(images), self.generator)
            self._free = torch.ones(len(self._pool), dtype=torch.bool, device=images.device)
            self._served = 0
        elif sum(left) < sum(wanted) and (group is None or group.rank() == 0):
            # Batches have grown. Every draw is used once, so the noise stays normal.
            more = _draw(images, sum(wanted) - sum(left), self.generator)
            self._pool = more if self._pool is None else torch.cat([self._pool, more])
            self._free = torch.cat([self._free, self._free.new_ones(len(more))])
        assert self._pool is not None
        free = self._free.nonzero().flatten()
        dealt, used = _deal(images, self._pool[free], self.norm, self.dtype, group)
        self._free[free[used]] = False
        order = torch.arange(self._served, self._served + len(images), device=images.device)
        self._served += len(images)
        return self._pool[order % max(1, len(self._pool))], dealt


def _deal(images: Tensor, noise: Tensor, norm: int, dtype: Any, group: Any) -> tuple[Tensor, Tensor]:
    """One assignment over all processes, of at least as much noise as there are images.

    Returns the noise for this process's images, and the indices of this process's noise that has gone to anybody.
    """
    if group is None:
        _check_finite(images, noise)
        _check_size(len(noise))
        indices = _solve(images, noise, norm, dtype)
        return noise[indices], indices
    all_images, images_of = _gathered(images, group)
    all_noise, noise_of = _gathered(noise, group)
    # Checked where every process sees the same, so that they raise together and none is left waiting.
    _check_finite(all_images, all_noise)
    _check_size(len(all_noise))
    rank = group.rank()
    if rank == 0:
        indices = _solve(all_images, all_noise, norm, dtype)
    else:
        indices = torch.empty(len(all_images), dtype=torch.int64, device=images.device)
    distributed.broadcast(indices, src=distributed.get_global_rank(group, 0), group=group)
    first = sum(images_of[:rank])
    offset = sum(noise_of[:rank])
    mine = (indices >= offset) & (indices < offset + len(noise))
    return all_noise[indices[first : first + len(images)]], indices[mine] - offset


def _solve(images: Tensor, noise: Tensor, norm: int, dtype: Any) -> Tensor:
    """(B,) which of M >= B noise goes to each image, at the least total distance."""
    if len(images) == len(noise):
        return quantized_assignment(images, noise, dtype=dtype, norm=norm)
    if not len(images):
        return torch.empty(0, dtype=torch.int64, device=images.device)
    # A buffer holds more noise than there are images: a rectangle, with the noise in its rows as in the square case.
    cost = torch.cdist(_rows(noise).float(), _rows(images).float(), p=float(norm))
    cost /= cost.amax().clamp_min(torch.finfo(torch.float32).tiny)  # within the range of float16
    taken, owners = linear_assignment(cost.to(getattr(torch, _name(dtype))).float())
    indices = torch.empty_like(taken)
    indices[owners] = taken
    return indices


def _nearest(
    images: Tensor, noise: Tensor, k: int, norm: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """The nearest of k candidates per image, the given noise the first; two are held at a time, not k."""
    best, nearest = noise.clone(), _distance(images, noise, norm)
    indices = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    for number in range(1, k):
        candidate = _draw(noise, len(images), generator)
        distance = _distance(images, candidate, norm)
        closer = distance < nearest
        best = torch.where(closer.view(-1, *[1] * (noise.ndim - 1)), candidate, best)
        nearest = torch.where(closer, distance, nearest)
        indices = torch.where(closer, number, indices)
    return best, indices


def _distance(images: Tensor, noise: Tensor, norm: int) -> Tensor:
    """(B,) distance of each image to its own noise, in float32 or better."""
    dtype = torch.promote_types(torch.promote_types(images.dtype, noise.dtype), torch.float32)
    distance: Tensor = torch.linalg.vector_norm(_rows(images.to(dtype) - noise.to(dtype)), norm, dim=1)
    return distance


def _rows(values: Tensor) -> Tensor:
    """(B, D); a bare -1 would not do for no images at all."""
    return values.reshape(len(values), math.prod(values.shape[1:]))


def _draw(like: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.randn((count, *like.shape[1:]), generator=generator, dtype=like.dtype, device=device).to(like.device)


def _everywhere(number: int, device: torch.device, group: Any) -> list[int]:
    """This number in every process of the group, by rank."""
    if group is None:
        return [number]
    mine = torch.tensor([number], device=device)
    numbers = [torch.empty_like(mine) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(numbers, mine, group=group)
    return [int(value) for value in numbers]


def _gathered(values: Tensor, group: Any) -> tuple[Tensor, list[int]]:
    """The rows of all processes, by rank, and how many each has. all_gather needs equal sizes: padded, then cut."""
    counts = _everywhere(len(values), values.device, group)
    padded = values.new_zeros((max(counts), *values.shape[1:]))
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(parts, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts)]), counts


def _check_options(method: str, k: int, norm: int, dtype: torch.dtype | str) -> None:
    if method not in ("linear", "knn"):
        raise ValueError(f"method is {method!r}; expected 'linear' or 'knn'")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k is {k!r}; expected a whole number of candidates, at least 1")
    if norm not in (1, 2):
        raise ValueError(f"norm is {norm!r}; expected 1 or 2")
    if _name(dtype) not in ("float16", "bfloat16", "float32"):
        raise ValueError(f"dtype is {dtype!r}; expected 'float16', 'bfloat16' or 'float32'")


def _name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


def _check_images(images: Tensor, noise: Tensor | None) -> None:
    for name, values in (("images", images), ("noise", noise)):
        if values is None and name == "noise":
            continue
        if not isinstance(values, Tensor):
            raise TypeError(f"{name} is a {type(values).__name__}; expected a tensor (B, ...)")
        if not values.is_floating_point():
            raise TypeError(f"{name} has dtype {values.dtype}; expected floating numbers, as the model sees them")
        if values.ndim == 0:
            raise ValueError(f"{name} is a single number; expected (B, ...)")
    if noise is not None and noise.shape != images.shape:
        raise ValueError(f"images are {tuple(images.shape)}, noise is {tuple(noise.shape)}; expected the same shape")
    if noise is not None and noise.device != images.device:
        raise ValueError(f"images are on {images.device}, noise is on {noise.device}; move one to the other")


def _check_finite(images: Tensor, noise: Tensor) -> None:
    for name, values in (("images", images), ("noise", noise)):
        if not bool(values.isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinity; such values have no distance")


def _check_size(count: int) -> None:
    if count > _LARGEST_BATCH:
        raise ValueError(
            f"noise for {count} images to deal, more than {_LARGEST_BATCH}: the exact solver takes time O(B^3); assign "
            "smaller batches, or use method='knn'"
        )
