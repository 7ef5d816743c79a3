"""Does a model that trains on what it wrote, answered and graded itself improve, and go on improving?"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from counterproof.bench.task import Arm, Budget, Claim, Diverged, Metric, Task, Trial

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from counterproof.language import Language

TASK = Task(
    name="tiny-self-training",
    says=(
        "a tiny Llama that knows facts, but likes to go on with another question, and can grade, trains itself in "
        "rounds: probability of answering at once, rightly, and ending"
    ),
    run="counterproof.preference.claims.i_sheep:run_rounds",
    metrics={
        "success": Metric("higher", "probability", "of the right answer and then the end, mean over all questions"),
        "success_easy": Metric("higher", "probability", "the same for things whose fact the text mostly has right"),
        "success_middle": Metric("higher", "probability", "the same for things whose fact it has right about as often"),
        "success_hard": Metric("higher", "probability", "the same for things whose fact it mostly has wrong"),
        "format": Metric("higher", "probability", "of beginning with an answer, right or wrong"),
        "precision": Metric("higher", "share", "of right answers among the pairs that the last round kept"),
        "yield_first": Metric("higher", "share", "of the proposals that the first round kept"),
        "yield_last": Metric("higher", "share", "of the proposals that the last round kept"),
    },
    budgets={
        "quick": Budget(
            settings={
                "things": 36,
                "words": 12,
                "texts": 16384,
                "base_steps": 600,
                "hidden": 48,
                "proposals": 40,
                "rounds": 4,
                "steps": 40,
                "learning_rate": 3e-3,
            },
            seeds=(4, 12),
            minutes=5.0,
        ),
        "standard": Budget(
            settings={
                "things": 120,
                "words": 24,
                "texts": 131072,
                "base_steps": 4000,
                "hidden": 64,
                "proposals": 120,
                "rounds": 6,
                "steps": 80,
                "learning_rate": 3e-3,
            },
            seeds=(6, 20),
            minutes=30.0,
            trial_minutes=30.0,
        ),
        "full": Budget(
            settings={
                "things": 600,
                "words": 60,
                "texts": 2097152,
                "base_steps": 40000,
                "hidden": 128,
                "proposals": 1000,
                "rounds": 8,
                "steps": 200,
                "learning_rate": 1e-3,
            },
            seeds=(8, 24),
            minutes=None,
            trial_minutes=240.0,
        ),
    },
    plug=(
        "method(language, seed_tasks, ...) -> an iterable over rounds with language, kept, precision and yield_, as "
        "ISheep; of the settings, `rounds` is the task's where not given, `share_rounds` gives a round the "
        "proposals of all, `expected` grades by expectation, `random` keeps as many pairs as the grades do, at random"
    ),
)
RIGHT = {"easy": 0.9, "middle": 0.6, "hard": 0.3}  # of the answers in the text; other answers are any word
ANSWERED = 0.4  # of the questions in the text; behind the others stands another question
CERTAIN = 0.95  # of the gradings in the text are right
GOOD, BAD = "9||", "2||"
QUALITY = "quality {instruction} {response} :"
FOLLOWING = "following {instruction} {response} :"


class World(NamedTuple):
    """Things, and a fact about each: a word. A third of the things is easy, a third middling, a third hard."""

    words: tuple[str, ...]
    facts: Mapping[str, str]

    @classmethod
    def of(cls, rng: "np.random.Generator", things: int, words: int) -> "World":
        """Facts drawn at random."""
        known = tuple(f"w{index}" for index in range(words))
        return cls(known, {f"{list(RIGHT)[i * 3 // things]}{i}": known[rng.integers(words)] for i in range(things)})

    @property
    def questions(self) -> list[str]:
        """All there are, a kind after the other."""
        return [f"do {thing} ?" for thing in self.facts]

    def answer(self, question: str) -> str:
        """The right one."""
        return self.facts[question.split()[1]]

    def text(self, rng: "np.random.Generator") -> str:
        """A line that the base model learns: questions with answer or further question, or a grading."""
        question = self._question(rng)
        sort = rng.random()
        if sort < 0.5:
            if rng.random() < ANSWERED:
                return f"{question} {self._given(rng, question)}"
            return " ".join([question, *(self._question(rng) for _ in range(int(rng.integers(1, 3))))])
        which = "quality" if sort < 0.8 else "following"
        # Responses as the model will give them, right and wrong ones alike often.
        kind = rng.random()
        if kind < 0.3:
            response, good = " ".join(self._question(rng) for _ in range(int(rng.integers(1, 3)))), False
        else:
            response = self.answer(question) if kind < 0.65 else self._word(rng)
            good = which == "following" or response == self.answer(question)
        certain = rng.random() < CERTAIN
        return f"{which} {question} {response} : {GOOD if good == certain else BAD}"

    def _word(self, rng: "np.random.Generator") -> str:
        return self.words[rng.integers(len(self.words))]

    def _question(self, rng: "np.random.Generator") -> str:
        return self.questions[rng.integers(len(self.facts))]

    def _given(self, rng: "np.random.Generator", question: str) -> str:
        kind = question.split()[1].rstrip("0123456789")
        return self.answer(question) if rng.random() < RIGHT[kind] else self._word(rng)

    def base(self, seed: int, settings: Mapping[str, Any], rng: "np.random.Generator", device: str) -> "Language":
        """A model trained on the world's text."""
        from counterproof.language.tiny import pretrain, tiny_tokenizer

        special = ("do", "?", ":", "quality", "following", GOOD, BAD)
        return pretrain(
            [self.text(rng) for _ in range(settings["texts"])],
            tiny_tokenizer([*special, *self.facts, *self.words]),
            seed=seed,
            steps=settings["base_steps"],
            batch=192,
            hidden=settings["hidden"],
            context=32,
            device=device,
        )


