"""Two processes with half of a batch each take the steps that one takes with all of it, under transformers' Trainer."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, os, sys
import torch
from transformers import Trainer, TrainingArguments
from counterproof.detection import CrossStageLabelAssigner, CrossStageLoss, GroupDetr, tiny_detector

def picture(seed):
    draw = torch.Generator().manual_seed(seed)
    count = 1 + seed % 3
    boxes = torch.cat([torch.rand(count, 2, generator=draw) * 0.5 + 0.25, torch.full((count, 2), 0.2)], 1)
    labels = {"class_labels": torch.arange(count), "boxes": boxes}
    return {"pixel_values": torch.rand(3, 48, 48, generator=draw), "labels": labels}

def collate(rows):
    return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "labels": [r["labels"] for r in rows]}

def grouped():
    return GroupDetr(num_groups=3).apply(tiny_detector(num_queries=8), torch.Generator().manual_seed(0))

def borrowing():
    model = tiny_detector(num_queries=8, decoder_layers=4)
    model.loss_function = CrossStageLoss(CrossStageLabelAssigner(iou_threshold=0.5))
    return model

world = int(os.environ.get("WORLD_SIZE", "1"))
norms = {}
for name, make in (("group-detr", grouped), ("stage-interactor", borrowing)):
    torch.manual_seed(0)
    arguments = TrainingArguments(
        sys.argv[1], per_device_train_batch_size=8 // world, max_steps=3, report_to="none", use_cpu=True,
        remove_unused_columns=False, save_strategy="no", disable_tqdm=True, max_grad_norm=0.0, optim="sgd",
        learning_rate=0.01,
    )
    model = make()
    begin = torch.cat([parameter.detach().flatten().double() for parameter in model.parameters()])
    Trainer(model, arguments, train_dataset=[picture(seed) for seed in range(16)], data_collator=collate).train()
    moved = torch.cat([parameter.detach().flatten().double() for parameter in model.parameters()]) - begin
    norms[name] = [float(moved.norm()), float(moved.sum())]
if os.environ.get("RANK", "0") == "0":
    print(json.dumps(norms))
"""


def test_two_processes_train_as_one_does(tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    several = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    found = []
    for command in ([sys.executable], several):
        ran = subprocess.run(
            [*command, str(tmp_path / "run.py"), str(tmp_path / "out")], env=environment, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr
        found.append(json.loads(ran.stdout.splitlines()[-1]))
    one, two = found
    for name, (norm, total) in one.items():
        assert norm > 1e-3, name
        assert two[name] == pytest.approx([norm, total], rel=1e-3), name
