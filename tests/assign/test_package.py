"""The package as a whole: its names, and that it neither needs nor loads torch."""

import doctest
import importlib
import subprocess
import sys

import pytest

from counterproof import assign

WITHOUT_TORCH = """
import sys
if sys.argv[1] == "hidden":
    sys.modules["torch"] = None  # importing it fails, as where it is not installed
import numpy as np
from counterproof import assign
x, boxes = np.random.default_rng(0).random((6, 4)), np.array([[0, 0, 2, 2], [1, 1, 3, 3]])
assign.linear_assignment(x)
assign.linear_assignment_batch([x, x[:2]])
assign.group_assignment(x, 2)
assign.capacity_assignment(x, 2)
assign.topk_assign(x, 2)
assign.max_iou_assign(boxes, boxes)
assign.atss_assign(boxes, [2], boxes)
assign.simota_assign(x, x)
assign.sinkhorn(x)
assign.dual_softmax(x)
assign.quantized_assignment(x, x)
assert sys.modules.get("torch") is None
assert "lap" not in sys.modules
"""


@pytest.mark.parametrize("torch", ["hidden", "installed"])
def test_arrays_never_load_torch(torch):
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, torch], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_documented():
    for name in assign.__all__:
        doc = getattr(assign, name).__doc__
        assert doc, name
        for section in ("Args:", "Returns:", "Raises:"):
            assert section in doc, (name, section)


@pytest.mark.parametrize("module", ["linear", "boxes", "soft", "noise"])
def test_examples_in_docstrings(module):
    failed, _ = doctest.testmod(importlib.import_module(f"counterproof.assign.{module}"))
    assert failed == 0
