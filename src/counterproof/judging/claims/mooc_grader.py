"""Claims of "Large Language Models As MOOCs Graders" (arXiv 2402.03776)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from counterproof.bench.task import Arm, Better, Budget, Claim, Metric, Task, Trial
from counterproof.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    Floats = np.ndarray[Any, np.dtype[np.float64]]
    Rows = Sequence[Mapping[str, Any]]

HERE = "counterproof.judging.claims.mooc_grader"
FEWEST = 2  # questions, for intervals and within-question ranks

METRICS = {
    "spearman": Metric("higher", says="correlation of ranks within each question with the instructor's"),
    "pearson": Metric("higher", says="correlation with the instructor's grades, as shares of the maximum"),
    "qwk": Metric("higher", says="quadratic weighted kappa with the instructor's grades, in whole points"),
    "mae": Metric("lower", "points", "mean absolute error per answer, on the scale of the embedded set (0 to 5)"),
    "bias": Metric("lower", "points", "absolute mean difference from the instructor"),
}

SHORT_ANSWERS = Task(
    name="short-answers",
    says=(
        "answers to ten questions, put together from right and wrong statements so that their points are known, or "
        "your own gradebook; each seed draws other answers; a grader gives points"
    ),
    run=f"{HERE}:run_short_answers",
    metrics=METRICS,
    budgets={
        "quick": Budget(settings={"questions": 6, "per_question": 5}, seeds=(4, 8)),
        "standard": Budget(settings={"questions": 10, "per_question": 20}, seeds=(4, 12), minutes=30.0),
        "full": Budget(
            settings={"questions": 10, "per_question": 100}, seeds=(6, 20), minutes=None, trial_minutes=240.0
        ),
    },
    plug=(
        "a class: Class(model, **settings).grade_table(rows).points, one number for each row of a gradebook (without "
        "the instructor's grades)"
    ),
    data=f"{HERE}:describe_gradebook",
    model="a causal language model: a folder in transformers' format, a GGUF file, or a hub id",
)

COURSE = Task(
    name="simulated-course",
    says=(
        "12 questions, 40 students, 8 criteria each; three peers a student with leniency, halo and noise; a grader "
        "that is right about each criterion with a known probability; no text, no model"
    ),
    run=f"{HERE}:run_course",
    metrics={
        "mae": Metric("lower", "points", "mean absolute error per answer"),
        "passes": Metric("higher", says="share of questions whose mean the paper's test cannot tell from the truth's"),
        "spearman": METRICS["spearman"],
    },
    budgets={
        "quick": Budget(settings={"students": 40, "rounds": 2000}, seeds=(4, 12)),
        "standard": Budget(settings={"students": 120, "rounds": 10_000}, seeds=(6, 20), minutes=30.0),
        "full": Budget(settings={"students": 1000, "rounds": 10_000}, seeds=(10, 40), minutes=None),
    },
    plug="grade(course, rng, **settings) -> (questions, students) points",
    sample="instance",
)


# graders of short answers: the method's protocol, without its code


class Overlap:
    """Cosine of TF-IDF vectors of answer and model answer, as a share of the maximum."""

    def __init__(self, model: str | None = None) -> None:
        pass

    def grade_table(self, rows: "Rows") -> SimpleNamespace:
        import numpy as np

        from counterproof.judging.word_overlap import tfidf_cosine

        cosine = tfidf_cosine([row["instructor_answer"] for row in rows], [row["answer"] for row in rows])
        return SimpleNamespace(points=cosine * np.array([float(row["max_points"]) for row in rows]))


class Length:
    """Words, as a share of the question's longest answer."""

    def __init__(self, model: str | None = None) -> None:
        pass

    def grade_table(self, rows: "Rows") -> SimpleNamespace:
        import numpy as np

        words = [len(str(row["answer"]).split()) for row in rows]
        longest = {row["question_id"]: 1 for row in rows}
        for row, count in zip(rows, words, strict=True):
            longest[row["question_id"]] = max(longest[row["question_id"]], count)
        shares = [count / longest[row["question_id"]] for row, count in zip(rows, words, strict=True)]
        return SimpleNamespace(points=np.array(shares) * np.array([float(row["max_points"]) for row in rows]))


class Peers:
    """The median of the peers' grades: on the embedded set, one grader of known unreliability."""

    def __init__(self, model: str | None = None) -> None:
        pass

    def grade_table(self, rows: "Rows") -> SimpleNamespace:
        import numpy as np

        given = [
            [float(value) for name, value in row.items() if name.startswith("peer_grade_") and value not in (None, "")]
            for row in rows
        ]
        if not all(given):
            raise UserError("an answer has no peer's grade; the arm peers needs columns peer_grade_1, ...")
        return SimpleNamespace(points=np.array([np.median(one) for one in given]))


