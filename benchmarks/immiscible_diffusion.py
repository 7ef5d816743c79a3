"""What dealing noise by distance costs: beside the official code's way of doing it, and within a training step.

    python benchmarks/immiscible_diffusion.py [--quick] [--json FILE]

Everything runs in this process on one thread; the contestants take turns and each one's fastest turn counts, in CPU
time. The peers are our own wording of what yhli123/Immiscible-Diffusion does: all differences at once in float16,
(B, B, D) for the assignment and (B, k, D) for the nearest of k. Their answers are checked against ours first. In the
rows of a training step the peer is the same step with plain noise: a ratio of 0.97 is an overhead of 3 %.
"""

import os
from collections.abc import Callable, Iterator

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import torch  # noqa: E402
from _contest import Row, contest, run  # noqa: E402
from diffusers import UNet2DModel  # noqa: E402
from scipy.optimize import linear_sum_assignment  # noqa: E402
from torch import Tensor  # noqa: E402

from counterproof.generation import immiscible_noise  # noqa: E402

torch.set_num_threads(1)
GENERATOR = torch.Generator().manual_seed(0)


def all_pairs(images: Tensor, noise: Tensor) -> Tensor:
    """The official linear assignment: every difference in float16, both sides scaled by 0.1, then SciPy."""
    rows = (0.1 * images.half()).flatten(1)[:, None]
    columns = (0.1 * noise.half()).flatten(1)[None]
    distance = torch.linalg.vector_norm(rows - columns, dim=2)
    return noise[torch.from_numpy(linear_sum_assignment(distance.numpy())[1])]


def all_candidates(images: Tensor, k: int) -> Tensor:
    """The official nearest of k: all candidates drawn and compared at once, distances in float16."""
    noise = torch.randn((len(images), k, *images.shape[1:]), generator=GENERATOR)
    apart = images.flatten(1).half()[:, None] - noise.flatten(2).half()
    return noise[torch.arange(len(images)), torch.linalg.vector_norm(apart, dim=2).argmin(1)]


def pictures(count: int, *shape: int) -> Tensor:
    """Smooth values in [-1, 1]: random pictures of a quarter of the side, enlarged."""
    small = torch.rand((count, shape[0], *(side // 4 for side in shape[1:])), generator=GENERATOR) * 2 - 1
    return torch.nn.functional.interpolate(small, size=shape[1:], mode="bilinear")


def mean_distance(images: Tensor, noise: Tensor) -> float:
    return float((images - noise).flatten(1).norm(dim=1).mean())


def alike(images: Tensor, tolerance: float) -> Callable[[Tensor, Tensor], bool]:
    """Whether two deals of noise lie equally near to the images, within a relative tolerance."""

    def same(one: Tensor, other: Tensor) -> bool:
        near, nearer = mean_distance(images, one), mean_distance(images, other)
        return abs(near - nearer) <= tolerance * nearer

    return same


def dealing(quick: bool, seconds: float) -> Iterator[Row]:
    sizes = [(128, (1, 8, 8)), (128, (3, 32, 32))]
    for batch, shape in sizes if quick else [*sizes, (256, (3, 32, 32)), (512, (3, 32, 32)), (1024, (1, 16, 16))]:
        images = pictures(batch, *shape)
        noise = torch.randn(images.shape, generator=GENERATOR)
        yield contest(
            "linear assignment of a batch",
            f"{batch} x {'x'.join(map(str, shape))}",
            lambda images=images, noise=noise: immiscible_noise(images, noise),
            lambda images=images, noise=noise: all_pairs(images, noise),
            "official: (B, B, D) in float16 + scipy",
            same=alike(images, 1e-3),
            seconds=seconds,
        )


def nearest(quick: bool, seconds: float) -> Iterator[Row]:
    images = pictures(128 if quick else 1024, 3, 32, 32)
    for k in (4, 64) if not quick else (4,):

        def ours(k: int = k) -> Tensor:
            return immiscible_noise(images, method="knn", k=k, generator=GENERATOR)

        yield contest(
            f"nearest of {k}",
            f"{len(images)} x 3x32x32",
            ours,
            lambda k=k: all_candidates(images, k),
            "official: (B, k, D) in float16",
            same=alike(images, 1e-2),
            seconds=seconds,
        )


def training(seconds: float) -> Iterator[Row]:
    """A step of the room's task: UNet2DModel of 160 000 parameters, 128 digits."""
    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=8,
        add_attention=False,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images = pictures(128, 1, 8, 8)

    def step(deal: Callable[[Tensor, Tensor], Tensor]) -> None:
        noise = deal(images, torch.randn(images.shape, generator=GENERATOR))
        sigma = torch.rand((len(images), 1, 1, 1), generator=GENERATOR)
        mixed = (1 - sigma) * images + sigma * noise
        loss = (model(mixed, 1000 * sigma.flatten()).sample - (noise - images)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    deals: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "linear": immiscible_noise,
        "nearest of 4": lambda images, noise: immiscible_noise(images, noise, method="knn", generator=GENERATOR),
    }
    for name, deal in deals.items():
        yield contest(
            f"training step, {name}",
            "128 x 1x8x8, 160k parameters",
            lambda deal=deal: step(deal),
            lambda: step(lambda images, noise: noise),
            "the same step with plain noise",
            seconds=5 * seconds,
        )


def contests(quick: bool, seconds: float) -> Iterator[Row]:
    yield from dealing(quick, seconds)
    yield from nearest(quick, seconds)
    yield from training(seconds)


if __name__ == "__main__":
    run(__doc__ or "", contests)
