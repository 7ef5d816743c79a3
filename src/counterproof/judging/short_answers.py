"""Short answers whose quality is known by construction: ten questions, statements right and wrong, students, peers.

Written for this package. An answer is put together, criterion by criterion, from a right statement in one of two
wordings, a wrong one, or a sentence that says nothing, in any order; its points are those of the right statements.
Simulated courses without text are here too: true points, peers with their severity, halo and noise, and a
grader that recognises each criterion with a known accuracy.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["QUESTIONS", "Course", "Topic", "simulate_course", "student_answers"]

Floats = NDArray[np.float64]
POINTS = (2, 1, 1, 1)
MAXIMUM = sum(POINTS)
# What a student does with a criterion: (right, wrong, nothing), by how well the student knows the matter.
KNOWS = {"well": (0.8, 0.1, 0.1), "half": (0.45, 0.25, 0.3), "little": (0.15, 0.45, 0.4)}
FILLERS = (
    "This is an interesting question that comes up quite often.",
    "We talked about this at length in the second week.",
    "I think that this is more or less how it works.",
    "There are many more things that one could say here.",
    "I hope that I remember all of this correctly from class.",
    "The book has a whole chapter about this very subject.",
)


@dataclass(frozen=True)
class Topic:
    """A question, the instructor's answer, and per criterion (2, 1, 1 and 1 points) what a student may say.

    Attributes:
        criteria: what is asked for, two right statements, a wrong one.
    """

    question: str
    answer: str
    criteria: tuple[tuple[str, str, str, str], ...]


QUESTIONS: tuple[Topic, ...] = (
    Topic(
        "Why does the Earth have seasons?",
        "The Earth's axis is tilted against its orbit. The half that leans towards the Sun gets more direct light and "
        "longer days. North and south have opposite seasons. The distance to the Sun is not the cause.",
        (
            (
                "names the tilt of the axis as the cause",
                "It is because the axis of the Earth is tilted.",
                "Our planet leans to one side as it goes round, and that makes the seasons.",
                "It is because the Earth spins faster in summer.",
            ),
            (
                "explains warmth by direct light or longer days",
                "In summer the sunlight falls more steeply and the days are longer.",
                "The part that leans to the Sun is lit more directly, so it gets warm.",
                "In summer the Sun itself burns hotter.",
            ),
            (
                "says that the hemispheres have opposite seasons",
                "When it is winter in the north it is summer in the south.",
                "Australia has its summer in December while Europe has winter.",
                "All countries have summer at the same time.",
            ),
            (
                "says that distance to the Sun is not the cause",
                "How far we are from the Sun does not matter for this.",
                "The Earth is even a little closer to the Sun in January, so distance is not the reason.",
                "We have summer when the Earth is closest to the Sun.",
            ),
        ),
    ),
    Topic(
        "What causes the phases of the Moon?",
        "The Sun always lights one half of the Moon. As the Moon goes round the Earth we see different parts of that "
        "half. A cycle takes about a month. The shadow of the Earth plays no part in it.",
        (
            (
                "says that we see changing parts of the lit half",
                "We see more or less of the side that is lit, depending on where the Moon stands.",
                "The share of the bright half that faces us keeps changing.",
                "Clouds on the Moon cover parts of it.",
            ),
            (
                "says that the Moon orbits the Earth",
                "The Moon travels around the Earth.",
                "It happens because the Moon circles our planet.",
                "The Moon stands still and the Sun moves around it.",
            ),
            (
                "says that a cycle takes about a month",
                "From one full moon to the next it takes about four weeks.",
                "The whole cycle lasts roughly a month.",
                "The whole cycle takes one year.",
            ),
            (
                "says that the Earth's shadow is not the cause",
                "The shadow of the Earth has nothing to do with it; that would be an eclipse.",
                "It is not our shadow that makes the phases.",
                "The Earth throws its shadow on the Moon and hides a part of it.",
            ),
        ),
    ),
    Topic(
        "How do plants make their food?",
        "In photosynthesis plants use the energy of light to turn carbon dioxide and water into sugar. Chlorophyll in "
        "the leaves takes up the light. Oxygen is given off.",
        (
            (
                "says that light energy is turned into sugar",
                "They use the energy of sunlight to build sugar.",
                "Light drives the making of glucose in the plant.",
                "They suck ready-made sugar out of the soil.",
            ),
            (
                "names carbon dioxide and water as materials",
                "For this they need water and carbon dioxide from the air.",
                "The raw materials are carbon dioxide and water.",
                "The raw materials are oxygen and nitrogen.",
            ),
            (
                "names chlorophyll or the leaves' green parts",
                "The green chlorophyll in the leaves catches the light.",
                "Chlorophyll takes up the light.",
                "The roots catch the light.",
            ),
            (
                "says that oxygen is released",
                "Oxygen is given off on the way.",
                "As a by-product the plant releases oxygen.",
                "The plant gives off carbon dioxide while it does this.",
            ),
        ),
    ),
    Topic(
        "Why do prices usually rise when a good becomes scarce?",
        "When supply falls and demand stays, buyers compete for fewer units. At the old price more is wanted than is "
        "offered. The price rises until both are equal again. Higher prices also draw in new suppliers.",
        (
            (
                "says that supply falls short of demand",
                "There is less on offer than people want to buy at the old price.",
                "Supply shrinks while demand stays as it was, so there is a shortage.",
                "Scarce goods are wanted by nobody.",
            ),
            (
                "says that buyers compete",
                "Buyers bid against each other for the few units that are left.",
                "People outbid one another to get some.",
                "Buyers agree to share the units equally.",
            ),
            (
                "says that the price rises to a new balance",
                "The price goes up until supply and demand match again.",
                "A new equilibrium is found at a higher price.",
                "The price falls until everyone can afford it.",
            ),
            (
                "says that higher prices draw in suppliers",
                "Later the high price attracts more producers.",
                "Sellers then have a reason to produce more.",
                "Producers leave the market because they earn more.",
            ),
        ),
    ),
    Topic(
        "What is natural selection?",
        "Individuals of a species differ, and some differences are inherited. Those whose traits fit the environment "
        "leave more offspring. Over generations such traits become common. Nobody plans it.",
        (
            (
                "says that the better fitted leave more offspring",
                "Those that are suited to their surroundings survive and have more young.",
                "Individuals with useful traits reproduce more than the others.",
                "The strongest animal kills all the others.",
            ),
            (
                "says that individuals vary",
                "The members of a species are not all alike.",
                "There is variation within every population.",
                "All members of a species are identical.",
            ),
            (
                "says that traits are inherited",
                "The traits are passed on to the children.",
                "What helps is handed down through the genes.",
                "What an animal learns in its life is passed on in its blood.",
            ),
            (
                "says that it is not planned",
                "Nobody plans it, and it has no goal.",
                "It works without any intention.",
                "Animals decide to change because they need to.",
            ),
        ),
    ),
    Topic(
        "What does a stack do in a computer program?",
        "A stack keeps items so that the last one put in is the first one taken out. Push adds an item on top and pop "
        "removes it. Function calls are kept on one. When it grows too large it overflows.",
        (
            (
                "says last in, first out",
                "The item that went in last comes out first.",
                "It is a last in, first out structure.",
                "The item that went in first comes out first.",
            ),
            (
                "names push and pop",
                "You push an item on top and pop it off again.",
                "Its operations are push and pop.",
                "Its operations are sort and search.",
            ),
            (
                "names function calls as a use",
                "Programs keep their function calls on one.",
                "It remembers where to return to after a function is called.",
                "It is used to store files on the disk.",
            ),
            (
                "says that it can overflow",
                "If it grows too much you get a stack overflow.",
                "It has a limit, and beyond that it overflows.",
                "It can never run out of room.",
            ),
        ),
    ),
    Topic(
        "Why does ice float on water?",
        "Ice is less dense than liquid water. When water freezes its molecules form an open lattice held by hydrogen "
        "bonds, so it takes more room. Buoyancy carries what is less dense. Lakes therefore freeze from the top.",
        (
            (
                "says that ice is less dense",
                "Ice has a lower density than liquid water.",
                "The same volume of ice weighs less than that of water.",
                "Ice is heavier than water because it is solid.",
            ),
            (
                "says that water expands in an open lattice",
                "When it freezes the molecules form an open lattice and need more room.",
                "Water expands on freezing because its molecules are kept apart in crystals.",
                "The molecules move closer together when it freezes.",
            ),
            (
                "names hydrogen bonds",
                "Hydrogen bonds hold the molecules in this order.",
                "The reason is the hydrogen bonds between the molecules.",
                "The molecules are held by magnetic forces.",
            ),
            (
                "says that lakes freeze from the top",
                "That is why a lake freezes from above and fish survive below.",
                "So the ice forms at the surface of a lake.",
                "That is why lakes freeze from the bottom.",
            ),
        ),
    ),
    Topic(
        "How does a vaccine protect a person?",
        "A vaccine shows the immune system a harmless part or form of a germ. The body makes antibodies and memory "
        "cells. At a later infection it reacts faster. When many are protected the germ spreads less.",
        (
            (
                "says that memory is built for a later infection",
                "The immune system remembers the germ and reacts faster when the real one comes.",
                "Memory cells stay behind, so a later infection is fought at once.",
                "The vaccine kills all germs that are in the body.",
            ),
            (
                "says that a harmless form of the germ is given",
                "It contains a weakened germ or a harmless part of one.",
                "The body meets a form of the germ that cannot make it ill.",
                "It contains antibiotics.",
            ),
            (
                "names antibodies",
                "The body produces antibodies.",
                "Antibodies against the germ are formed.",
                "The body produces more red blood cells.",
            ),
            (
                "says that spreading in the population falls",
                "If many people are vaccinated the disease spreads less.",
                "It protects others too, since fewer people pass it on.",
                "It makes the germ spread faster among others.",
            ),
        ),
    ),
    Topic(
        "Why is the sky blue during the day?",
        "Molecules of the air scatter sunlight. Short wavelengths, such as blue, are scattered much more than long "
        "ones. Scattered blue light reaches us from all directions. At sunset the path is longer and red is left.",
        (
            (
                "says that blue is scattered more than red",
                "Blue light is scattered much more than red light.",
                "The short waves of blue are thrown about more strongly than the long ones.",
                "Red light is scattered more than blue light.",
            ),
            (
                "says that the air scatters sunlight",
                "The molecules of the air scatter the light of the Sun.",
                "Sunlight is deflected by the gases of the atmosphere.",
                "The sky mirrors the colour of the oceans.",
            ),
            (
                "says that blue comes from all directions",
                "So blue light reaches our eyes from everywhere above us.",
                "We then see blue wherever we look.",
                "The blue light comes from the stars behind.",
            ),
            (
                "explains the red of sunset",
                "In the evening the light has a longer way and mostly red remains.",
                "At sunset the blue is lost on the long path, so the sky looks red.",
                "At sunset the Sun is cooler, so it looks red.",
            ),
        ),
    ),
    Topic(
        "What is a controlled experiment?",
        "One variable is changed while all others are kept the same. A control group without the change serves for "
        "comparison. Subjects are assigned at random. So a difference can be put down to the variable.",
        (
            (
                "says that one variable is changed, the rest kept",
                "You change only one thing and keep everything else the same.",
                "A single variable is varied and all others are held constant.",
                "You change as many things as possible at once.",
            ),
            (
                "names a control group",
                "There is a control group that does not get the treatment.",
                "The results are compared with a group where nothing was changed.",
                "Everybody gets the same treatment.",
            ),
            (
                "names random assignment",
                "Who gets into which group is decided by chance.",
                "The subjects are assigned randomly.",
                "The healthiest subjects are put into the treatment group.",
            ),
            (
                "says that the cause can be identified",
                "A difference can then be blamed on that variable.",
                "This allows us to say what caused the effect.",
                "It only shows that things happen together.",
            ),
        ),
    ),
)


def rubric_lines(topic: Topic) -> str:
    """A topic's rubric, a line ``points | criterion`` each."""
    return "\n".join(f"{points} | {one[0]}" for points, one in zip(POINTS, topic.criteria, strict=True))


