"""What the papers of this room are compared on."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from counterproof.bench.task import Arm, Budget, Diverged, Metric, Task, Trial
from counterproof.errors import UserError, extra

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel
    from PIL.Image import Image
    from torch import Generator, Tensor, nn

    Features = Callable[[Tensor], NDArray[np.float64]]
    Mixer = Callable[[Tensor, Tensor, Generator], tuple[Tensor, Tensor, Tensor]]

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # what a user's folder may hold, by Pillow's names
FEWEST = 64  # pictures in it
HELD_OUT = 500  # pictures that are never trained on; of a folder of fewer than 1500 a third
LEVELS = 1000  # diffusion times

DIGITS_DIFFUSION = Task(
    name="digits-diffusion",
    says=(
        "a small diffusers UNet2DModel trained from scratch, by flow matching or noise prediction, on scikit-learn's "
        "digits (1797 pictures of 8x8) or a folder of pictures: how near its samples come to held-out pictures"
    ),
    run="counterproof.generation.task:run_digits_diffusion",
    metrics={
        "energy_5": Metric("lower", says="energy distance to the held-out pictures, in pixels; 5 sampling steps"),
        "energy_2": Metric("lower", says="the same with 2 sampling steps"),
        "energy_20": Metric("lower", says="the same with 20 sampling steps"),
        "frechet_5": Metric("lower", says="Frechet distance of features to the held-out pictures; 5 sampling steps"),
        "frechet_20": Metric("lower", says="the same with 20 sampling steps"),
        "curvature": Metric("lower", says="mean squared deviation of a sample's path from a straight line; 20 steps"),
        "steps_to_target": Metric(
            "lower",
            "steps",
            "training steps until energy_5 is a share (0.75) of that of a Gaussian with the data's mean and covariance",
        ),
        "train_seconds": Metric("lower", "s", "CPU time of the training steps, the method's own included"),
    },
    budgets={
        "quick": Budget(
            settings={
                "objective": "flow",
                "size": 8,
                "channels": (16, 32),
                "attention": False,
                "steps": 300,
                "batch": 128,
                "learning_rate": 4e-3,
                "warmup": 20,
                "ema": 0.99,
                "samples": 500,
                "evaluations": 10,
                "target": 0.75,
            },
            seeds=(4, 12),
        ),
        "standard": Budget(
            settings={
                "objective": "flow",
                "size": 16,
                "channels": (16, 32, 64),
                "attention": False,
                "steps": 1500,
                "batch": 128,
                "learning_rate": 2e-3,
                "warmup": 50,
                "ema": 0.995,
                "samples": 500,
                "evaluations": 15,
                "target": 0.75,
            },
            seeds=(6, 20),
            minutes=30.0,
            trial_minutes=30.0,
        ),
        "full": Budget(
            settings={
                "objective": "flow",
                "size": 32,
                "channels": (128, 256, 256),
                "attention": True,
                "steps": 50_000,
                "batch": 256,
                "learning_rate": 2e-4,
                "warmup": 1000,
                "ema": 0.9995,
                "samples": 5000,
                "evaluations": 25,
                "target": 0.75,
            },
            seeds=(5, 15),
            minutes=None,
            trial_minutes=600.0,
            trial_memory=32.0,
        ),
    },
    plug=(
        "deal(images, noise, *, generator, **settings) -> noise: called on every batch (B, channels, side, side), "
        "images in [-1, 1], before they are mixed with the noise. None: the noise stays as drawn."
    ),
    data="counterproof.generation.task:describe_pictures",
)


def run_digits_diffusion(arm: Arm, trial: Trial) -> Mapping[str, float]:
    """Train with the arm's deal of the noise; compare samples of the averaged weights with held-out pictures.

    Start, batches, noise, diffusion times and the noise that sampling starts from are the same for every arm.
    """
    with extra("generation"):
        import torch
        from diffusers.training_utils import EMAModel

    settings = trial.settings
    steps, looks = settings["steps"], settings["evaluations"]
    deal = arm.load()
    with trial.off_clock():
        data = load_pictures(trial)
        yardstick = Yardstick(trial, data)
    images = data.train.to(trial.device)
    model = small_unet(trial, images.shape[1], images.shape[2])
    mix = mixer(settings["objective"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["learning_rate"])
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / settings["warmup"]))
    average = EMAModel(model.parameters(), decay=settings["ema"], foreach=True)
    order, draws, times, own = (trial.torch_generator(name) for name in ("batches", "noise", "times", "method"))
    curve: list[tuple[int, float]] = []
    began = trial.cost()
    for step in range(1, steps + 1):
        batch = images[torch.randperm(len(images), generator=order)[: settings["batch"]]]
        noise = torch.randn(batch.shape, generator=draws).to(trial.device)
        if deal is not None:
            noise = deal(batch, noise, generator=own, **arm.settings)
        mixed, time, target = mix(batch, noise, times)
        loss = (model(mixed, time).sample - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        average.step(model.parameters())
        if step * looks // steps > (step - 1) * looks // steps:
            with trial.off_clock(), averaged(model, average):
                found = yardstick.measure(model, 5)
            curve.append((step, found.energy))
            trial.log(0.95 * step / steps, step=step, energy_5=found.energy, frechet_5=found.frechet)
        elif step % 10 == 0:
            trial.log(0.95 * step / steps)
    seconds = trial.cost() - began
    with trial.off_clock(), averaged(model, average):
        two, five, twenty = (yardstick.measure(model, evaluations) for evaluations in (2, 5, 20))
        target_energy = settings["target"] * yardstick.gaussian()
    return {
        "energy_5": five.energy,
        "energy_2": two.energy,
        "energy_20": twenty.energy,
        "frechet_5": five.frechet,
        "frechet_20": twenty.frechet,
        "curvature": twenty.curvature,
        "steps_to_target": steps_to_target(curve, target_energy, steps),
        "train_seconds": seconds,
    }


def small_unet(trial: Trial, channels: int, side: int) -> "nn.Module":
    """A diffusers UNet2DModel for the trial's settings, in diffusers' random start, on the trial's device."""
    import torch
    from diffusers import UNet2DModel

    unet: Any = UNet2DModel  # untyped, as all of diffusers
    widths = tuple(trial.settings["channels"])
    attention = trial.settings["attention"]
    plain, rest = 1 if attention else len(widths), len(widths) - 1 if attention else 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(trial.rng("start").integers(2**63)))
        model: nn.Module = unet(
            sample_size=side,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=widths,
            layers_per_block=1,
            down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",) * rest,
            up_block_types=("AttnUpBlock2D",) * rest + ("UpBlock2D",) * plain,
            norm_num_groups=8,
            add_attention=attention,
        )
    return model.to(trial.device)


