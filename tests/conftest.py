import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # the package `lab`, for the tests and for the trials they start
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory, monkeypatch):
    """No test reads or writes the developer's own journal."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("COUNTERPROOF_HOME", str(home))
    return home
