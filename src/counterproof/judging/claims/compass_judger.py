"""Claims of "CompassJudger-1: All-in-one Judge Model Helps Model Evaluation and Evolution" (arXiv 2410.16256)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from counterproof.bench.task import Arm, Budget, Claim, Diverged, Metric, Task, Trial

if TYPE_CHECKING:
    import numpy as np

    from counterproof.judging.compass_judger import CritiquePoint, Point
    from counterproof.judging.pairwise import Pair
    from counterproof.judging.templates import PromptTemplate
    from counterproof.language.models import Language

    Floats = np.ndarray

HERE = "counterproof.judging.claims.compass_judger"

# ranking judges

FIELDS = ("subset", "item", "judge", "prompting", "label", "winner_as_shown", "winner_swapped")
HARD = "Adversarial"  # how the names of hard subsets begin

JUDGE_RANKING = Task(
    name="judge-ranking",
    says=(
        "judge x prompting cells, simulated or of your file, with verdicts on labelled pairs in both orders: half of "
        "the items gives every cell a figure, which is to rank the cells by their accuracy on the other half"
    ),
    run=f"{HERE}:run_ranking",
    metrics={
        "spearman": Metric("higher", says="rank correlation with the accuracy on the other half, mean over halves"),
        "spearman_hard": Metric("higher", says="the same with the accuracy on the other half's adversarial items"),
        "spearman_easy": Metric("higher", says="the same with the accuracy on the other half's natural items"),
    },
    budgets={
        "quick": Budget(settings={"halves": 10, "judges": 6, "promptings": 10}, seeds=(8, 20), minutes=2.0),
        "standard": Budget(settings={"halves": 50, "judges": 6, "promptings": 10}, seeds=(10, 30), minutes=30.0),
        "full": Budget(settings={"halves": 200, "judges": 12, "promptings": 12}, seeds=(20, 60), minutes=None),
    },
    plug="a function (table, rng, **settings) -> figure of every cell, higher for a better judge; see Table",
    data=f"{HERE}:describe_judgments",
    sample="instance",
)


@dataclass(frozen=True)
class Table:
    """Verdicts of judges on labelled pairs.

    Attributes:
        truth: (items,), 1 or -1: which answer is better.
        hard: (items,), bool.
        verdicts: (cells, items, 2), 1 or -1 of the same answers in both orders, NaN where none could be read, and where
            a cell has not judged an item.
        asked: (cells, items), bool.
    """

    truth: "Floats"
    hard: "Floats"
    verdicts: "Floats"
    asked: "Floats"

    def of(self, items: "Floats") -> "Table":
        """The part of it with these items."""
        return Table(self.truth[items], self.hard[items], self.verdicts[:, items], self.asked[:, items])


def figures(table: Table, name: str) -> "Floats":
    """(cells,): a figure of JudgerBench's for every cell."""
    import numpy as np

    from counterproof.judging.judger_bench import BenchItem, JudgerBench, Verdicts

    items = [
        BenchItem(part="pairs", dataset="", category="", truth=float(truth), question=[], swapped=[], prompt_id=str(at))
        for at, truth in enumerate(table.truth)
    ]
    said = {
        str(cell): Verdicts(margins, np.repeat(~asked[:, None], 2, axis=1))
        for cell, (margins, asked) in enumerate(zip(table.verdicts, table.asked, strict=True))
    }
    report = JudgerBench(items).evaluate(said, rounds=1)
    return np.array([judge.figures["pairs"][name].value for judge in report.judges.values()])


def ranked_by(table: Table, rng: "np.random.Generator", *, figure: str, items: str = "all") -> "Floats":
    """A figure of every cell.

    Args:
        table: the first half.
        rng: of the choice of items.
        figure: ``"accuracy"``, ``"consistency"`` or ``"both_orders_right"``.
        items: ``"all"``; ``"easy"``: those that are not hard; ``"mixed"``: as many as are easy, of all kinds.
    """
    import numpy as np

    chosen = np.arange(len(table.truth))
    if items != "all":
        easy = np.flatnonzero(~table.hard)
        chosen = easy if items == "easy" else rng.permutation(len(table.truth))[: len(easy)]
    return figures(table.of(chosen), figure)


