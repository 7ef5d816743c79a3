from counterproof.bench.task import Arm, Claim
from lab.task import TASK


def make_claim(method="gain", **settings):
    return Claim(
        paper="lab",
        says="it gains",
        task=TASK,
        baseline=Arm("none"),
        method=Arm(method, f"lab.methods:{method}", settings),
        metric="score",
        better="higher",
    )