def student_answers(
    per_question: int, rng: np.random.Generator, *, questions: int = len(QUESTIONS)
) -> list[dict[str, Any]]:
    """Rows of a gradebook: answers of new students, their true points, and those a second grader would give.

    The second grader misses the truth by 0 (half of the time), 1 or 2 points, and is half a point too lenient on
    average; never outside 0 to 5.

    Args:
        per_question: students for each of the questions.
        rng: of everything.
        questions: how many of the ten are asked, drawn at random.

    Returns:
        Rows with every column that a gradebook may have; ``instructor_grade`` is the truth, ``peer_grade_1`` the second
        grader.
    """
    rows: list[dict[str, Any]] = []
    for number in sorted(rng.permutation(len(QUESTIONS))[:questions].tolist()):
        topic = QUESTIONS[number]
        for _ in range(per_question):
            knows = KNOWS[list(KNOWS)[int(rng.integers(len(KNOWS)))]]
            said: list[str] = []
            points = 0
            for worth, (_, *right, wrong) in zip(POINTS, topic.criteria, strict=True):
                does, wording = int(rng.choice(3, p=knows)), int(rng.integers(len(right)))
                if does == 0:
                    points += worth
                    said.append(right[wording])
                elif does == 1:
                    said.append(wrong)
            empty = len(POINTS) - len(said) + int(rng.integers(2))
            said += [FILLERS[place] for place in rng.permutation(len(FILLERS))[:empty]]
            off = int(rng.choice((-1, 0, 1, 2), p=(0.15, 0.5, 0.2, 0.15)))
            rows.append(
                {
                    "question_id": f"q{number + 1}",
                    "question": topic.question,
                    "max_points": MAXIMUM,
                    "instructor_answer": topic.answer,
                    "rubric": rubric_lines(topic),
                    "student_id": f"student {len(rows) + 1}",
                    "answer": " ".join(said[place] for place in rng.permutation(len(said))),
                    "instructor_grade": points,
                    "peer_grade_1": min(MAXIMUM, max(0, points + off)),
                }
            )
    return rows


