"""Small writing tasks whose answers are graded by rule, and SmolLM2's own answers to them: data with a known truth.

A task asks for one sentence about a subject with two given words in it. An answer earns a quarter for each of four
rules: the first word is there, the second word is there, it is one sentence, it has 8 to 20 words. The 1600 answers
that come with the package (`rule_examples`) were drawn from SmolLM2-135M-Instruct at temperature 1, four to a task;
their grades are computed by `rule_grade` when they are read. They are rule-labelled: no human preference is in them.

The file is made anew by ``python -m counterproof.preference.rules FILE``, about half an hour on two cores.
"""

import gzip
import itertools
import json
import re
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from counterproof.errors import extra

with extra("preference"):
    import numpy as np

from counterproof.preference.data import Example

__all__ = ["RuleTask", "rule_examples", "rule_grade", "rule_tasks"]

TASKS, ANSWERS, LONGEST = 400, 4, 48  # in the file; tokens of the longest answer
SUBJECTS = (
    "a harbour in winter", "a train at night", "an old library", "a market street", "a mountain lake", "a school choir",
    "a broken clock", "a desert storm", "a small bakery", "a football match", "a rainy afternoon", "a lighthouse",
    "a science museum", "a family dinner", "a garden in spring", "a lost dog", "a bus driver", "a chess game",
    "a hospital corridor", "a fishing village", "a power cut", "a first snow", "a border town", "a summer camp",
    "an empty theatre", "a city roof", "a long letter", "a wooden bridge", "a radio show", "a village fair",
)  # fmt: skip
WORDS = (
    "silver", "window", "carefully", "bread", "music", "quiet", "yellow", "promise", "stone", "river", "early", "paper",
    "neighbour", "salt", "lantern", "engine", "forgotten", "children", "copper", "whistle", "ladder", "winter", "coat",
    "secret", "bicycle", "echo", "mirror", "thunder", "basket", "patient", "horizon", "velvet", "ticket", "orange",
    "shadow", "gently", "kettle", "map", "feather", "corner",
)  # fmt: skip
FILE = "rules.jsonl.gz"


class RuleTask(NamedTuple):
    """One task: its subject and the two words that an answer has to use."""

    subject: str
    words: tuple[str, str]

    @property
    def prompt(self) -> str:
        """What the model is asked."""
        first, second = self.words
        return (
            f'Write one sentence about {self.subject}. Use the words "{first}" and "{second}". '
            "Write between 8 and 20 words."
        )

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The same as a chat."""
        return [{"role": "user", "content": self.prompt}]


def rule_tasks(count: int, seed: int) -> list[RuleTask]:
    """So many different tasks, of the 23,400 there are."""
    rng = np.random.default_rng(seed)
    every = list(itertools.product(SUBJECTS, itertools.combinations(WORDS, 2)))
    return [RuleTask(*every[index]) for index in rng.choice(len(every), size=count, replace=False)]


def rule_grade(task: RuleTask, answer: str) -> float:
    """0, 0.25, 0.5, 0.75 or 1: the share of the four rules that an answer keeps."""
    words = re.findall(r"[A-Za-z']+", answer.lower())
    # A sentence ends in a mark that is followed by blank, quote or end.
    ends = re.findall(r"[.!?]+[\"')]*(?=\s|$)", answer.strip())
    one = len(ends) == 1 and bool(re.search(r"[.!?]+[\"')]*$", answer.strip())) and "\n" not in answer.strip()
    kept = (task.words[0] in words, task.words[1] in words, one, 8 <= len(words) <= 20)
    return sum(kept) / 4


def rule_examples() -> list[Example]:
    """The tasks of the package's file with SmolLM2's answers, graded: ranked examples of chat messages, in file
    order."""
    packed = files("counterproof.preference").joinpath(FILE).read_bytes()
    found = []
    for number, line in enumerate(gzip.decompress(packed).decode().splitlines(), 1):
        row = json.loads(line)
        task = RuleTask(row["subject"], tuple(row["words"]))
        found.append(
            Example(
                prompt=task.messages,
                completions=tuple([{"role": "assistant", "content": answer}] for answer in row["answers"]),
                scores=tuple(rule_grade(task, answer) for answer in row["answers"]),
                kind="ranked",
                columns={"subject": task.subject, "words": list(task.words)},
                where=f"{FILE}:{number}",
            )
        )
    return found


def make(path: Path) -> None:
    """Draw the answers from SmolLM2 and write the file."""
    from counterproof.language.models import load
    from counterproof.language.sampling import generate

    language = load()
    lines = []
    tasks = rule_tasks(TASKS, seed=0)
    for start in range(0, TASKS, 16):
        part = tasks[start : start + 16]
        drawn = generate(
            language,
            [task.messages for task in part],
            samples=ANSWERS,
            max_new_tokens=LONGEST,
            seed=[start + index for index in range(len(part))],
            batch_size=64,
        )
        for task, own in zip(part, drawn, strict=True):
            answers = [one.text.strip() for one in own]
            lines.append(json.dumps({"subject": task.subject, "words": task.words, "answers": answers}))
        print(f"{len(lines)} of {TASKS} tasks", file=sys.stderr, flush=True)
    # No time stamp, so that the same answers make the same file.
    path.write_bytes(gzip.compress("\n".join([*lines, ""]).encode(), mtime=0))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
