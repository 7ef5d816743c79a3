"""Problems of paying for information, from YAML files."""

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from counterproof.errors import UserError
from counterproof.incentives.information_game import Labels

__all__ = ["read_instance"]

ROUNDED = 1e-6  # by how much written probabilities may miss one
KEYS = ("states", "prior", "decisions", "utility", "max_payment", "outside", "view", "joint", "agents")


def read_instance(path: Path) -> dict[str, Any]:
    """The arguments of `InformationGame` from a file.

    ::

        states: [low, high]
        prior: [0.5, 0.5]                # one probability per state
        decisions: [sell, buy]
        utility: [[1, 0], [0, 1]]        # a row per decision, a number per state
        max_payment: 1
        outside: 0                       # may be left out: what an agent has that walks away
        view: [[0.7, 0.3], [0.3, 0.7]]   # may be left out: a row per state, what there is to see and how likely
        agents:
          ann:
            signals: [bad, good]
            efforts:
              shirk: {cost: 0, signals: [[0.5, 0.5], [0.5, 0.5]]}
              work: {cost: 0.05, signals: [[0.95, 0.05], [0.05, 0.95]]}
          bob: ...

    An effort's ``signals`` has a row per state, or per column of ``view`` if there is one: given that, agents' signals
    are independent; a view gives them an error in common. Any other dependence is written out, in place of ``prior``,
    ``view`` and the efforts' ``signals``::

        joint:                           # for every combination of efforts
          - efforts: [shirk, work]
            table: [[[0.1, 0.2], ...]]   # [ann's signal][bob's signal][state], probabilities

    Numbers may be fractions such as 1/3; probabilities that miss one by less than 1e-6 are scaled.

    Raises:
        UserError: one line that names file, key and remedy.
    """
    return _Reader(path).read()