def own_rows(path: Path) -> list[dict[str, Any]]:
    """A user's gradebook as rows with every column, only answers that an instructor graded."""
    from counterproof.judging.gradebook import read_gradebook

    rows = []
    for one in read_gradebook(path).entries:
        if one.instructor_grade is None:
            continue
        if one.max_points is None or not one.instructor_answer:
            raise UserError(f"{path}: row {one.row}: the comparison needs max_points and instructor_answer")
        rows.append(
            {
                **{name: getattr(one, name) for name in ("question_id", "question", "max_points", "instructor_answer")},
                **{name: getattr(one, name) for name in ("rubric", "student_id", "answer", "instructor_grade")},
                **one.peer_grades,
            }
        )
    if len({row["question_id"] for row in rows}) < FEWEST:
        raise UserError(f"{path}: expected answers with an instructor_grade to at least {FEWEST} questions")
    return rows


def describe_gradebook(path: Path) -> str:
    """What a gradebook holds, in a line."""
    rows = own_rows(path)
    questions = len({row["question_id"] for row in rows})
    return f"{len(rows)} answers with an instructor's grade, to {questions} questions"


def run_short_answers(arm: Arm, trial: Trial) -> Mapping[str, float]:
    """Draw answers, have the arm grade them, compare with the truth; the arms see the same answers."""
    import numpy as np

    from counterproof.judging.grade_agreement import grader_agreement
    from counterproof.judging.short_answers import MAXIMUM, student_answers

    grader = arm.load()
    if grader is None:
        raise UserError(f"arm {arm.name}: the task {SHORT_ANSWERS.name} needs a grader; {SHORT_ANSWERS.plug}")
    rng = trial.rng("answers")
    if trial.data is None:
        rows = student_answers(trial.settings["per_question"], rng, questions=trial.settings["questions"])
    else:
        rows = own_rows(trial.data)
        wanted = trial.settings["questions"] * trial.settings["per_question"]  # as many as of the embedded set
        rows = [rows[place] for place in sorted(rng.permutation(len(rows))[:wanted].tolist())]
    truth = np.array([float(row["instructor_grade"]) for row in rows])
    hidden = [{name: value for name, value in row.items() if name != "instructor_grade"} for row in rows]
    trial.log(0.1)
    points = np.asarray(grader(trial.model, **arm.settings).grade_table(hidden).points, np.float64)
    with trial.off_clock():
        if not np.isfinite(points).all():
            raise UserError(f"arm {arm.name} left {int((~np.isfinite(points)).sum())} of {len(rows)} answers ungraded")
        maximum = np.array([float(row["max_points"]) for row in rows])
        found = grader_agreement(
            points * MAXIMUM / maximum,
            truth * MAXIMUM / maximum,
            question=[row["question_id"] for row in rows],
            max_points=MAXIMUM,
        )
        # What is undefined, since a grader gives everyone the same, tells answers apart as well as chance does.
        values = {name: float(np.nan_to_num(found[name])) for name in METRICS}
        values["bias"] = abs(values["bias"])
    trial.log(1.0, **values)
    return values


def _prompt(variant: str) -> Arm:
    return Arm(variant, "counterproof.judging.mooc_grader:Grader", {"prompt": variant, "mode": "expected"})


QUESTION, ANSWER, RUBRIC = _prompt("question"), _prompt("answer"), _prompt("answer+rubric")
OVERLAP = Arm("word-overlap", f"{HERE}:Overlap")
LENGTH = Arm("length", f"{HERE}:Length")
PEERS = Arm("peers", f"{HERE}:Peers")


# graders of a simulated course


def detector(course: Any, rng: "np.random.Generator", *, accuracy: float) -> "Floats":
    points: Floats = course.detected(accuracy, rng)
    return points


def peer_median(course: Any, rng: "np.random.Generator") -> "Floats":
    import numpy as np

    median: Floats = np.median(course.peers, axis=-1)
    return median


def shuffled(course: Any, rng: "np.random.Generator") -> "Floats":
    """The instructor's own grades, dealt out to the students of a question at random."""
    points: Floats = rng.permuted(course.truth, axis=1)
    return points