def mixer(objective: str) -> "Mixer":
    """``mix(images, noise, generator) -> (mixed, diffusion times, target)`` of a training objective.

    ``"flow"``: flow matching, the straight mix of image and noise; the target is the velocity, noise minus image, as
    diffusers' FlowMatchEulerDiscreteScheduler has it. ``"epsilon"``: noise prediction on DDPM's linear schedule.
    """
    import torch
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    flows: Any = FlowMatchEulerDiscreteScheduler
    levels: Any = DDPMScheduler
    scheduler = (flows if objective == "flow" else levels)(num_train_timesteps=LEVELS)

    def flow(images: "Tensor", noise: "Tensor", generator: "Generator") -> tuple["Tensor", "Tensor", "Tensor"]:
        level = torch.randint(LEVELS, (len(images),), generator=generator)
        sigma = scheduler.sigmas[level].to(images.device)[:, None, None, None]
        return (1 - sigma) * images + sigma * noise, scheduler.timesteps[level].to(images.device), noise - images

    def epsilon(images: "Tensor", noise: "Tensor", generator: "Generator") -> tuple["Tensor", "Tensor", "Tensor"]:
        time = torch.randint(LEVELS, (len(images),), generator=generator).to(images.device)
        return scheduler.add_noise(images, noise, time), time, noise

    return {"flow": flow, "epsilon": epsilon}[objective]


def sample(model: "nn.Module", start: "Tensor", objective: str, steps: int) -> tuple["Tensor", float]:
    """Samples in [-1, 1] by a deterministic sampler, from the noise `start`, and how curved their paths were.

    ``"flow"``: Euler steps of equal length; ``"epsilon"``: DDIM with eta 0, images clipped on the way, first step at
    the last time. Curvature is the mean of ``|n * step - (end - start)|**2`` over the n steps, divided by the mean of
    ``|end - start|**2``: 0 on a straight line at constant speed.
    """
    import torch
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    euler: Any = FlowMatchEulerDiscreteScheduler
    ddim: Any = DDIMScheduler
    if objective == "flow":
        scheduler = euler(num_train_timesteps=LEVELS)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist(), device=start.device)
    else:
        scheduler = ddim(num_train_timesteps=LEVELS, timestep_spacing="trailing")
        scheduler.set_timesteps(steps, device=start.device)
    with torch.no_grad():
        now, travelled = start, 0.0
        for time in scheduler.timesteps:
            predicted = torch.cat([model(part, time).sample for part in torch.split(now, 500)])
            before, now = now, scheduler.step(predicted, time, now).prev_sample
            travelled += float((now - before).square().sum())
        return now.clamp(-1, 1), steps * travelled / float((now - start).square().sum()) - 1


