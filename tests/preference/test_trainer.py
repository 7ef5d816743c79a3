"""The trainer: the same curve as TRL, exact resume, what it writes, and what it says when it cannot."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from counterproof.errors import UserError
from counterproof.language import Language
from counterproof.language.tiny import TinyWorld, tiny_model
from counterproof.preference import trainer as module
from counterproof.preference.data import Example, write
from counterproof.preference.forward import objective_output, referenced
from counterproof.preference.objectives import DPO, KTO, SFT, Objective, SimPO
from counterproof.preference.trainer import (
    PreferenceTrainer,
    Trained,
    TrainingDiverged,
    TrainSettings,
    cached_references,
    find_method,
    prepare,
    train,
)

SMALL = TrainSettings(steps=6, batch=8, learning_rate=3e-3, lora=4, max_length=32, samples=4, sample_tokens=8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(module, "reference_cache", lambda: folder)


def examples(count=40, seed=0):
    world, rng = TinyWorld(), np.random.default_rng(seed)
    return [
        Example(prompt=p, completions=(world.answer(rng, p), world.answer(rng, p)), scores=(1.0, 0.0), kind="pair",
                where=f"mine.jsonl:{i}")
        for i, p in enumerate(world.prompts(rng, count), 1)
    ]  # fmt: skip


def language(seed=0):
    tokenizer = TinyWorld().tokenizer()
    return Language(tiny_model(tokenizer, seed=seed, context=32), tokenizer)


def weights(folder):
    return load_file(next(folder.glob("*.safetensors")))


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_adapter_that_plain_peft_loads_to_the_same_log_probabilities(tmp_path):
    from peft import PeftModel

    done = train(language(), examples(), out=tmp_path / "run", settings=SMALL)
    rows, _ = prepare(examples(8, seed=5), done.tokenizer, max_length=32)
    loaded = PeftModel.from_pretrained(language().model, tmp_path / "run").eval()
    expected = torch.cat([s.reference for s in referenced(done.model, rows)])
    torch.testing.assert_close(torch.cat([s.reference for s in referenced(loaded, rows)]), expected)
    base = torch.cat([s.reference for s in referenced(language().model, rows)])
    assert (base - expected).abs().max() > 1e-3
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert {
        "eval_loss",
        "eval_accuracy",
        "eval_margin",
        "eval_chosen",
        "eval_rejected",
        "eval_kl",
        "eval_length",
    } <= set(done.final)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["method"] == "dpo"
    assert result["final"]["eval_loss"] == done.final["eval_loss"]
    assert not list((tmp_path / "run").glob("*.bin"))


def test_full_fine_tuning_gives_a_model_folder(tmp_path):
    from transformers import AutoModelForCausalLM

    done = train(
        language(), examples(), out=tmp_path / "run", settings=SMALL.__class__(**{**SMALL.__dict__, "lora": 0})
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert_same(dict(loaded.state_dict()), dict(done.model.state_dict()))
    assert done.final["eval_kl"] != 0


def test_parts_of_a_batch_give_the_gradient_of_the_whole(tmp_path):
    from transformers import TrainingArguments

    rows, _ = prepare(examples(16), TinyWorld().tokenizer(), max_length=32)
    found = {}
    for tokens in (40, 10_000):
        for objective in (DPO(), KTO(), SFT()):
            tokenizer = TinyWorld().tokenizer()
            arguments = TrainingArguments(
                str(tmp_path), per_device_train_batch_size=16, max_steps=3, learning_rate=1e-2, report_to="none",
                use_cpu=True, disable_tqdm=True, save_strategy="no",
            )  # fmt: skip
            trainer = PreferenceTrainer(
                tiny_model(tokenizer, seed=3),
                objective,
                arguments,
                rows,
                processing_class=tokenizer,
                micro_tokens=tokens,
            )
            trainer.train()
            found[tokens, objective.name] = (
                trainer.model.state_dict(),
                [r["loss"] for r in trainer.state.log_history if "loss" in r],
            )
    for name in ("dpo", "kto", "sft"):
        (small, few), (whole, many) = found[40, name], found[10_000, name]
        np.testing.assert_allclose(few, many, rtol=1e-4)
        for key in whole:
            torch.testing.assert_close(small[key], whole[key], atol=1e-4, rtol=1e-3)


def test_its_losses_are_those_of_trl_step_by_step(tmp_path):
    """Full fine-tuning by SGD, same order of the data: any difference of loss or gradient would grow with the steps."""
    from datasets import Dataset
    from transformers import TrainingArguments
    from trl import DPOConfig, DPOTrainer

    rows = examples(32)
    shared = dict(
        per_device_train_batch_size=8, max_steps=8, learning_rate=0.3, optim="sgd", lr_scheduler_type="constant",
        logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", seed=3,
    )  # fmt: skip
    tokenizer = TinyWorld().tokenizer()
    theirs = DPOTrainer(
        tiny_model(tokenizer, seed=1),
        tiny_model(tokenizer, seed=1),
        args=DPOConfig(str(tmp_path), bf16=False, gradient_checkpointing=False, beta=0.5, **shared),
        train_dataset=Dataset.from_list(
            [{"prompt": e.prompt, "chosen": e.completions[0], "rejected": e.completions[1]} for e in rows]
        ),
        processing_class=tokenizer,
    )
    ours = PreferenceTrainer(
        tiny_model(tokenizer, seed=1), DPO(0.5), TrainingArguments(str(tmp_path), **shared), rows,
        processing_class=tokenizer, max_length=64,
    )  # fmt: skip
    curves = []
    for trainer in (theirs, ours):
        trainer.train()
        curves.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert len(curves[0]) == 8
    np.testing.assert_allclose(curves[1], curves[0], atol=2e-4)
    assert curves[0][-1] != pytest.approx(curves[0][0], abs=1e-3)


def test_a_killed_run_goes_on_to_the_weights_of_an_uninterrupted_one(tmp_path):
    """The run is a process of its own, killed with -9 after its second checkpoint."""
    write(examples(40), tmp_path / "data.jsonl")
    language().model.save_pretrained(tmp_path / "model")
    language().tokenizer.save_pretrained(tmp_path / "model")
    script = (
        "import sys\nfrom counterproof.preference import train, TrainSettings\n"
        "train(sys.argv[1] + '/model', sys.argv[1] + '/data.jsonl', out=sys.argv[2], settings=TrainSettings(steps=24, "
        "batch=8, learning_rate=3e-3, lora=4, lora_dropout=0.1, max_length=32, samples=0, checkpoint_every=2))\n"
    )

    def run(out):
        return subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), str(tmp_path / out)], stderr=subprocess.PIPE
        )

    whole = run("whole")
    killed = run("killed")
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "checkpoint-4").exists() and killed.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "result.json").exists(), "it was too quick to be killed"
    again = run("killed")
    for process in (whole, again):
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors.decode()
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    notes = json.loads((tmp_path / "killed" / "result.json").read_text())["notes"]
    assert any("resumed from" in note for note in notes)


class Poisoned(DPO):
    """Not a number from the batch with a certain row on."""

    def __call__(self, policy, reference, batch):
        output = super().__call__(policy, reference, batch)
        if "mine.jsonl:7" in batch.where:
            output = type(output)(output.losses * float("nan"), output.metrics)
        return output


def test_a_loss_that_is_not_a_number_stops_and_names_the_batch(tmp_path):
    rows = examples(40)
    settings = TrainSettings(
        **{**SMALL.__dict__, "steps": 30, "checkpoint_every": 1, "samples": 0, "batch": 2, "held_out": 0.0}
    )
    with pytest.raises(TrainingDiverged, match=r"the loss is nan, on a batch with .*mine.jsonl:7"):
        train(language(), rows, method=Poisoned(), out=tmp_path / "run", settings=settings)
    checkpoints = list((tmp_path / "run").glob("checkpoint-*"))
    for checkpoint in checkpoints:
        assert all(bool(value.isfinite().all()) for value in weights(checkpoint).values())


def test_a_full_disk_at_a_checkpoint_keeps_the_last_one(tmp_path, monkeypatch):
    settings = TrainSettings(**{**SMALL.__dict__, "checkpoint_every": 2, "samples": 0})
    whole = PreferenceTrainer.save_model

    def full(self, folder=None, _internal_call=False):
        if self.state.global_step >= 4:
            os.makedirs(folder)
            (type(tmp_path)(folder) / "adapter_model.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        whole(self, folder, _internal_call)

    monkeypatch.setattr(PreferenceTrainer, "save_model", full)
    with pytest.raises(
        UserError, match=r"disk is full: no checkpoint could be written at step 4; .*checkpoint-2.*again"
    ):
        train(language(), examples(), out=tmp_path / "run", settings=settings)
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert not list((tmp_path / "run").glob(".*"))
    monkeypatch.undo()
    monkeypatch.setattr(module, "reference_cache", lambda: tmp_path / "cache")
    done = train(language(), examples(), out=tmp_path / "run", settings=settings)
    assert any("resumed" in note for note in done.notes)


def test_a_folder_is_new_or_this_very_run(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not a run of ours"):
        train(language(), examples(), out=tmp_path / "theirs", settings=SMALL)
    assert (tmp_path / "theirs" / "thesis.tex").read_text() == "years of work"
    train(language(), examples(), out=tmp_path / "run", settings=SMALL)
    with pytest.raises(UserError, match="this run, finished"):
        train(language(), examples(), out=tmp_path / "run", settings=SMALL)
    with pytest.raises(UserError, match=r"another run .its method differ"):
        train(language(), examples(), method="simpo", out=tmp_path / "run", settings=SMALL)
    with pytest.raises(UserError, match=r"another run .its examples differ"):
        train(language(), examples(seed=9), out=tmp_path / "run", settings=SMALL)


def test_references_are_kept_by_content(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "reference_cache", lambda: tmp_path)
    model = language().model
    rows, _ = prepare(examples(8), TinyWorld().tokenizer(), max_length=32)
    calls = []
    real = module.referenced
    monkeypatch.setattr(module, "referenced", lambda *a, **k: calls.append(1) or real(*a, **k))
    first = cached_references(model, rows, batch_tokens=100)
    again = cached_references(model, rows, batch_tokens=999)
    assert len(calls) == 1
    assert all(torch.equal(a.reference, b.reference) for a, b in zip(first, again, strict=True))
    other = cached_references(tiny_model(TinyWorld().tokenizer(), seed=8), rows, batch_tokens=100)
    assert not torch.equal(other[0].reference, first[0].reference)
    assert len(calls) == 2
    (path, _) = sorted(tmp_path.iterdir(), key=os.path.getmtime)
    path.write_bytes(path.read_bytes()[:-9])
    mended = cached_references(model, rows, batch_tokens=100)
    assert len(calls) == 3
    assert torch.equal(mended[0].reference, first[0].reference)
    # A fresh adapter changes nothing yet, so it shares the base model's entry.
    from peft import LoraConfig, get_peft_model

    cached_references(
        get_peft_model(language().model, LoraConfig(r=2, target_modules="all-linear")), rows, batch_tokens=100
    )
    assert len(calls) == 3


def test_long_prompts_lose_their_beginning_and_that_is_said(tmp_path):
    rows = examples(6)
    samples, notes = prepare(rows, TinyWorld().tokenizer(), max_length=15)
    assert "of 6 prompts were cut at their beginning to fit 15 tokens" in notes[0]
    assert all(len(s.group.prompt) + max(map(len, s.group.completions)) <= 15 for s in samples)
    whole, _ = prepare(rows, TinyWorld().tokenizer(), max_length=64)
    assert [s.group.completions for s in samples] == [s.group.completions for s in whole]


def test_methods_are_found_by_name_and_their_options_checked():
    assert find_method("simpo", gamma=0.3) == SimPO(gamma=0.3)
    with pytest.raises(UserError, match=r"no method 'dop'; known: .*dpo"):
        find_method("dop")
    with pytest.raises(UserError, match=r"method dpo: .*gamma"):
        find_method("dpo", gamma=1.0)
    with pytest.raises(UserError, match="method dpo: beta must be a positive number, not -1"):
        find_method("dpo", beta=-1)
    assert issubclass(DPO, Objective)


def test_a_method_that_trains_in_its_own_way_gets_every_row(tmp_path):
    class Own:
        name = "own"
        seen = ()

        def fit(self, language, examples, *, settings, out):
            self.seen = tuple(example.where for example in examples)
            return Trained(language.model, language.tokenizer, out, (), {}, ())

    method, rows = Own(), examples(40)
    train(language(), rows, method=method, out=tmp_path / "run", settings=SMALL)
    assert method.seen == tuple(row.where for row in rows)
    with pytest.raises(UserError, match="own evaluates nothing while it trains; leave out the held-out data"):
        train(language(), rows, method=method, out=tmp_path / "other", held_out=rows[:2], settings=SMALL)


def test_a_column_has_a_value_for_each_completion():
    class Weighted(DPO):
        needs = DPO.needs | {"weight"}

    def prepared(value):
        row = Example(
            prompt="sea wave wave : ", completions=("wave", "tide"), scores=(1.0, 0.0), kind="pair",
            columns={"weight": value}, where="w.jsonl:2",
        )  # fmt: skip
        return prepare([row], TinyWorld().tokenizer(), max_length=32, objective=Weighted())[0][0].columns["weight"]

    assert prepared([0.5, 2.0]) == [0.5, 2.0]
    assert prepared(0.5) == [0.5, 0.5]
    for wrong in ("ab", [1.0], [1.0, 2.0, 3.0], None):
        with pytest.raises(UserError, match=r"w.jsonl:2: weight is .*a list of 2, one for each completion"):
            prepared(wrong)


def test_data_that_do_not_go_with_the_method_are_refused(tmp_path):
    single = [
        Example(prompt="sea wave wave : ", completions=("wave",), scores=(1.0,), kind="unpaired", where="u.jsonl:3")
    ]
    with pytest.raises(UserError, match=r"u.jsonl:3: 1 completion.*dpo compares pairs"):
        train(language(), single * 4, out=tmp_path / "a", settings=SMALL)
    bare = [Example(prompt="sea wave wave : ", completions=(), scores=(), kind="prompt", where="p.jsonl:1")]
    with pytest.raises(UserError, match=r"p.jsonl:1: a prompt without completion"):
        train(language(), bare * 4, out=tmp_path / "b", settings=SMALL)
    with pytest.raises(UserError, match="learning_rate must be positive, not 0"):
        TrainSettings(learning_rate=0)


def test_two_processes_train_as_one_does(tmp_path):
    """Two processes with half the batch each share their gradients; same rows per step, so the same losses."""
    write(examples(32), tmp_path / "data.jsonl")
    language().model.save_pretrained(tmp_path / "model")
    language().tokenizer.save_pretrained(tmp_path / "model")
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\nfrom counterproof.preference import train, TrainSettings\n"
        "train(sys.argv[1] + '/model', sys.argv[1] + '/data.jsonl', out=sys.argv[2], settings=TrainSettings(steps=4, "
        "batch=int(sys.argv[3]), learning_rate=3e-3, lora=4, max_length=32, samples=0, held_out=0.0, "
        "checkpoint_every=2))\n"
    )
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for command, out, batch in (([sys.executable], "one", "8"), (torchrun, "two", "4")):
        ran = subprocess.run(
            [*command, str(script), str(tmp_path), str(tmp_path / out), batch], env=environment, capture_output=True
        )
        assert ran.returncode == 0, ran.stderr.decode()
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    moved = 0.0
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=2e-3, rtol=0)
        moved = max(moved, float(first[name].abs().max()) if "lora_B" in name else 0.0)
    assert moved > 5e-3


def test_the_command_trains_and_answers_in_json(tmp_path):
    write(examples(24), tmp_path / "data.jsonl")
    language().model.save_pretrained(tmp_path / "model")
    language().tokenizer.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "counterproof", "preference", "train", "--method", "dpo", "--set", "beta=0.3",
               "--model", str(tmp_path / "model"), "--data", str(tmp_path / "data.jsonl"),
               "--out", str(tmp_path / "out"), "--steps", "4", "--batch", "4", "--lora", "2", "--samples", "2",
               "--sample-tokens", "4", "--json"]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    answer = json.loads(ran.stdout)
    assert answer["out"] == str(tmp_path / "out")
    assert {"loss", "accuracy", "kl"} <= set(answer["final"])
    assert "step 4 of 4" in ran.stderr
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n')
    command[command.index(str(tmp_path / "data.jsonl"))] = str(tmp_path / "bad.jsonl")
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 2
    assert "bad.jsonl:1" in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1
    shutil.rmtree(tmp_path / "out")


def test_every_setting_has_an_option_or_is_pythons_alone():
    from dataclasses import fields

    from counterproof.preference.commands import train as command

    options = {parameter.name for parameter in command.params}
    assert {field.name for field in fields(TrainSettings)} - options == {
        "weight_decay", "max_grad_norm", "lora_alpha", "lora_dropout",
    }  # fmt: skip


def test_a_batch_scored_here_is_what_the_objective_says():
    rows, _ = prepare(examples(4), TinyWorld().tokenizer(), max_length=32)
    model = language().model
    rows = referenced(model, rows)
    assert float(objective_output(model, DPO(), rows).loss.detach()) == pytest.approx(np.log(2), abs=1e-6)