def simulated(rng: "np.random.Generator", judges: int, promptings: int) -> Table:
    """Judges of known truth, on as many items as LLMBar has: 100 natural and 319 adversarial ones.

    A cell's skill on natural items is its judge's and its prompting's together; on adversarial ones it is lower, and
    correlated with the first by one half (on LLMBar natural accuracy ranks cells on adversarial items with a Spearman
    correlation of .52). Position bias and the share of unreadable replies have nothing to do with skill. A verdict is
    right with probability sigmoid(skill - difficulty + bias where the better answer comes first, - bias where not).
    """
    import numpy as np

    easy, hard = 100, 319
    truth = rng.choice([-1, 1], easy + hard)
    is_hard = np.arange(easy + hard) >= easy
    cells = judges * promptings
    judge, prompting = np.divmod(np.arange(cells), promptings)
    natural = rng.normal(1.5, 0.8, judges)[judge] + rng.normal(0, 0.4, promptings)[prompting]
    apart = rng.normal(0, 0.8, judges)[judge] + rng.normal(0, 0.4, promptings)[prompting]
    adversarial = 0.5 * (natural - 1.5) + np.sqrt(0.75) * apart
    bias = (rng.normal(0, 0.8, judges)[judge] + rng.normal(0, 0.4, promptings)[prompting])[:, None, None]
    unread = rng.beta(1, 30, cells)[:, None, None]
    skill = np.where(is_hard, adversarial[:, None], natural[:, None]) - rng.normal(0, 1, easy + hard)
    first = np.stack([truth == 1, truth == -1], 1)  # the better answer is shown first, in either order
    right = rng.random((cells, easy + hard, 2)) < 1 / (1 + np.exp(-(skill[:, :, None] + np.where(first, bias, -bias))))
    verdicts = np.where(right, truth[:, None], -truth[:, None]).astype(float)
    verdicts[rng.random(verdicts.shape) < unread] = np.nan
    return Table(truth.astype(float), is_hard, verdicts, np.ones((cells, easy + hard), dtype=bool))


def read_judgments(path: Path) -> tuple[Table, list[str]]:
    """A table and the names of its cells from a CSV file in the form of LLMBar's extracted judgments.

    Raises:
        UserError: file and line of what is missing or not what it should be; fewer than 3 cells, no natural or no
            adversarial items, an item with two labels.
    """
    import csv

    import numpy as np

    from counterproof.errors import UserError

    remedy = f"expected a CSV file with the columns {', '.join(FIELDS)}"
    truth: dict[tuple[str, str], int] = {}
    rows: dict[tuple[str, str], dict[tuple[str, str], tuple[float, float]]] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            missing = [name for name in FIELDS if name not in (reader.fieldnames or ())]
            if missing:
                raise UserError(f"{path} has no column {missing[0]!r}; {remedy}")
            for row in reader:
                where = f"{path}:{reader.line_num}"
                item = (str(row["subset"]), str(row["item"]))
                if row["label"] not in ("1", "2"):
                    raise UserError(f"{where}: label is {row['label']!r}; expected 1 or 2")
                if truth.setdefault(item, int(row["label"])) != int(row["label"]):
                    raise UserError(f"{where}: item {item[1]} of {item[0]} has another label than before")
                winners = (row["winner_as_shown"], row["winner_swapped"])
                if not all(winner in ("1", "2", "") for winner in winners):
                    raise UserError(f"{where}: the winners are {winners}; expected 1, 2 or nothing")
                first, second = ({"1": 1.0, "2": -1.0, "": np.nan}[str(winner)] for winner in winners)
                rows.setdefault((str(row["judge"]), str(row["prompting"])), {})[item] = (first, second)
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise UserError(f"cannot read {path}: {problem}; {remedy}") from None
    items = sorted(truth)
    hard = np.array([subset.startswith(HARD) for subset, _ in items], dtype=bool)
    if len(rows) < 3 or not hard.any() or hard.all():
        raise UserError(
            f"{path} has {len(rows)} cells, {int(hard.sum())} adversarial and {int((~hard).sum())} natural items; "
            f"needed are 3 cells at least, and items of subsets whose names begin with {HARD} and of others"
        )
    at = {item: index for index, item in enumerate(items)}
    cells = sorted(rows)
    verdicts = np.full((len(cells), len(items), 2), np.nan)
    asked = np.zeros((len(cells), len(items)), dtype=bool)
    for index, cell in enumerate(cells):
        for item, winners_ in rows[cell].items():
            verdicts[index, at[item]] = winners_
            asked[index, at[item]] = True
    labels = np.array([1.0 if truth[item] == 1 else -1.0 for item in items])
    return Table(labels, hard, verdicts, asked), [f"{judge} {prompting}" for judge, prompting in cells]