@contextmanager
def averaged(model: "nn.Module", average: "EMAModel") -> Iterator[None]:
    """Inside, the model has the averaged weights."""
    average.store(model.parameters())
    average.copy_to(model.parameters())
    model.eval()
    try:
        yield
    finally:
        average.restore(model.parameters())
        model.train()


class Quality(NamedTuple):
    """Samples beside held-out pictures: energy distance of pixels, Frechet distance of features, curvature of paths."""

    energy: float
    frechet: float
    curvature: float


class Yardstick:
    """The held-out pictures, and the noise that every evaluation of this trial starts from."""

    def __init__(self, trial: Trial, data: "Pictures") -> None:
        import torch

        self.trial = trial
        self.data = data
        shape = (trial.settings["samples"], *data.train.shape[1:])
        self.start = torch.randn(shape, generator=trial.torch_generator("samples")).to(trial.device)
        self.features = digit_features(trial, data) if data.labels is not None else principal_features(data)
        self.held_out_features = self.features(data.held_out)

    def measure(self, model: "nn.Module", steps: int) -> Quality:
        """Samples of the model in so many steps.

        Raises:
            Diverged: the samples are not finite.
        """
        samples, curvature = sample(model, self.start, self.trial.settings["objective"], steps)
        samples = samples.cpu()
        if not bool(samples.isfinite().all()):
            raise Diverged("samples are not finite")
        return Quality(
            energy_distance(samples, self.data.held_out),
            frechet_distance(self.features(samples), self.held_out_features),
            curvature,
        )

    def gaussian(self) -> float:
        """Energy distance of a Gaussian with mean and covariance of the training pictures, cut to [-1, 1].

        It depends on the data alone; the mean of eight sets as large as the set of samples.
        """
        import torch

        generator = self.trial.torch_generator("gaussian")
        pixels = self.data.train.flatten(1)
        deviations = (pixels - pixels.mean(0)) / (len(pixels) - 1) ** 0.5
        distances = []
        for _ in range(8):
            weights = torch.randn(len(self.start), len(pixels), generator=generator)
            drawn = (pixels.mean(0) + weights @ deviations).clamp(-1, 1)
            distances.append(energy_distance(drawn, self.data.held_out))
        return float(np.mean(distances))


def energy_distance(a: "Tensor", b: "Tensor") -> float:
    """``2 E|a - b| - E|a - a'| - E|b - b'|`` over all pairs, a picture with itself included.

    Never negative; two sets of n and m drawn alike give about ``E|a - a'| (1/n + 1/m)``.
    """
    import torch

    a, b = a.flatten(1).double(), b.flatten(1).double()
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


def frechet_distance(a: "NDArray[np.float64]", b: "NDArray[np.float64]") -> float:
    """Squared 2-Wasserstein distance of the Gaussians with the means and covariances of two sets of rows."""
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * cross)


def steps_to_target(curve: list[tuple[int, float]], target: float, budget: int) -> float:
    """The training step at which a curve of (step, value) first comes down to the target, interpolated linearly.

    A curve that stays above it counts as the whole budget.
    """
    before: tuple[int, float] | None = None
    for step, value in curve:
        if value <= target:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - target) / (before[1] - value)
        before = (step, value)
    return float(budget)