class _Loader(yaml.SafeLoader):
    """YAML whose mappings have no key twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if isinstance(name, Hashable) and name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{name!r} is there twice", key.start_mark)
            seen.add(name if isinstance(name, Hashable) else id(key))
        return super().construct_mapping(node, deep)


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path = path

    def wrong(self, key: str, says: str) -> UserError:
        return UserError(f"{self.path}: {key}: {says}")

    def load(self) -> Mapping[str, Any]:
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UserError(f"{self.path}: there is no such file") from None
        except IsADirectoryError:
            raise UserError(f"{self.path} is a folder; name a YAML file in it") from None
        except UnicodeDecodeError:
            raise UserError(f"{self.path} is not UTF-8 text; give a YAML file") from None
        except OSError as problem:
            raise UserError(f"{self.path} cannot be read: {problem.strerror or problem}") from None
        try:
            found = yaml.load(text, Loader=_Loader)
        except yaml.MarkedYAMLError as problem:
            mark = problem.problem_mark
            line = f":{mark.line + 1}" if mark else ""
            raise UserError(f"{self.path}{line}: not valid YAML: {problem.problem}") from None
        except yaml.YAMLError as problem:
            raise UserError(f"{self.path}: not valid YAML: {str(problem).splitlines()[0]}") from None
        if not isinstance(found, dict):
            raise UserError(f"{self.path}: an instance is a mapping with the keys {', '.join(KEYS)}")
        return found

    def read(self) -> dict[str, Any]:
        given = self.load()
        self.known(given, "", KEYS)
        joint = "joint" in given
        for key in ("states", "decisions", "utility", "max_payment", "agents", *(() if joint else ("prior",))):
            if key not in given:
                raise self.wrong(key, "missing; every instance needs it")
        for key in ("prior", "view"):
            if joint and key in given:
                raise self.wrong(key, "is told by joint already; leave out one of them")
        states, decisions = self.names(given["states"], "states"), self.names(given["decisions"], "decisions")
        agents = given["agents"]
        if not isinstance(agents, dict) or not agents:
            raise self.wrong("agents", "expected a mapping from agents' names to their signals and efforts")
        utility = self.table(given["utility"], "utility", (len(decisions), len(states)), "a row per decision, by state")
        sources = len(states)
        view = np.eye(len(states))
        if "view" in given:
            rows = given["view"]
            if not isinstance(rows, list) or not rows or not isinstance(rows[0], list) or not rows[0]:
                raise self.wrong("view", "expected a row per state with a probability per thing to see")
            sources = len(rows[0])
            view = self.chances(rows, "view", (len(states), sources), "a row per state")
        efforts, signals, costs, tables = [], [], [], []
        for name, agent in agents.items():
            where = f"agents.{name}"
            if not isinstance(agent, dict):
                raise self.wrong(where, "expected a mapping with signals and efforts")
            self.known(agent, where, ("signals", "efforts"))
            for key in ("signals", "efforts"):
                if key not in agent:
                    raise self.wrong(f"{where}.{key}", "missing; every agent needs it")
            seen = self.names(agent["signals"], f"{where}.signals")
            own = agent["efforts"]
            if not isinstance(own, dict) or not own:
                raise self.wrong(f"{where}.efforts", "expected a mapping from efforts' names to cost and signals")
            cost, likely = [], []
            for effort, entry in own.items():
                at = f"{where}.efforts.{effort}"
                entry = {"cost": entry} if not isinstance(entry, dict) else entry
                self.known(entry, at, ("cost", "signals"))
                if "cost" not in entry:
                    raise self.wrong(f"{at}.cost", "missing; give 0 if it is free")
                cost.append(self.number(entry["cost"], f"{at}.cost"))
                if cost[-1] < 0:
                    raise self.wrong(f"{at}.cost", f"{cost[-1]:g} is below 0; an effort costs 0 or more")
                if joint == ("signals" in entry):
                    remedy = "is told by joint already; leave out one of them" if joint else "missing"
                    raise self.wrong(f"{at}.signals", f"{remedy}; expected a row per {self.row(given)}, by signal")
                if not joint:
                    says = f"a row per {self.row(given)}, by signal"
                    likely.append(self.chances(entry["signals"], f"{at}.signals", (sources, len(seen)), says))
            efforts.append(tuple(map(str, own)))
            signals.append(seen)
            costs.append(cost)
            tables.append(likely)
        cap = self.number(given["max_payment"], "max_payment")
        if cap <= 0:
            raise self.wrong("max_payment", f"{cap:g} is not above 0; nobody could be paid")
        outside = given.get("outside", 0)
        reserve: Any = (
            self.table(outside, "outside", (len(agents),), "one number, or one per agent")
            if isinstance(outside, list)
            else self.number(outside, "outside")
        )
        if joint:
            P = self.joint(given["joint"], efforts, signals, len(states))
        else:
            prior = self.chances(given["prior"], "prior", (len(states),), "a probability per state")
            P = _independent(prior, view, tables)
        names = Labels(tuple(map(str, agents)), tuple(efforts), tuple(signals), states, decisions)
        return {"P": P, "costs": costs, "utility": utility, "max_payment": cap, "outside": reserve, "labels": names}

    def row(self, given: Mapping[str, Any]) -> str:
        return "column of view" if "view" in given else "state"

    def known(self, given: Mapping[Any, Any], where: str, keys: Sequence[str]) -> None:
        for key in given:
            if key not in keys:
                raise self.wrong(f"{where}.{key}".lstrip("."), f"unknown key; known here: {', '.join(keys)}")

    def names(self, given: Any, key: str) -> tuple[str, ...]:
        if not isinstance(given, list) or not given or any(isinstance(name, dict | list) for name in given):
            raise self.wrong(key, f"expected a list of names, not {given!r}")
        found = tuple(map(str, given))
        if len(set(found)) < len(found):
            raise self.wrong(key, f"a name is there twice: {', '.join(found)}")
        return found

    def number(self, given: Any, key: str) -> float:
        value = math.nan
        if isinstance(given, int | float) and not isinstance(given, bool):
            value = float(given)
        elif isinstance(given, str):
            try:
                value = float(Fraction(given))
            except (ValueError, ZeroDivisionError, OverflowError):
                value = math.nan
        if not math.isfinite(value):
            raise self.wrong(key, f"expected a finite number or a fraction such as 1/3, not {given!r}")
        return value

    def table(self, given: Any, key: str, shape: tuple[int, ...], says: str) -> NDArray[np.float64]:
        if not shape:
            return np.array(self.number(given, key))
        if not isinstance(given, list) or len(given) != shape[0]:
            found = f"{len(given)} entries" if isinstance(given, list) else repr(given)
            raise self.wrong(key, f"expected {shape[0]} entries ({says}), not {found}")
        return np.stack([self.table(entry, f"{key}[{k}]", shape[1:], says) for k, entry in enumerate(given)])

    def chances(self, given: Any, key: str, shape: tuple[int, ...], says: str) -> NDArray[np.float64]:
        """A table whose rows are distributions."""
        table = self.table(given, key, shape, says)
        for k, row in enumerate(table.reshape(-1, shape[-1])):
            self.distribution(row, f"{key}[{k}]" if len(shape) > 1 else key)
        scaled: NDArray[np.float64] = table / table.sum(-1, keepdims=True)
        return scaled

    def distribution(self, values: NDArray[np.float64], key: str) -> None:
        if values.min() < 0:
            raise self.wrong(key, f"holds {values.min():g}; a probability is 0 or more")
        if abs(values.sum() - 1) > ROUNDED:
            raise self.wrong(key, f"sums to {values.sum():.6g}, not 1: give a distribution")

    def joint(
        self,
        given: Any,
        efforts: Sequence[Sequence[str]],
        signals: Sequence[Sequence[str]],
        states: int,
    ) -> dict[tuple[int, ...], NDArray[np.float64]]:
        if not isinstance(given, list):
            raise self.wrong("joint", "expected a list of entries with efforts and table")
        found: dict[tuple[int, ...], NDArray[np.float64]] = {}
        shape = (*map(len, signals), states)
        for k, entry in enumerate(given):
            where = f"joint[{k}]"
            if not isinstance(entry, dict) or set(entry) != {"efforts", "table"}:
                raise self.wrong(where, "expected a mapping with efforts and table")
            named = entry["efforts"]
            if not isinstance(named, list) or len(named) != len(efforts):
                raise self.wrong(f"{where}.efforts", f"expected an effort for each of {len(efforts)} agents")
            for i, name in enumerate(named):
                if str(name) not in efforts[i]:
                    known = ", ".join(efforts[i])
                    raise self.wrong(f"{where}.efforts[{i}]", f"{name!r} is none of that agent's efforts: {known}")
            profile = tuple(efforts[i].index(str(name)) for i, name in enumerate(named))
            if profile in found:
                raise self.wrong(f"{where}.efforts", "this combination is there twice")
            table = self.table(entry["table"], f"{where}.table", shape, "by signal of each agent, then state")
            self.distribution(table.ravel(), f"{where}.table")
            found[profile] = table / table.sum()
        for profile in itertools.product(*(range(len(own)) for own in efforts)):
            if profile not in found:
                named = ", ".join(efforts[i][b] for i, b in enumerate(profile))
                raise self.wrong("joint", f"lacks the efforts ({named}); every combination needs its table")
        return found


def _independent(
    prior: NDArray[np.float64], view: NDArray[np.float64], tables: Sequence[Sequence[NDArray[np.float64]]]
) -> dict[tuple[int, ...], NDArray[np.float64]]:
    """Signals independent given the view: tables (*signals, states) by profile."""
    found = {}
    for profile in itertools.product(*(range(len(own)) for own in tables)):
        signals = np.ones((len(view[0]), 1))
        for own, effort in zip(tables, profile):
            signals = (signals[:, :, None] * own[effort][:, None]).reshape(len(signals), -1)
        shape = [len(own[0][0]) for own in tables]
        found[profile] = (signals.T @ (prior[:, None] * view).T).reshape(*shape, len(prior))
    return found
