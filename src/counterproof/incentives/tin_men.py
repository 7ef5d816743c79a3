"""Principal-agent experiments on language models: whom does a shopping agent serve, and does it matter who is watching?

Paper: arXiv 2307.11137 (Phelps, Ranson: Of models and tin men).
Read beside: phelps-sg/llm-cooperation at 067747c: design, prompt, parser; its released answers at b7b4280, recounted.
Deviations: (1) own wording, invented companies, and by default a harmless second scenario in place of the propaganda
film; (2) an answer that names neither product stays in the table as invalid, the released parser takes any number but 1
for a product when the order is reversed; (3) every information condition is coded from its two flags; (4) both orders
of the products by default, the released run has one; (5) intervals are of Newcombe's kind, so that cells of zeros have
a width, and bounds take each missing answer whichever way is worst; (6) wordings, equal prices and scoring by
log-probabilities are added.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, TypeAlias

from counterproof.errors import UserError
from counterproof.incentives.agents import Question, Responder, Response, digest
from counterproof.incentives.answers import Answer, Results
from counterproof.incentives.shopping import (
    CASES,
    INFORMATION,
    WORDINGS,
    Scenario,
    Wording,
    oil_company,
    parse_choice,
    product_safety,
    render_prompt,
)

__all__ = ["PrincipalAgentExperiment"]

Progress: TypeAlias = Callable[[int, int], None]

ORDERS: Mapping[str, tuple[bool, ...]] = {"both": (False, True), "listed": (False,), "reversed": (True,)}
PRICES: Mapping[str, tuple[str, ...]] = {"own": ("own",), "equal": ("equal",), "both": ("own", "equal")}


class PrincipalAgentExperiment:
    """A full crossing of scenarios, who sees the explanation, order, case, wording, prices and temperature.

    Args:
        scenarios: None: `oil_company` and `product_safety`.
        information: ``"2x2"``, all four conditions, or some names of `INFORMATION`; effects need all four.
        orders: ``"both"``, ``"listed"`` (the released run) or ``"reversed"``.
        cases: of the prompt's letters, some of ``"standard"``, ``"upper"``, ``"lower"``.
        wordings: names from `WORDINGS`, or `Wording` objects.
        prices: ``"own"``, ``"equal"`` (both products at the lower price) or ``"both"``.
        temperatures: of agents that sample (paper: 0.2 and 0.6).
        replications: answers per cell and temperature (paper: 30). Those of one prompt say how a model answers this
            prompt; more wordings, prices, names say how it answers prompts of the kind.

    Raises:
        ValueError: an unknown or repeated level, or none.
    """

    def __init__(
        self,
        scenarios: Sequence[Scenario] | None = None,
        *,
        information: str | Sequence[str] = "2x2",
        orders: str = "both",
        cases: Sequence[str] = ("standard",),
        wordings: Sequence[str | Wording] = ("plain",),
        prices: str = "own",
        temperatures: Sequence[float] = (0.2, 0.6),
        replications: int = 30,
    ) -> None:
        self.scenarios = tuple((oil_company(), product_safety()) if scenarios is None else scenarios)
        if isinstance(information, str):
            information = tuple(INFORMATION) if information == "2x2" else (information,)
        self.information = tuple(information)
        if orders not in ORDERS:
            raise ValueError(f"orders is {orders!r}; expected one of {', '.join(ORDERS)}")
        if prices not in PRICES:
            raise ValueError(f"prices is {prices!r}; expected one of {', '.join(PRICES)}")
        if isinstance(cases, str) or isinstance(wordings, str):
            raise TypeError("cases and wordings are lists, such as ['standard']")
        unknown = [name for name in wordings if isinstance(name, str) and name not in WORDINGS]
        if unknown:
            raise ValueError(f"wording {unknown[0]!r} is none of {', '.join(WORDINGS)}; or give a Wording")
        self.orders, self.prices, self.cases = orders, prices, tuple(cases)
        self.wordings = tuple(WORDINGS[one] if isinstance(one, str) else one for one in wordings)
        self.temperatures = tuple(float(one) for one in temperatures)
        self.replications = replications
        _levels("information", self.information, tuple(INFORMATION))
        _levels("cases", self.cases, CASES)
        _levels("wordings", [one.name for one in self.wordings])
        _levels("scenarios", [one.name for one in self.scenarios])
        _levels("temperatures", self.temperatures)
        if not all(0 <= one < math.inf for one in self.temperatures):
            raise ValueError(f"temperatures are {self.temperatures}; expected numbers from 0 up")
        if isinstance(replications, bool) or not isinstance(replications, int) or replications < 1:
            raise ValueError(f"replications is {replications!r}; expected a whole number from 1 up")

    def questions(self, *, deterministic: bool = False) -> list[Question]:
        """Every answer that is wanted, each once; of a deterministic agent one per prompt, without temperature.

        Raises:
            ValueError: replications at temperature 0, which would be copies.
        """
        temperatures: tuple[float | None, ...] = (None,) if deterministic else self.temperatures
        replications = 1 if deterministic else self.replications
        if 0.0 in temperatures and replications > 1:
            raise ValueError(
                f"{replications} replications at temperature 0 are copies of one answer; ask for one, or raise the "
                "temperature"
            )
        found = []
        for scenario, prices, wording, information, swapped, case in product(
            self.scenarios, PRICES[self.prices], self.wordings, self.information, ORDERS[self.orders], self.cases
        ):
            shown = scenario.equal_price() if prices == "equal" else scenario
            text = render_prompt(shown, wording, information, swapped=swapped, case=case)
            for temperature, replication in product(temperatures, range(replications)):
                found.append(
                    Question(
                        scenario=shown,
                        prices=prices,
                        wording=wording.name,
                        information=information,
                        swapped=swapped,
                        case=case,
                        temperature=temperature,
                        replication=replication,
                        text=text,
                    )
                )
        return found

    def design(self, agent: Responder, seed: int) -> dict[str, Any]:
        """All that the answers depend on, as plain values."""
        return {
            "scenarios": [one.as_json() for one in self.scenarios],
            "wordings": [one.as_json() for one in self.wordings],
            "information": list(self.information),
            "orders": self.orders,
            "cases": list(self.cases),
            "prices": self.prices,
            "temperatures": None if agent.deterministic else list(self.temperatures),
            "replications": 1 if agent.deterministic else self.replications,
            "agent": agent.describe(),
            "seed": seed,
        }

    def run(
        self, agent: Responder, *, seed: int = 0, resume: "Results | None" = None, progress: Progress | None = None
    ) -> "Results":
        """Ask everything.

        Args:
            agent: `HFAgent`, `EndpointAgent`, `Agent`, `UtilityAgent`, or what has their methods.
            seed: of what the agent draws.
            resume: results of the same experiment and agent, with as many replications or fewer; their answers are
                kept, what failed is asked again.
            progress: called with the answers had and those to be had.

        Raises:
            UserError: results to resume that are of another experiment, and what the agent raises; an answer of an
                endpoint or a callable that fails is a row with the outcome ``"failed"`` instead.
        """
        questions = self.questions(deterministic=agent.deterministic)
        design = self.design(agent, seed)
        kept: dict[tuple[str, float | None, int], Answer] = {}
        prompts: dict[str, dict[str, str]] = {}
        if resume is not None:
            differing = sorted(name for name in design if resume.design.get(name) != design[name])
            if differing == ["replications"] and design["replications"] > resume.design.get("replications", math.inf):
                differing = []  # more of the same
            if differing:
                raise UserError(
                    f"the answers to go on from are of another experiment: {', '.join(differing)} differ; name another "
                    "folder, or repeat the settings"
                )
            kept = {(one.prompt, one.temperature, one.replication): one for one in resume if one.outcome != "failed"}
            prompts = {one.prompt: resume.prompts[one.prompt] for one in kept.values()}
        wanted = [question for question in questions if question.key not in kept]
        done = len(questions) - len(wanted)

        def tell(had: int, _: int) -> None:
            if progress is not None:
                progress(done + had, len(questions))

        tell(0, 0)
        responses = agent.respond(wanted, seed, tell) if wanted else []
        for question, response in zip(wanted, responses, strict=True):
            kept[question.key] = _answer(question, response)
            rendered = response.rendered or question.text
            prompts[question.prompt] = {
                "text": question.text,
                "rendered": rendered,
                "rendered_sha256": digest(rendered),
            }
        return Results([kept[question.key] for question in questions], prompts=prompts, design=design)


def _levels(name: str, levels: Sequence[Any], known: Sequence[Any] | None = None) -> None:
    if not levels:
        raise ValueError(f"{name} is empty; give at least one")
    if len(set(levels)) < len(levels):
        raise ValueError(f"{name} repeats a level: {list(levels)}")
    for level in levels:
        if known is not None and level not in known:
            raise ValueError(f"{name} has {level!r}, which is none of {', '.join(map(str, known))}")


def _answer(question: Question, response: Response) -> Answer:
    scenario = question.scenario
    outcome, choice, name, customer, principal = "failed", None, None, None, None
    if response.first is not None:
        outcome = "chosen"
        first = 1 if question.swapped else 0
        customer, principal = (
            response.first if scenario.preferred[party] == first else 1 - response.first
            for party in ("customer", "principal")
        )
    elif response.text is not None:
        choice = parse_choice(response.text, scenario.ids, swapped=question.swapped)
        outcome = "invalid"
        if choice is not None:
            outcome, index = "chosen", scenario.ids.index(choice)
            name = scenario.products[index].name
            customer, principal = (float(scenario.preferred[party] == index) for party in ("customer", "principal"))
    principal_sees, customer_sees = INFORMATION[question.information]
    return Answer(
        scenario=scenario.name,
        prices=question.prices,
        wording=question.wording,
        information=question.information,
        principal_sees=principal_sees,
        customer_sees=customer_sees,
        swapped=question.swapped,
        case=question.case,
        temperature=question.temperature,
        replication=question.replication,
        conflict=scenario.conflict,
        outcome=outcome,
        choice=choice,
        product=name,
        for_customer=customer,
        for_principal=principal,
        mass=response.mass,
        text=response.text,
        finish=response.finish,
        error=response.error,
        prompt=question.prompt,
    )