def describe_judgments(path: Path) -> str:
    """One line about a user's file; raises what `read_judgments` raises."""
    table, cells = read_judgments(path)
    return f"{len(cells)} judge x prompting cells, {len(table.truth)} items ({int(table.hard.sum())} adversarial)"


def run_ranking(arm: Arm, trial: Trial) -> Mapping[str, float]:
    """How well an arm's figure, from one half of the items, ranks cells on the other half."""
    import numpy as np
    from scipy.stats import rankdata

    settings = trial.settings
    if trial.data is not None:
        table, _ = read_judgments(trial.data)
    else:
        table = simulated(trial.rng("world"), settings["judges"], settings["promptings"])
    method = arm.load()
    halves, draws = trial.rng("halves"), trial.rng("items")
    found: dict[str, list[float]] = {"spearman": [], "spearman_hard": [], "spearman_easy": []}
    for number in range(settings["halves"]):
        first = np.zeros(len(table.truth), dtype=bool)
        for kind in (table.hard, ~table.hard):  # half of either kind
            own = np.flatnonzero(kind)
            first[halves.permutation(own)[: len(own) // 2]] = True
        scores = method(table.of(np.flatnonzero(first)), draws, **arm.settings)
        for name, rest in (
            ("spearman", ~first),
            ("spearman_hard", ~first & table.hard),
            ("spearman_easy", ~first & ~table.hard),
        ):
            target = figures(table.of(np.flatnonzero(rest)), "accuracy")
            there = ~np.isnan(scores) & ~np.isnan(target)
            x, y = rankdata(scores[there]), rankdata(target[there])
            varied = len(x) > 2 and np.ptp(x) > 0 and np.ptp(y) > 0
            found[name].append(float(np.corrcoef(x, y)[0, 1]) if varied else 0.0)
        trial.log((number + 1) / settings["halves"], spearman=found["spearman"][-1])
    return {name: float(np.mean(values)) for name, values in found.items()}


ACCURACY = Arm("accuracy", f"{HERE}:ranked_by", {"figure": "accuracy"})
CONSISTENCY = Arm("consistency", f"{HERE}:ranked_by", {"figure": "consistency"})
BOTH_RIGHT = Arm("both-orders-right", f"{HERE}:ranked_by", {"figure": "both_orders_right"})
EASY = Arm("easy-items", f"{HERE}:ranked_by", {"figure": "accuracy", "items": "easy"})
MIXED_ITEMS = Arm("items-of-all-kinds", f"{HERE}:ranked_by", {"figure": "accuracy", "items": "mixed"})

# one judge for every format

FORMS = ("bracket", "five-level", "json", "scores")  # comparisons, besides the letter
TOPICS = {
    "sea": ("wave", "tide", "fish", "salt"),
    "sky": ("cloud", "wind", "star", "moon"),
    "farm": ("cow", "hay", "barn", "mud"),
    "town": ("shop", "tram", "bell", "lamp"),
}
ERRORS = ("damn", "fool", "oops", "wrong")
PLAIN = tuple(word for words in TOPICS.values() for word in words)

TINY = {
    "model": "tiny", "hidden": 64, "layers": 2, "start_steps": 150, "items": 3000, "steps": 300, "tokens": 1200,
    "learning_rate": 3e-3, "judged": 64, "max_tokens": 16, "jobs": 128,
}  # fmt: skip
SMOLLM2 = {
    "model": "smollm2", "items": 1000, "steps": 60, "tokens": 1200, "learning_rate": 3e-4, "judged": 24,
    "max_tokens": 40, "jobs": 16, "lora": 16,
}  # fmt: skip

JUDGE_TRAINING = Task(
    name="judge-training",
    says=(
        "a model fine-tuned to judge lists of words by the errors among them, whose number is known, at equal steps "
        "and tokens: a tiny Llama from scratch, or SmolLM2 with LoRA; asked for verdicts in seven formats, and for text"
    ),
    run=f"{HERE}:run_training",
    metrics={
        "formats_readable": Metric("higher", says="readable replies (one reminder), mean of six formats but letter"),
        "formats_accuracy": Metric("higher", says="share of right verdicts in these, unreadable ones being wrong"),
        "letter_accuracy": Metric("higher", says="share of right verdicts by letter, over both orders"),
        "letter_consistency": Metric("higher", says="share of pairs whose letters name the same winner in both orders"),
        "letter_readable": Metric("higher", says="share of readable replies by letter (one reminder)"),
        "perplexity": Metric("lower", says="on held-out ordinary text"),
    },
    budgets={
        "quick": Budget(settings=TINY, seeds=(4, 10), minutes=3.0),
        "standard": Budget(settings=SMOLLM2, seeds=(3, 6), minutes=60.0, trial_minutes=30.0, trial_memory=12.0),
        "full": Budget(
            settings={**SMOLLM2, "items": 10_000, "steps": 600, "tokens": 8192, "judged": 200},
            seeds=(3, 8), minutes=None, trial_minutes=1440.0, trial_memory=64.0,
        ),
    },
    plug="a function (pairs, points, critiques, general, seed, **settings) -> rows with messages, as judge_mixture",
)  # fmt: skip


class World:
    """Prompts that ask for words on a topic, and answers of three words, some of them errors that can be counted."""

    def __init__(self, rng: "np.random.Generator") -> None:
        self.rng = rng
        self.seen: set[str] = set()

    def one(self, words: Sequence[str]) -> str:
        """One of them."""
        return words[int(self.rng.integers(len(words)))]

    def prompt(self) -> str:
        """A topic and three words that make the prompt one of a kind."""
        while True:
            prompt = " ".join([self.one(tuple(TOPICS)), *(self.one(PLAIN) for _ in range(3))])
            if prompt not in self.seen:
                self.seen.add(prompt)
                return prompt

    def answer(self, prompt: str, errors: int) -> str:
        """Three words on the topic, so many of them replaced by errors."""
        wrong = set(self.rng.permutation(3)[:errors].tolist())
        own = TOPICS[prompt.split()[0]]
        return " ".join(self.one(ERRORS if place in wrong else own) for place in range(3))

    def pair(self, decisive: bool = True) -> "Pair":
        """Two answers, the one with fewer errors better, and much better by two."""
        from counterproof.judging.pairwise import Pair

        prompt = self.prompt()
        a, b = (int(each) for each in (self.rng.permutation(4)[:2] if decisive else self.rng.integers(4, size=2)))
        return Pair(
            prompt=prompt,
            answer_a=self.answer(prompt, a),
            answer_b=self.answer(prompt, b),
            winner="tie" if a == b else "model_a" if a < b else "model_b",
            strength=2 if abs(a - b) > 1 else 1,
            totals=(10 - 3 * a, 10 - 3 * b),
        )

    def point(self) -> "Point":
        """An answer scored by its errors."""
        from counterproof.judging.compass_judger import Point

        prompt, errors = self.prompt(), int(self.rng.integers(4))
        score = 10 - 3 * errors
        return Point(prompt=prompt, answer=self.answer(prompt, errors), scores={"topic": score}, total=score)

    def critique(self) -> "CritiquePoint":
        """An answer, the errors in it (or that it is fine), and words of the topic."""
        from counterproof.judging.compass_judger import CritiquePoint

        prompt, errors = self.prompt(), int(self.rng.integers(4))
        answer = self.answer(prompt, errors)
        own = TOPICS[prompt.split()[0]]
        wrong = [word for word in answer.split() if word in ERRORS]
        return CritiquePoint(
            prompt=prompt, answer=answer, comments=" ".join(wrong) if wrong else "fine", revision=" ".join(own[:3])
        )

    def general(self) -> list[dict[str, str]]:
        """Ordinary text: a line that begins with a topic goes on with its words, of which each calls for the next."""
        prompt = self.prompt()
        own = TOPICS[prompt.split()[0]]
        at, words = int(self.rng.integers(4)), []
        for _ in range(int(self.rng.integers(3, 9))):
            words.append(own[at])
            at = (at + 1) % 4 if self.rng.random() < 0.8 else int(self.rng.integers(4))
        return [{"role": "user", "content": f"{prompt} :"}, {"role": "assistant", "content": " ".join(words)}]


def bare_templates() -> "dict[str, PromptTemplate]":
    """The judge's questions in a handful of words, for a model that knows few."""
    from counterproof.judging.templates import PromptTemplate

    def template(name: str, text: str) -> PromptTemplate:
        return PromptTemplate(name, text, reminder="again")

    found = {
        f"compass-{form}": template(form, f"{form} {{{{prompt}}}} | {{{{answer_a}}}} | {{{{answer_b}}}} =")
        for form in ("letter", *FORMS)
    }
    found["compass-point"] = template("point", "point {{prompt}} | {{answer}} =")
    found["compass-critique"] = template("critique", "critique {{prompt}} | {{answer}} =")
    return found


def run_training(arm: Arm, trial: Trial) -> Mapping[str, float]:
    """Train a judge on the arm's rows, at the same steps and tokens for every arm, and ask it in every format."""
    import math

    settings = trial.settings
    tiny = settings["model"] == "tiny"
    world = World(trial.rng("world"))
    held_out = [world.pair() for _ in range(settings["judged"])]
    points = [world.point() for _ in range(settings["judged"])]
    critiques = [world.critique() for _ in range(settings["judged"])]
    texts = [world.general() for _ in range(4 * settings["judged"])]
    items = settings["items"]
    supply: dict[str, Any] = {
        "pairs": [world.pair(decisive=at % 8 != 0) for at in range(items + items // 4)],
        "points": [world.point() for _ in range(items // 10)],
        "critiques": [world.critique() for _ in range(items // 10)],
        "general": [world.general() for _ in range(items // 4)],
    }
    templates = bare_templates() if tiny else None
    seed = int(trial.rng("mixture").integers(2**31))
    rows = arm.load()(**supply, templates=templates, size=items, seed=seed, **arm.settings)
    with trial.off_clock():
        language = tiny_start(trial) if tiny else language_start(trial)
    losses = train(language, rows, trial, trial.rng("order"))
    if not all(map(math.isfinite, losses)):
        raise Diverged("the training loss is no number")
    with trial.off_clock():
        return measure(language, templates, held_out, points, critiques, texts, settings)


def tiny_start(trial: Trial) -> "Language":
    """A tiny Llama that has read ordinary text only, with a vocabulary that has every word of every format."""
    from counterproof.judging.judge_training import judge_mixture
    from counterproof.language.tiny import pretrain, tiny_tokenizer

    world = World(trial.rng("start"))
    every = judge_mixture(
        pairs=[world.pair(decisive=False) for _ in range(800)],
        points=[world.point() for _ in range(200)],
        critiques=[world.critique() for _ in range(200)],
        ratio=(3, 1, 0),
        templates=bare_templates(),
    )
    texts = [[message["content"] for message in world.general()] for _ in range(2000)]
    words = {word for row in every for message in row["messages"] for word in message["content"].split()}
    tokenizer = tiny_tokenizer(sorted(words | set(TOPICS) | set(PLAIN) | set(ERRORS) | {":", "again", "fine"}))
    tokenizer.chat_template = (
        "<s> {% for m in messages %}{{ m.content }} {% if m.role == 'assistant' and not loop.last %}</s> {% endif %}"
        "{% endfor %}{% if not add_generation_prompt %}</s>{% endif %}"
    )
    settings = trial.settings
    return pretrain(
        [f"{prompt} {text}" for prompt, text in texts],
        tokenizer,
        seed=int(trial.rng("weights").integers(2**31)),
        steps=settings["start_steps"],
        hidden=settings["hidden"],
        layers=settings["layers"],
    )


def language_start(trial: Trial) -> "Language":
    """SmolLM2 with a fresh adapter."""
    import torch
    from peft import LoraConfig, get_peft_model

    from counterproof.language.models import Language, load

    model, tokenizer = load(trial.settings["model"], device=trial.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(trial.rng("weights").integers(2**31)))
        adapted: Any = get_peft_model(
            model,
            LoraConfig(r=trial.settings["lora"], lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
    return Language(adapted, tokenizer)


def batches_of(
    rows: Sequence[tuple[list[int], list[int]]], order: "np.random.Generator", tokens: int
) -> Iterator[list[tuple[list[int], list[int]]]]:
    """Without end: rows in random order, epoch after epoch, as many in a batch as have about so many tokens.

    What a batch has too many or too few is made up for by the next, so that the total is the same for all data.
    """
    taken: list[tuple[list[int], list[int]]] = []
    held = 0
    while True:
        for index in order.permutation(len(rows)):
            taken.append(rows[index])
            held += len(rows[index][0])
            if held >= tokens:
                yield taken
                taken, held = [], held - tokens


def train(
    language: "Language", rows: Sequence[Mapping[str, Any]], trial: Trial, order: "np.random.Generator"
) -> list[float]:
    """Next-token loss on the replies; AdamW with warm-up and cosine decay."""
    import math

    import torch

    from counterproof.judging.judge_training import reply_labels

    settings = trial.settings
    model: Any = language.model
    pad = language.tokenizer.pad_token_id
    encoded = [reply_labels(language.tokenizer, row["messages"]) for row in rows]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings["learning_rate"], weight_decay=0.01)
    steps = settings["steps"]
    warm = max(1, steps // 20)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    losses = []
    model.train()
    for step, batch in zip(range(steps), batches_of(encoded, order, settings["tokens"]), strict=False):
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([own + [pad] * (width - len(own)) for own, _ in batch], device=trial.device)
        labels = torch.tensor([own + [-100] * (width - len(own)) for _, own in batch], device=trial.device)
        mask = (torch.arange(width) < torch.tensor([[len(own)] for own, _ in batch])).to(trial.device)
        loss = model(input_ids=ids, attention_mask=mask.long(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rate.step()
        losses.append(float(loss.detach()))
        if (step + 1) % max(1, steps // 20) == 0:
            trial.log(0.1 + 0.7 * (step + 1) / steps, step=step + 1, loss=losses[-1])
    model.eval()
    return losses


def measure(
    language: "Language",
    templates: "Mapping[str, PromptTemplate] | None",
    pairs: "Sequence[Pair]",
    points: "Sequence[Point]",
    critiques: "Sequence[CritiquePoint]",
    texts: Sequence[Sequence[Mapping[str, str]]],
    settings: Mapping[str, Any],
) -> dict[str, float]:
    """What the trained judge says in each format, and how well it still predicts ordinary text."""
    import math

    import numpy as np

    from counterproof.judging.compass_judger import Judge
    from counterproof.language.scoring import log_probs

    judge = Judge(language, templates=templates, max_tokens=settings["max_tokens"], jobs=settings["jobs"])
    prompts, a, b = zip(*((pair.prompt, pair.answer_a, pair.answer_b) for pair in pairs), strict=True)
    readable: dict[str, float] = {}
    right: dict[str, float] = {}
    consistency = 0.0
    for form in ("letter", *FORMS):
        both = [judge.compare_all(prompts, *sides, both_orders=False, form=form) for sides in ((a, b), (b, a))]
        own = [[verdict.margin for verdict in order] for order in both]
        truth = [1 if pair.winner == "model_a" else -1 for pair in pairs]
        hits = [np.sign(m or 0) == t for m, t in zip(own[0], truth, strict=True)]
        hits += [np.sign(m or 0) == -t for m, t in zip(own[1], truth, strict=True)]
        readable[form] = float(np.mean([m is not None for order in own for m in order]))
        right[form] = float(np.mean(hits))
        if form == "letter":
            consistency = float(
                np.mean([None not in (x, y) and np.sign(x or 0) == -np.sign(y or 0) for x, y in zip(*own, strict=True)])
            )
    scored = judge.score_all([p.prompt for p in points], [p.answer for p in points], rubric=["topic"])
    readable["point"] = float(np.mean([each.total is not None for each in scored]))
    right["point"] = float(np.mean([each.total == point.total for each, point in zip(scored, points, strict=True)]))
    said = judge.critique_all([each.prompt for each in critiques], [each.answer for each in critiques])
    readable["critique"] = float(np.mean([each.comments is not None for each in said]))
    right["critique"] = float(
        np.mean([each.comments == item.comments for each, item in zip(said, critiques, strict=True)])
    )
    others = [*FORMS, "point", "critique"]
    scores = log_probs(language, [list(text[:-1]) for text in texts], [[list(text[-1:])] for text in texts])  # type: ignore[arg-type]
    tokens = sum(len(own[0].tokens) for own in scores)
    nats = -sum(own[0].total for own in scores) / tokens
    return {
        "formats_readable": float(np.mean([readable[form] for form in others])),
        "formats_accuracy": float(np.mean([right[form] for form in others])),
        "letter_accuracy": right["letter"],
        "letter_consistency": consistency,
        "letter_readable": readable["letter"],
        "perplexity": math.exp(min(nats, 50.0)),
    }


MIX = Arm("mixture", "counterproof.judging.compass_judger:judge_mixture", {"ratio": [1, 3, 1]})
REWARD_ONLY = Arm("reward-only", "counterproof.judging.compass_judger:judge_mixture", {"ratio": [0, 1, 0]})

ARMS: dict[str, tuple[Arm, ...]] = {JUDGE_RANKING.name: (BOTH_RIGHT,)}

ABLATION = "the report ablates critique : reward : general and settles on about 1:3:1 (unverified); no figure found"
LLMBAR = "LLMBar, 65 cells, 50 random halves (measured for this project, not by the paper): "


def _training(
    name: str, says: str, metric: str, *, baseline: Arm = REWARD_ONLY, method: Arm = MIX, **how: Any
) -> Claim:
    return Claim(
        paper="compass-judger",
        name=name,
        says=says,
        task=JUDGE_TRAINING,
        baseline=baseline,
        method=method,
        metric=metric,
        better=JUDGE_TRAINING.metrics[metric].better,
        reported=ABLATION,
        **how,
    )


def _ranking(name: str, says: str, metric: str, baseline: Arm, method: Arm, reported: str) -> Claim:
    return Claim(
        paper="compass-judger",
        name=name,
        says=says,
        task=JUDGE_RANKING,
        baseline=baseline,
        method=method,
        metric=metric,
        better="higher",
        smallest=0.05,
        reported=LLMBAR + reported,
    )


# `smallest`: a tenth of the replies readable, 5 points of accuracy, a tenth of the perplexity, 0.05 of a correlation.
CLAIMS = (
    _training(
        "main",
        "trained on critique, reward and general data 1:3:1, not on reward data alone, more replies are readable",
        "formats_readable",
        smallest=0.1,
    ),
    _training(
        "formats-accuracy",
        "trained on critique, reward and general data 1:3:1, not on reward alone, more formatted verdicts are right",
        "formats_accuracy",
        smallest=0.05,
    ),
    _training(
        "reward-only-letter",
        "trained on reward data alone, five items for every three of the mixture, more verdicts by letter are right",
        "letter_accuracy",
        baseline=MIX,
        method=REWARD_ONLY,
        smallest=0.05,
    ),
    _training(
        "perplexity",
        "trained on critique, reward and general data 1:3:1, not on reward alone, ordinary text is predicted better",
        "perplexity",
        effect="ratio",
        smallest=0.9,
    ),
    _ranking(
        "accuracy-ranks",
        "a judge's accuracy on half of the items, not its consistency when answers change places, ranks judges better",
        "spearman",
        CONSISTENCY,
        ACCURACY,
        "Spearman .968 by accuracy, .419 by consistency",
    ),
    _ranking(
        "both-orders",
        "accuracy over both orders, not the share of pairs right in both, ranks judges better on held-out items",
        "spearman",
        BOTH_RIGHT,
        ACCURACY,
        "Spearman .968 by accuracy, .685 by pairs right in both orders",
    ),
    _ranking(
        "categories",
        "accuracy on items of all kinds, not on as many easy ones, ranks judges better on adversarial items",
        "spearman_hard",
        EASY,
        MIXED_ITEMS,
        "accuracy on natural items ranks judges on adversarial ones with Spearman .524",
    ),
)
