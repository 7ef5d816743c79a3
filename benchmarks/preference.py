"""What an optimizer step of DPO costs: the room's trainer beside TRL's DPOTrainer, on SmolLM2-135M with LoRA on CPU.

Both are transformers' Trainer with the same pairs in the same order, the same adapter at the start, the same learning
rate, float32 and threads; each runs in a process of its own, whose peak memory counts. TRL is given its best CPU
configuration: float32 (its default is bfloat16), no gradient checkpointing (its default is on), reference
log-probabilities computed beforehand; once with the whole batch at a time and once pair by pair with accumulation,
which pads less; the faster one counts, and stands in the table over lengths and batches. Its defaults are measured too.
The losses of all arms are compared step by step.

Prompts are passages of the Python language reference that ships with Python, of 128 to 512 tokens; chosen and rejected
are further passages.

    .venv/bin/python benchmarks/preference.py [--quick] [--json FILE]

Rows are {work, size, ours, peer, peer_name, unit, ratio}; ratio is peer / ours, above 1 where ours is cheaper.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

THREADS = 2
MICRO_TOKENS = 512  # ours passes through a batch in parts, with the same result; TRL's counterpart is pair by pair
NAMES = {"trl": "TRL fp32", "trl-pairwise": "TRL fp32, pair by pair", "trl-defaults": "TRL defaults"}
MODES = tuple(NAMES)
MAIN = {"prompt": (128, 512), "completion": (20, 120), "batch": 4, "steps": 4}
TABLE = (
    {"prompt": (32, 64), "completion": (20, 120), "batch": 4, "steps": 3},
    {"prompt": (128, 128), "completion": (64, 64), "batch": 4, "steps": 3},
    {"prompt": (512, 512), "completion": (64, 64), "batch": 4, "steps": 3},
    {"prompt": (128, 512), "completion": (20, 40), "batch": 4, "steps": 3},
    {"prompt": (128, 512), "completion": (200, 300), "batch": 4, "steps": 3},
    {"prompt": (128, 512), "completion": (20, 120), "batch": 1, "steps": 4},
    {"prompt": (128, 512), "completion": (20, 120), "batch": 8, "steps": 3},
)


def pairs(spec: dict[str, Any], tokenizer: Any) -> list[dict[str, str]]:
    """Passages cut to lengths drawn evenly from the ranges, in tokens."""
    from pydoc_data.topics import topics

    import numpy as np

    rng = np.random.default_rng(0)
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer(text)["input_ids"]

    def passage(low: int, high: int) -> str:
        size = int(rng.integers(low, high + 1))
        start = int(rng.integers(len(ids) - size))
        return str(tokenizer.decode(ids[start : start + size]))

    return [
        {
            "prompt": passage(*spec["prompt"]),
            "chosen": " " + passage(*spec["completion"]),
            "rejected": " " + passage(*spec["completion"]),
        }
        for _ in range(spec["batch"] * (spec["steps"] + 1))
    ]


def arm(mode: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Train one arm in this process; seconds per step (the first not counted), losses, peak memory in MB."""
    import torch
    from peft import LoraConfig
    from transformers import TrainerCallback, TrainingArguments

    from counterproof.language import load

    torch.set_num_threads(THREADS)
    model, tokenizer = load()
    rows = pairs(spec, tokenizer)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.began)

    pairwise = mode == "trl-pairwise"
    shared: dict[str, Any] = {
        "per_device_train_batch_size": 1 if pairwise else spec["batch"],
        "gradient_accumulation_steps": spec["batch"] if pairwise else 1,
        "max_steps": spec["steps"] + 1, "learning_rate": 1e-4, "lr_scheduler_type": "constant", "logging_steps": 1,
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "seed": 0,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        if mode == "ours":
            from counterproof.preference import DPO, PreferenceTrainer
            from counterproof.preference.data import Example

            examples = [
                Example(prompt=r["prompt"], completions=(r["chosen"], r["rejected"]), scores=(1.0, 0.0), kind="pair")
                for r in rows
            ]
            trainer: Any = PreferenceTrainer(
                model, DPO(), TrainingArguments(folder, **shared), examples, processing_class=tokenizer,
                peft_config=lora, callbacks=[Clock()], micro_tokens=MICRO_TOKENS,
            )  # fmt: skip
        else:
            from datasets import Dataset
            from trl import DPOConfig, DPOTrainer

            best = {} if mode == "trl-defaults" else {
                "bf16": False, "gradient_checkpointing": False, "precompute_ref_log_probs": True,
            }  # fmt: skip
            trainer = DPOTrainer(
                model, args=DPOConfig(folder, beta=0.1, max_length=1024, **best, **shared),
                train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora,
                callbacks=[Clock()],
            )  # fmt: skip
        # The same adapter at the start: peft draws it from the global generator, which the two reach differently.
        draw = torch.Generator().manual_seed(0)
        for name, parameter in trainer.model.named_parameters():
            if "lora_A" in name:
                parameter.data.normal_(0, 0.02, generator=draw)
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    if mode == "ours":
        tokens = sum(sample.group.tokens for sample, _ in trainer.train_dataset) / (spec["steps"] + 1)
    else:
        tokens = 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": sorted(seconds[1:])[len(seconds[1:]) // 2], "losses": losses, "peak": peak, "tokens": tokens}


def measured(mode: str, spec: dict[str, Any]) -> dict[str, Any]:
    """`arm` in a process of its own, with an empty cache of references."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "XDG_CACHE_HOME": cache}
        real = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "counterproof"
        (Path(cache) / "counterproof").mkdir()
        (Path(cache) / "counterproof" / "models").symlink_to(real / "models")
        ran = subprocess.run(
            [sys.executable, __file__, "--arm", mode, "--spec", json.dumps(spec)],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
    if ran.returncode:
        raise SystemExit(f"{mode} failed on {spec}:\n{ran.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
    return answer


def rows_of(spec: dict[str, Any], modes: tuple[str, ...]) -> list[dict[str, Any]]:
    ours = measured("ours", spec)
    peers = {mode: measured(mode, spec) for mode in modes}
    low, high = spec["prompt"]
    size = f"prompts {low}-{high}, answers {spec['completion'][0]}-{spec['completion'][1]}, batch {spec['batch']}"
    best = min((mode for mode in peers if mode != "trl-defaults"), key=lambda mode: peers[mode]["seconds"])
    found = []
    for mode, peer in peers.items():
        name = NAMES[mode]
        mark = " (best)" if mode == best else ""
        difference = max(abs(a - b) for a, b in zip(ours["losses"], peer["losses"], strict=True))
        for work, key, unit in (("step", "seconds", "s"), ("peak memory", "peak", "MB")):
            found.append(
                {
                    "work": work, "size": size, "ours": ours[key], "peer": peer[key], "peer_name": name + mark,
                    "unit": unit, "ratio": peer[key] / ours[key], "loss_difference": difference,
                }
            )  # fmt: skip
        print(
            f"{size:52} {name + mark:30} {ours['seconds']:7.2f} s {peer['seconds']:7.2f} s "
            f"x{peer['seconds'] / ours['seconds']:5.2f}   {ours['peak']:6.0f} MB {peer['peak']:6.0f} MB "
            f"{ours['peak'] / peer['peak']:4.0%}   losses differ by {difference:.1e}",
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the main comparison only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to this file")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--spec", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(arm(options.arm, json.loads(options.spec))))
        return
    print(f"{'':52} {'peer':30} {'ours':>9} {'peer':>9} {'ratio':>6}   {'ours':>9} {'peer':>9} {'ours/peer':>5}")
    rows = rows_of(MAIN, MODES[:2] if options.quick else MODES)
    if not options.quick:
        faster = next(mode for mode, name in NAMES.items() if any(row["peer_name"] == f"{name} (best)" for row in rows))
        for spec in TABLE:
            rows += rows_of(spec, (faster,))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