def digit_features(trial: Trial, data: "Pictures") -> "Features":
    """The 64 hidden units of a small convolutional classifier trained on the training digits."""
    import torch
    from torch import nn

    generator = trial.torch_generator("batches of the features")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(trial.rng("features").integers(2**63)))
        net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(128, 64),
            nn.ReLU(),
        )
        head = nn.Linear(64, 10)
    assert data.labels is not None
    optimizer = torch.optim.AdamW([*net.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(12):
        for batch in torch.split(torch.randperm(len(data.train), generator=generator), 64):
            loss: Any = nn.functional.cross_entropy(head(net(data.train[batch])), data.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def features(images: "Tensor") -> "NDArray[np.float64]":
        with torch.no_grad():
            values: NDArray[np.float64] = net(images).double().numpy()
        return values

    return features


def principal_features(data: "Pictures") -> "Features":
    """The first 64 principal components of the training pictures' pixels: the fixed choice for a user's own."""
    pixels = data.train.flatten(1).double().numpy()
    mean = pixels.mean(0)
    axes = np.linalg.svd(pixels - mean, full_matrices=False)[2][:64]
    return lambda images: (images.flatten(1).double().numpy() - mean) @ axes.T


class Pictures(NamedTuple):
    """Pictures (n, channels, side, side) in [-1, 1], on the CPU; labels of the training ones where there are any."""

    train: "Tensor"
    held_out: "Tensor"
    labels: "Tensor | None"


def load_pictures(trial: Trial) -> Pictures:
    """The digits, as they are, or the user's folder at the side that the settings name; split by the trial's seed."""
    import torch

    if trial.data is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels, labels = digits.images[:, None] / 8 - 1, digits.target
    else:
        pixels, labels = read_pictures(trial.data, trial.settings["size"]) / 127.5 - 1, None
    order = trial.rng("split").permutation(len(pixels))
    images = torch.tensor(pixels[order], dtype=torch.float32)
    cut = len(images) - held_out_of(len(images))
    return Pictures(images[:cut], images[cut:], None if labels is None else torch.tensor(labels[order[:cut]]))


def held_out_of(pictures: int) -> int:
    """How many of so many pictures are never trained on."""
    return min(HELD_OUT, pictures // 3)


def describe_pictures(path: Path) -> str:
    """Open every file of a folder of pictures, and say in a line what it holds.

    Folders inside it are read too; names that start with a dot are left out, and counted in the line.

    Raises:
        UserError: no such folder; a file that is no picture, is damaged, holds several pictures or more than 8 bits a
            channel; fewer than 64 pictures.
    """
    sizes: list[tuple[int, int]] = []
    gray = clear = 0
    for picture, transparent in _pictures(path):
        sizes.append(picture.size)
        gray += picture.mode == "L"
        clear += transparent
    smallest, largest = min(sizes), max(sizes)
    facts = [
        f"{len(sizes)} pictures",
        "x".join(map(str, smallest)) + ("" if smallest == largest else " to " + "x".join(map(str, largest))),
        "grayscale" if gray == len(sizes) else f"colour ({gray} grayscale)" if gray else "colour",
    ]
    if clear:
        facts.append(f"{clear} with transparency, laid on white")
    hidden = sum(1 for file in path.rglob("*") if file.is_file() and _hidden(file, path))
    if hidden:
        facts.append(f"{hidden} hidden {'file' if hidden == 1 else 'files'} left out")
    return f"{', '.join(facts)}; {len(sizes) - held_out_of(len(sizes))} to train on, {held_out_of(len(sizes))} held out"


def read_pictures(path: Path, side: int) -> "NDArray[np.uint8]":
    """The pictures of a folder, (n, channels, side, side): the largest square in the middle, resampled (Lanczos).

    One channel when all are grayscale, otherwise three. Transparent parts are laid on white.

    Raises:
        UserError: as `describe_pictures`.
    """
    with extra("generation"):
        from PIL.Image import Resampling

    pictures = []
    for picture, _ in _pictures(path):
        cut = min(picture.size)
        left, top = (picture.width - cut) // 2, (picture.height - cut) // 2
        square = picture.crop((left, top, left + cut, top + cut))
        pictures.append(square.resize((side, side), Resampling.LANCZOS))
    mode = "L" if all(picture.mode == "L" for picture in pictures) else "RGB"
    stacked = np.stack([np.asarray(picture.convert(mode)) for picture in pictures])
    return stacked[:, None] if mode == "L" else stacked.transpose(0, 3, 1, 2)


def _pictures(path: Path) -> Iterator[tuple["Image", bool]]:
    """Every picture of a folder, in order of name, upright, as grayscale or RGB; and whether it was transparent."""
    if not path.is_dir():
        raise UserError(f"{path} is {'a file' if path.exists() else 'not there'}; name a folder of pictures")
    count = 0
    for file in sorted(path.rglob("*")):
        if file.is_file() and not _hidden(file, path):
            yield _opened(file)
            count += 1
    if count < FEWEST:
        raise UserError(f"{path} holds {count} pictures; put at least {FEWEST} there, a third of them is held out")


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _opened(file: Path) -> tuple["Image", bool]:
    with extra("generation"):
        from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(file, formats=FORMATS) as image:
            frames = getattr(image, "n_frames", 1) if image.format in ("GIF", "PNG", "TIFF", "WEBP") else 1
            image.load()
            picture = ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise UserError(f"{file} is not a picture ({', '.join(FORMATS)}); move it out of the folder") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as problem:
        raise UserError(f"{file} cannot be read: {problem}; replace it or move it out of the folder") from None
    if frames > 1:
        raise UserError(f"{file} holds {frames} pictures; save each as a file of its own")
    if picture.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"):
        raise UserError(f"{file} has pixels of mode {picture.mode}; save it with 8 bits a channel, gray or RGB")
    transparent = False
    if picture.mode in ("LA", "PA", "RGBA") or "transparency" in picture.info:
        layer = picture.convert("LA" if picture.mode in ("1", "L", "LA") else "RGBA")
        opacity = layer.getchannel("A")
        transparent = bool((np.asarray(opacity) < 255).any())
        picture = layer.convert(layer.mode[:-1])
        if transparent:
            white = Image.new(picture.mode, picture.size, "white")
            picture = Image.composite(picture, white, opacity)
    return picture.convert("L" if picture.mode in ("1", "L") else "RGB"), transparent