def run_course(arm: Arm, trial: Trial) -> Mapping[str, float]:
    """Simulate a course, have the arm grade it, and compare as the paper does and per student."""
    import numpy as np

    from counterproof.judging.grade_agreement import grader_agreement, mean_test
    from counterproof.judging.short_answers import simulate_course

    grade = arm.load()
    if grade is None:
        raise UserError(f"arm {arm.name}: the task {COURSE.name} needs a grader; {COURSE.plug}")
    course = simulate_course(trial.rng("course"), students=trial.settings["students"])
    points = grade(course, trial.rng("grader"), **arm.settings)
    questions, students = course.truth.shape
    tests = [
        mean_test(points[q], course.truth[q], rounds=trial.settings["rounds"], rng=trial.rng(f"test {q}"))
        for q in range(questions)
    ]
    found = grader_agreement(
        points.ravel(),
        course.truth.ravel(),
        question=np.repeat(np.arange(questions), students).tolist(),
        max_points=course.criteria.shape[-1],
    )
    return {
        "mae": found["mae"],
        "passes": float(np.mean([p >= 0.05 for p in tests])),
        "spearman": float(np.nan_to_num(found["spearman"])),
    }


COURSE_PEERS = Arm("peers", f"{HERE}:peer_median")
GOOD = Arm("detector-95", f"{HERE}:detector", {"accuracy": 0.95})
POOR = Arm("detector-70", f"{HERE}:detector", {"accuracy": 0.7})
SHUFFLED = Arm("shuffled", f"{HERE}:shuffled")

ARMS: dict[str, tuple[Arm, ...]] = {
    SHORT_ANSWERS.name: (QUESTION, ANSWER, RUBRIC, OVERLAP, LENGTH, PEERS),
    COURSE.name: (COURSE_PEERS, GOOD, POOR, SHUFFLED),
}

BEST = "of the 18 settings, instructor answer plus rubric agrees best with instructors (abstract; no table found)"
CLOSER = "GPT-4 with answer and rubric is closer to the instructor than peers are (abstract; no table found)"


def _claim(
    name: str,
    says: str,
    task: Task,
    baseline: Arm,
    method: Arm,
    metric: str,
    smallest: float,
    reported: str,
) -> Claim:
    better: Better = task.metrics[metric].better
    return Claim(
        paper="mooc-grader",
        name=name,
        says=says,
        task=task,
        baseline=baseline,
        method=method,
        metric=metric,
        better=better,
        smallest=smallest,
        reported=reported,
    )


# `smallest`: 0.05 of a correlation; a tenth of a point of 5 or 8; a tenth of the questions.
CLAIMS = (
    _claim(
        "main",
        "a prompt with the instructor's answer and rubric, not the answer alone, gives a higher rank correlation",
        SHORT_ANSWERS,
        ANSWER,
        RUBRIC,
        "spearman",
        0.05,
        BEST,
    ),
    _claim(
        "instructor-answer",
        "a prompt with the instructor's answer, not the question alone, gives a higher rank correlation",
        SHORT_ANSWERS,
        QUESTION,
        ANSWER,
        "spearman",
        0.05,
        "no setting of the paper goes without the instructor's answer; every one carries it",
    ),
    _claim(
        "rubric",
        "a prompt with answer and rubric, not the question alone, gives a higher rank correlation",
        SHORT_ANSWERS,
        QUESTION,
        RUBRIC,
        "spearman",
        0.05,
        BEST,
    ),
    _claim(
        "word-overlap",
        "a 135M model with answer and rubric has a higher rank correlation than plain word overlap",
        SHORT_ANSWERS,
        OVERLAP,
        RUBRIC,
        "spearman",
        0.05,
        "not compared in the paper; on Mohler's answers word overlap is far ahead of this model",
    ),
    _claim(
        "peers",
        "a 135M model with answer and rubric is closer to the instructor than a noisy second grader: smaller error",
        SHORT_ANSWERS,
        PEERS,
        RUBRIC,
        "mae",
        0.1,
        CLOSER,
    ),
    _claim(
        "course-accurate",
        "a grader that is right about 95 % of the criteria is closer than the median of three peers: smaller error",
        COURSE,
        COURSE_PEERS,
        GOOD,
        "mae",
        0.1,
        CLOSER,
    ),
    _claim(
        "course-inaccurate",
        "a grader that is right about 70 % of the criteria is closer than the median of three peers: smaller error",
        COURSE,
        COURSE_PEERS,
        POOR,
        "mae",
        0.1,
        "not in the paper: below some accuracy the comparison must come out the other way",
    ),
    _claim(
        "means-hide-students",
        "the instructor's grades dealt out at random pass the paper's test of means in a larger share of questions",
        COURSE,
        POOR,
        SHUFFLED,
        "passes",
        0.1,
        "the paper calls a grader not distinguishable where a bootstrap test of mean grades gives p >= 0.05",
    ),
)