def run_rounds(arm: Arm, trial: Trial) -> Mapping[str, float]:
    """Let the method do its rounds from a base model that all arms share; measure after each.

    The generator proposes: it continues "do". Grades are sampled, as the method has it.
    """
    from functools import partial

    import numpy as np
    from peft import LoraConfig

    from counterproof.language.sampling import generate
    from counterproof.preference.i_sheep import Instruction, SelfAssessor, grades_above, respond

    settings, options = trial.settings, dict(arm.settings)
    with trial.off_clock():
        world = World.of(trial.rng("facts"), settings["things"], settings["words"])
        base = world.base(trial.seed, settings, trial.rng("texts"), trial.device)
        before = probabilities(base, world)
    rounds = options.pop("rounds", settings["rounds"])
    proposals = settings["proposals"] * (settings["rounds"] if options.pop("share_rounds", False) else 1)
    questions = frozenset(world.questions)

    def propose(language: "Language", n: int, *, number: int, seed: int) -> "list[Instruction]":
        found = generate(language, ["do"], samples=n, max_new_tokens=8, stop="?", seed=seed, batch_size=256)[0]
        return [Instruction(f"do {' '.join(one.text.split())} ?") for one in found]

    def answer(language: "Language", tasks: "Sequence[Instruction]", *, number: int, seed: int) -> Any:
        return respond(language, tasks, top_p=1.0, max_new_tokens=8, batch_size=256, seed=seed)

    expected = options.pop("expected", False)

    def assess(language: "Language", pairs: Any, *, number: int, seed: int) -> Any:
        assessor = SelfAssessor(
            language,
            quality_prompt=QUALITY,
            following_prompt=FOLLOWING,
            expected=expected,
            max_new_tokens=1,
            batch_size=256,
        )
        return assessor.score(pairs, seed=seed)

    if options.pop("random", False):
        chooser = trial.rng("random filter")
        options["keep"] = partial(_as_many, chooser, grades_above)
    loop = arm.load()(
        base,
        world.questions,
        n_per_round=proposals,
        rounds=rounds,
        chat=False,
        duplicates=None,
        instruction_rules={"form": lambda task: task.instruction not in questions},
        response_rules={"empty": lambda pair: not pair.response},
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        training={"steps": settings["steps"], "batch": 16, "learning_rate": settings["learning_rate"]},
        propose=propose,
        answer=answer,
        assess=assess,
        truth=lambda pair: pair.response == world.answer(pair.instruction),
        seed=int(trial.rng("rounds").integers(2**31)),
        **options,
    )
    trial.log(0.0, step=0, success=float(np.mean(before[0])))
    found, right, yields = before, 0.0, [0.0]
    try:
        for number, state in enumerate(loop, 1):
            with trial.off_clock():
                found = probabilities(state.language, world)
            right, yields = state.precision, [*yields, state.yield_]
            trial.log(number / rounds, step=number, success=float(np.mean(found[0])), yield_=state.yield_)
    except ArithmeticError as problem:
        raise Diverged(str(problem)) from None
    kinds = np.mean(np.reshape(found[0], (len(RIGHT), -1)), axis=1)
    return {
        "success": float(np.mean(found[0])),
        **{f"success_{kind}": float(value) for kind, value in zip(RIGHT, kinds, strict=True)},
        "format": float(np.mean(found[1])),
        "precision": float(right),
        "yield_first": float(yields[min(1, len(yields) - 1)]),
        "yield_last": float(yields[-1]),
    }


