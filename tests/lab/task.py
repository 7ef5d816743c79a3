from counterproof.bench.task import Arm, Budget, Metric, Task, Trial
from lab.scale import SCALE


def run(arm: Arm, trial: Trial) -> dict[str, float]:
    method = arm.load()
    gain = 0.0 if method is None else method(trial, **arm.settings)
    start = trial.rng("start").normal()
    for step in range(3):
        trial.log((step + 1) / 3, step=step, score=start + gain * step)
    return {"score": SCALE * (start + gain + 0.1 * trial.rng(f"noise of {arm.name}").normal())}


TASK = Task(
    name="lab",
    says="a number",
    run="lab.task:run",
    metrics={"score": Metric("higher", "points")},
    budgets={
        "quick": Budget(seeds=(4, 8), trial_minutes=0.1, trial_memory=1.0),
        "standard": Budget(seeds=(4, 8), minutes=None, settings={"long": True}),
    },
    plug="method(trial, **settings) -> float",
)
