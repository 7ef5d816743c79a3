import os
import signal
import time
from pathlib import Path

import numpy as np

from counterproof.bench.task import Diverged


def gain(trial, by=1.0):
    return by


def raises(trial):
    if trial.seed == 1:
        raise RuntimeError("the second seed is unlucky")
    return 1.0


def not_a_number(trial):
    return float("nan") if trial.seed == 1 else 1.0


def diverges(trial):
    if trial.seed == 1:
        raise Diverged("the loss is infinite")
    return 1.0


def hangs(trial):
    while trial.seed == 1:
        time.sleep(0.1)
    return 1.0


def hoards(trial):
    kept = []
    while trial.seed == 1:
        kept.append(np.ones(150_000_000))
        time.sleep(0.005)
    return 1.0


def hoards_in_a_child(trial):
    if trial.seed == 1:
        child = os.fork()
        if child == 0:
            hoards(trial)
        os.waitpid(child, 0)
    return 1.0


def cannot_allocate(trial):
    if trial.seed == 1:
        np.ones(2**45)
    return 1.0


def dies(trial):
    if trial.seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return 1.0


def dies_once(trial, folder=""):
    mark = Path(folder) / "died"
    if trial.seed == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 1.0


def leaves(trial):
    if trial.seed == 1:
        os._exit(3)
    return 1.0


def lingers(trial):
    """Answers, but leaves a thread that would keep the process."""
    import threading

    threading.Thread(target=time.sleep, args=(3600,)).start()
    return 1.0


def counts(trial, folder="", seconds=0.0):
    """Leaves a mark for every execution."""
    with (Path(folder) / "executions").open("a") as marks:
        marks.write(f"{trial.seed}\n")
    time.sleep(seconds)
    return 1.0


def works(trial, seconds=0.0):
    """Keeps the processor busy."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    return 1.0


def imports_by_name(trial):
    import importlib

    return importlib.import_module("lab." + "hidden").GAIN


def draws_globally(trial):
    import random

    return random.random() + np.random.random()  # noqa: NPY002