def _as_many(rng: "np.random.Generator", filter_: Any, pairs: Any) -> list[Any]:
    """As many pairs as the filter keeps, any."""
    count = len(filter_(pairs))
    return [pairs[index] for index in sorted(rng.choice(len(pairs), size=count, replace=False))]


def probabilities(language: "Language", world: World) -> "tuple[list[float], list[float]]":
    """Of the right answer with the end behind it, and of any answer at all, exactly, for every question in order."""
    import torch

    from counterproof.language import completion_logps, tokenize

    groups = [tokenize(language.tokenizer, f"{question}\n", list(world.words)) for question in world.questions]
    with torch.no_grad():
        logps = completion_logps(language.model, groups)
    whole = logps.sum().double().exp().reshape(len(groups), -1)
    first = logps.token[logps.position == 0].double().exp().reshape(len(groups), -1)
    right = [world.words.index(world.answer(question)) for question in world.questions]
    return [float(row[index]) for row, index in zip(whole, right, strict=True)], first.sum(1).tolist()


METHOD = "counterproof.preference.i_sheep:ISheep"

SHEEP = Arm("i-sheep", METHOD)
ONE = Arm("one-round", METHOD, {"rounds": 1})
ONE_UNFILTERED = Arm("one-round-unfiltered", METHOD, {"rounds": 1, "threshold": None})
UNFILTERED = Arm("unfiltered", METHOD, {"threshold": None})
LARGE = Arm("one-large-round", METHOD, {"rounds": 1, "share_rounds": True})
RANDOM = Arm("random-filter", METHOD, {"random": True})
CONTINUED = Arm("from-current", METHOD, {"train_from": "current"})
ALL = Arm("from-base-on-all", METHOD, {"train_from": "all"})
OWN_GRADER = Arm("graded-by-current", METHOD, {"grader": "current"})

PAPER = "Qwen-1.5-72B: later rounds against the first, up to +78.2 % relative on Alpaca Eval, +24.0 % on MT-Bench"
BEST = "base with the latest data is the best of the variants; no figure known to us"


def _claim(name: str, says: str, baseline: Arm, *, reported: str, method: Arm = SHEEP) -> Claim:
    return Claim(
        paper="i-sheep",
        name=name,
        says=says,
        task=TASK,
        baseline=baseline,
        method=method,
        metric="success",
        better="higher",
        smallest=0.03,
        reported=reported,
    )


CLAIMS = (
    _claim("main", "further rounds of self-training go on improving on the first", ONE, reported=PAPER),
    _claim(
        "filter",
        "in one round, training on what passes the model's own grading beats training on all of it",
        ONE_UNFILTERED,
        method=ONE,
        reported="filtering by both scores is best, and without it rounds do not go on improving; no figure known",
    ),
    _claim(
        "one-large-round",
        "at an equal number of proposals, several rounds beat a single larger one",
        LARGE,
        reported="not compared, as far as we know; rounds are said to gain because better generators write better data",
    ),
    _claim(
        "unfiltered-rounds",
        "rounds with the filter beat as many without",
        UNFILTERED,
        reported="without filter rounds do not go on improving; no figure known to us",
    ),
    _claim(
        "random-filter",
        "the grades beat a random choice of as many pairs in every round",
        RANDOM,
        reported="not compared, as far as we know",
    ),
    _claim("from-base", "training the base anew beats training on and on", CONTINUED, reported=BEST),
    _claim("latest-data", "training the base on the latest round's data beats training it on all", ALL, reported=BEST),
    _claim(
        "base-grader",
        "the base model as grader beats the model of each round",
        OWN_GRADER,
        reported="not compared, as far as we know; the released script grades with the base model throughout",
    ),
)