@dataclass(frozen=True)
class Course:
    """A simulated course: questions x students answers of k criteria, each worth a point.

    Attributes:
        truth: (questions, students) true points; what the instructor gives.
        criteria: (questions, students, k) 0 or 1: which criteria an answer meets.
        peers: (questions, students, peers) what peers give.
    """

    truth: Floats
    criteria: NDArray[np.int64]
    peers: Floats

    def detected(self, accuracy: float, rng: np.random.Generator) -> Floats:
        """(questions, students): points of a grader that is right about each criterion with this probability."""
        wrong = rng.random(self.criteria.shape) >= accuracy
        points: Floats = np.where(wrong, 1 - self.criteria, self.criteria).sum(axis=-1).astype(np.float64)
        return points


def simulate_course(
    rng: np.random.Generator,
    *,
    questions: int = 12,
    students: int = 40,
    criteria: int = 8,
    peers: int = 3,
    severity: float = 0.75,
    noise: float = 1.0,
    halo: float = 0.5,
) -> Course:
    """A course whose truth is known.

    A student of ability a, uniform on 0 to 1, meets each criterion with probability a. A peer gives the truth plus a
    leniency of its own (normal, standard deviation `severity`), plus `halo` times how far the student's mean over all
    questions lies above the answer's truth, plus normal noise; rounded, and kept within 0 and the maximum.

    Args:
        rng: of everything.
        questions, students, criteria, peers: sizes; each answer has peers of its own.
        severity, noise: in points.
        halo: share, 0 to 1.
    """
    ability = rng.random((1, students, 1))
    met = (rng.random((questions, students, criteria)) < ability).astype(np.int64)
    truth = met.sum(axis=-1).astype(np.float64)
    shape = (questions, students, peers)
    pull = halo * (truth.mean(axis=0) - truth)
    given = truth[..., None] + pull[..., None] + severity * rng.normal(size=shape) + noise * rng.normal(size=shape)
    return Course(truth, met, np.clip(np.rint(given), 0, criteria))
