"""The answers of a principal-agent experiment: a tidy table, its files, and what it says."""

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from counterproof.errors import UserError, extra
from counterproof.files import replacing
from counterproof.incentives.shares import (
    CONTRASTS,
    By,
    LogisticFit,
    Method,
    fit_logistic,
    information_effects,
    permutation_test,
    permutation_test_of_values,
    wilson_interval,
)
from counterproof.incentives.shopping import INFORMATION

__all__ = ["Answer", "Effect", "Results"]

Floats = NDArray[np.float64]
Outcome = Literal["customer", "principal", "invalid"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A row of the table.

    Attributes:
        scenario, prices, wording, information, principal_sees, customer_sees, swapped, case, temperature, replication:
            the cell; swapped: the second product was listed first.
        conflict: the parties' first preferences differ.
        outcome: ``"chosen"``, ``"invalid"`` (answered, and bought neither product) or ``"failed"`` (not answered).
        choice: id of the product bought, in the products' own order.
        product: its name.
        for_customer, for_principal: 1 if it is the party's first preference, else 0; a probability where the choice was
            scored, not sampled. None unless chosen.
        mass: see `Response`.
        text, finish, error: see `Response`.
        prompt: SHA-256 of the prompt, whose text is in `Results.prompts`.
    """

    scenario: str
    prices: str
    wording: str
    information: str
    principal_sees: bool
    customer_sees: bool
    swapped: bool
    case: str
    temperature: float | None
    replication: int
    conflict: bool
    outcome: str
    choice: int | None
    product: str | None
    for_customer: float | None
    for_principal: float | None
    mass: float | None
    text: str | None
    finish: str
    error: str
    prompt: str


@dataclass(frozen=True, kw_only=True)
class Effect:
    """An information effect, with everything that qualifies it; NaN where it cannot be said.

    Attributes:
        by: see `information_effects`.
        outcome: whose answers are counted: ``"customer"`` and ``"principal"``: share of valid answers that buy this
            party's first preference; ``"invalid"``: share of answers that buy neither product.
        estimate, se, interval: from the valid answers, for these prompts; no interval where probabilities are exact.
        bounds, safe: bounds over all readings of invalid and failed answers, and an interval safe against them.
        all_zero, all_one: the estimate with all of them counted as 0, and as 1.
        over_prompts: interval of the mean over prompts like these, from how the effect varies between scenarios,
            prices, wordings and cases (Student's t); NaN with one of them only.
        p_value: of the permutation test, on valid answers.
        prompts: how many of them.
        valid, invalid, failed: answers.
        empty: cells without a valid answer.
    """

    by: str
    outcome: str
    estimate: float
    se: float
    interval: tuple[float, float]
    bounds: tuple[float, float]
    safe: tuple[float, float]
    all_zero: float
    all_one: float
    over_prompts: tuple[float, float]
    p_value: float
    prompts: int
    valid: int
    invalid: int
    failed: int
    empty: int


class Results(Sequence[Answer]):
    """The answers of a run, one row each.

    Args:
        answers: the rows.
        prompts: by SHA-256 of a prompt its text, what the model was given, and that one's hash.
        design: what the answers depend on.
    """

    def __init__(
        self,
        answers: Sequence[Answer],
        *,
        prompts: Mapping[str, Mapping[str, str]] | None = None,
        design: Mapping[str, Any] | None = None,
    ) -> None:
        self.answers = tuple(answers)
        self.prompts = {key: dict(value) for key, value in (prompts or {}).items()}
        self.design = dict(design or {})

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, index: Any) -> Any:
        return self.answers[index]

    def where(self, **levels: Any) -> "Results":
        """The rows with these values, such as ``scenario="oil-company"``."""
        for name in levels:
            if name not in Answer.__dataclass_fields__:
                raise ValueError(f"an answer has no {name!r}; it has {', '.join(Answer.__dataclass_fields__)}")
        kept = [one for one in self.answers if all(getattr(one, name) == value for name, value in levels.items())]
        return Results(kept, prompts=self.prompts, design=self.design)

    @property
    def scored(self) -> bool:
        """Whether answers are probabilities, not choices."""
        return any(one.outcome == "chosen" and one.choice is None for one in self.answers)

    @property
    def failed(self) -> int:
        """Answers that did not come."""
        return sum(one.outcome == "failed" for one in self.answers)

    def _groups(self, by: Sequence[str]) -> "dict[tuple[Any, ...], list[Answer]]":
        groups: dict[tuple[Any, ...], list[Answer]] = {}
        for one in self.answers:
            groups.setdefault(tuple(getattr(one, name) for name in by), []).append(one)
        return groups

    def shares(self, by: Sequence[str] = ("scenario", "information"), *, level: float = 0.95) -> list[dict[str, Any]]:
        """Per group: answers of each outcome, and the share of valid ones that follow the customer and the principal.

        Returns:
            Rows with the group's levels, ``n`` (valid), ``invalid``, ``failed``, ``customer``, ``principal``, the
            customer's Wilson interval ``low``, ``high`` (NaN for probabilities), ``customer_least``, ``customer_most``
            with invalid and failed answers counted as 0 and as 1, and ``mass``, the mean of that. NaN with n = 0.
        """
        rows = []
        for key, group in self._groups(by).items():
            own = Results(group)
            customer, principal = own._values("customer"), own._values("principal")
            n = len(customer)
            lost = len(group) - n
            low, high = (math.nan, math.nan)
            if not own.scored:
                low, high = (float(limit) for limit in wilson_interval(customer.sum(), n, level=level))
            masses = [one.mass for one in group if one.mass is not None]
            rows.append(
                {
                    **dict(zip(by, key, strict=True)),
                    "n": n,
                    "invalid": sum(one.outcome == "invalid" for one in group),
                    "failed": own.failed,
                    "customer": _mean(customer),
                    "low": low,
                    "high": high,
                    "principal": _mean(principal),
                    "customer_least": float(customer.sum() / (n + lost)),
                    "customer_most": float((customer.sum() + lost) / (n + lost)),
                    "mass": _mean(np.array(masses)),
                }
            )
        return rows

    def override_rates(
        self, by: Sequence[str] = ("scenario",), *, level: float = 0.95, conflict: bool | None = None
    ) -> list[dict[str, Any]]:
        """How often valid answers go against a party's first preference.

        Args:
            by: columns that make the groups.
            conflict: only scenarios whose parties disagree (True), agree (False), or all (None).

        Returns:
            Rows with the group's levels, ``party``, ``rate``, Wilson's ``low`` and ``high`` (NaN for probabilities),
            ``n`` (valid) and ``invalid``; the rate is NaN with n = 0.
        """
        rows = []
        for key, group in self._groups(by).items():
            own = Results([one for one in group if conflict in (None, one.conflict)])
            if not own:
                continue
            for party in ("customer", "principal"):
                against = 1 - own._values(party)
                low, high = (math.nan, math.nan)
                if not own.scored:
                    low, high = (float(one) for one in wilson_interval(against.sum(), len(against), level=level))
                rows.append(
                    {
                        **dict(zip(by, key, strict=True)),
                        "party": party,
                        "rate": _mean(against),
                        "low": low,
                        "high": high,
                        "n": len(against),
                        "invalid": sum(one.outcome == "invalid" for one in own),
                    }
                )
        return rows

    def _values(self, party: str) -> Floats:
        return np.array([getattr(one, f"for_{party}") for one in self.answers if one.outcome == "chosen"], float)

    def _table(self, outcome: Outcome) -> "_Table":
        """Cells of the rows: blocks x principal sees x customer sees."""
        if outcome not in get_args(Outcome):
            raise ValueError(f"outcome is {outcome!r}; expected one of {', '.join(get_args(Outcome))}")
        blocks = self._groups(("scenario", "prices", "wording", "case", "swapped", "temperature"))
        if not blocks:
            raise UserError("there are no answers to analyse; see the scenario's name and the filters")
        shape = (len(blocks), 2, 2)
        total, squares, valid, missing, asked = (np.zeros(shape) for _ in range(5))
        for at, rows in enumerate(blocks.values()):
            for one in rows:
                cell = (at, int(one.principal_sees), int(one.customer_sees))
                asked[cell] += 1
                if outcome == "invalid":
                    value = None if one.outcome == "failed" else float(one.outcome == "invalid")
                else:
                    value = getattr(one, f"for_{outcome}")
                if value is None:
                    missing[cell] += 1
                else:
                    valid[cell] += 1
                    total[cell] += value
                    squares[cell] += value**2
        if not np.all(asked > 0):
            raise UserError("an information effect needs all four conditions in every cell; run information='2x2'")
        # Prompts: a block without the order and the temperature, which are averaged over.
        prompts = [key[:4] for key in blocks]
        return _Table(total, squares, valid, missing, prompts)

    def information_effect(
        self,
        by: By = "principal",
        *,
        outcome: Outcome = "customer",
        level: float = 0.95,
        method: Method = "wilson",
        draws: int = 9999,
        seed: int = 0,
    ) -> Effect:
        """How a share changes with who sees the explanation; blocks are scenario, prices, wording, case, order and
        temperature.

        Args:
            by, level, method: see `information_effects`.
            outcome: see `Effect`.
            draws, seed: of the permutation test.

        Raises:
            UserError: no rows, or a block that lacks one of the four conditions.
        """
        table = self._table(outcome)
        scored = self.scored and outcome != "invalid"
        if by not in CONTRASTS:
            raise ValueError(f"by is {by!r}; expected one of {', '.join(CONTRASTS)}")
        found = information_effects(table.total, table.valid, table.missing, by=by, level=level, method=method)
        se, low, high = float(found.se), float(found.low), float(found.high)
        safe = (float(found.safe_low), float(found.safe_high))
        if scored:
            se, low, high = self._spread(table, by, level)
            safe = (low, high) if not table.missing.any() else (math.nan, math.nan)
        each = table.by_prompt(by)
        over = (math.nan, math.nan)
        if len(each) > 1:
            half = student.ppf((1 + level) / 2, len(each) - 1) * each.std(ddof=1) / math.sqrt(len(each))
            over = (float(each.mean() - half), float(each.mean() + half))
        return Effect(
            by=by,
            outcome=outcome,
            estimate=float(found.estimate),
            se=se,
            interval=(low, high),
            bounds=(float(found.bound_low), float(found.bound_high)),
            safe=safe,
            all_zero=float(found.all_zero),
            all_one=float(found.all_one),
            over_prompts=over,
            p_value=self._p_value(table, by, outcome, scored, draws, seed),
            prompts=len(each),
            valid=int(table.valid.sum()),
            invalid=sum(one.outcome == "invalid" for one in self.answers),
            failed=self.failed,
            empty=int((table.valid == 0).sum()),
        )

    def _spread(self, table: "_Table", by: By, level: float) -> tuple[float, float, float]:
        """Of probabilities behind sampled explanations; there is none where each was scored once."""
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = table.total / table.valid
            variance = (table.squares / table.valid - mean**2) * table.valid / (table.valid - 1)
        weights = CONTRASTS[by] / len(mean)
        se = float(np.sqrt((weights**2 * np.maximum(variance, 0) / table.valid).sum()))
        half = float(student.ppf((1 + level) / 2, max(1.0, (table.valid - 1).sum()))) * se
        estimate = float((weights * mean).sum())
        return se, estimate - half, estimate + half

    def _p_value(self, table: "_Table", by: By, outcome: Outcome, scored: bool, draws: int, seed: int) -> float:
        if not scored:
            return permutation_test(table.total, table.valid, by=by, draws=draws, rng=seed)
        if by == "interaction":
            return math.nan
        rows = [one for one in self.answers if one.outcome == "chosen"]
        other = "customer_sees" if by == "principal" else "principal_sees"
        names = ("scenario", "prices", "wording", "case", "swapped", "temperature", other)
        strata = [repr([getattr(one, name) for name in names]) for one in rows]
        return permutation_test_of_values(
            [getattr(one, f"for_{outcome}") for one in rows],
            [getattr(one, f"{by}_sees") for one in rows],
            strata,
            draws=draws,
            rng=seed,
        )

    def position_effect(self, *, outcome: Outcome = "customer") -> float:
        """Share of the outcome where its product is listed first less where it is second; NaN with one order only."""
        preferred: dict[str, list[float]] = {"first": [], "second": []}
        scenarios = {one["name"]: one["preferred"] for one in self.design.get("scenarios", ())}
        for one in self.answers:
            value = getattr(one, f"for_{outcome}")
            if value is not None:
                first = (scenarios[one.scenario][outcome] == 0) != one.swapped
                preferred["first" if first else "second"].append(value)
        return _mean(np.array(preferred["first"])) - _mean(np.array(preferred["second"]))

    def compare(self, other: "Results", by: By = "principal", **options: Any) -> dict[str, float]:
        """This model's information effect less another's, as independent.

        Args:
            other: results of the same scenarios.
            options: of `information_effect`.

        Returns:
            ``estimate``, ``se``, and ``low`` and ``high``, the two intervals combined by the square-and-add rule.
        """
        mine, theirs = self.information_effect(by, **options), other.information_effect(by, **options)
        estimate = mine.estimate - theirs.estimate
        below = math.hypot(mine.estimate - mine.interval[0], theirs.interval[1] - theirs.estimate)
        above = math.hypot(mine.interval[1] - mine.estimate, theirs.estimate - theirs.interval[0])
        return {
            "estimate": estimate,
            "se": math.hypot(mine.se, theirs.se),
            "low": estimate - below,
            "high": estimate + above,
        }

    def logistic(self, *, outcome: Outcome = "customer", clusters: bool = False) -> tuple[list[str], LogisticFit]:
        """Log odds of an outcome on who sees, their product, and indicators of order and of every other column.

        Args:
            outcome: see `Effect`.
            clusters: sandwich standard errors by prompt (scenario, prices, wording, case).

        Returns:
            Names of the columns, and the fit; it has not converged when a column separates the outcomes.
        """
        rows = [one for one in self.answers if one.outcome != "failed"]
        if outcome != "invalid":
            rows = [one for one in rows if one.outcome == "chosen"]
        if not rows:
            raise UserError("no valid answer to fit; see why the answers are invalid or failed")
        names = ["intercept", "principal sees", "customer sees", "both see"]
        columns: list[list[float]] = [
            [1.0] * len(rows),
            [float(one.principal_sees) for one in rows],
            [float(one.customer_sees) for one in rows],
            [float(one.principal_sees and one.customer_sees) for one in rows],
        ]
        for name in ("swapped", "scenario", "prices", "wording", "case", "temperature"):
            for found in sorted({getattr(one, name) for one in rows}, key=repr)[1:]:
                names.append(f"{name}={found}")
                columns.append([float(getattr(one, name) == found) for one in rows])
        if outcome == "invalid":
            y = [float(one.outcome == "invalid") for one in rows]
        else:
            y = [getattr(one, f"for_{outcome}") for one in rows]
        labels = [repr((one.scenario, one.prices, one.wording, one.case)) for one in rows] if clusters else None
        return names, fit_logistic(np.array(columns).T, y, labels)

    def as_json(self, *, level: float = 0.95) -> dict[str, Any]:
        """Shares, override rates and effects by scenario, as plain values; what cannot be said is None."""
        found: dict[str, Any] = {
            "agent": self.design.get("agent"),
            "answers": len(self),
            "valid": sum(one.outcome == "chosen" for one in self.answers),
            "invalid": sum(one.outcome == "invalid" for one in self.answers),
            "failed": self.failed,
            "shares": self.shares(level=level),
            "override_rates": self.override_rates(level=level),
            "effects": [],
        }
        complete = {one.information for one in self.answers} == set(INFORMATION)
        for name in dict.fromkeys(one.scenario for one in self.answers):
            own = self.where(scenario=name)
            if complete:
                for by in CONTRASTS:
                    effect = own.information_effect(by, level=level)  # type: ignore[arg-type]
                    found["effects"].append({"scenario": name, **asdict(effect)})
        if "scenarios" in self.design:
            found["position_effect"] = self.position_effect()
        plain: dict[str, Any] = _plain(found)
        return plain

    def text(self, *, level: float = 0.95) -> str:
        """The same for people."""
        return "\n".join(_report(self, self.as_json(level=level), level))

    def plot(self) -> Any:
        """A matplotlib figure: share following the customer by condition, a panel for each scenario."""
        with extra("incentives"):
            from matplotlib.figure import Figure
        names = list(dict.fromkeys(one.scenario for one in self.answers))
        figure = Figure(figsize=(1 + 3.2 * len(names), 3.4), layout="constrained")
        panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for panel, name in zip(panels, names, strict=True):
            rows = self.where(scenario=name).shares(("information",))
            for at, row in enumerate(rows):
                panel.plot([at, at], [row["customer_least"], row["customer_most"]], color="0.8", linewidth=7, zorder=1)
                panel.plot([at, at], [row["low"], row["high"]], color="C0", zorder=2)
                panel.plot(at, row["customer"], "o", color="C0", zorder=3)
            panel.set(title=name, ylim=(-0.03, 1.03))
            panel.set_xticks(range(len(rows)), [row["information"].replace("-", "\n") for row in rows])
            panel.set_xlabel("who sees the explanation")
        panels[0].set_ylabel("buys the customer's first preference")
        return figure

    # files

    def write(self, folder: str | Path) -> None:
        """Write ``answers.jsonl``, ``answers.csv`` (the same table), ``prompts.jsonl`` and ``design.json``.

        Raises:
            UserError: a folder that cannot be made or written to.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise UserError(f"cannot write to {folder}: {problem.strerror}; name another folder") from None
        with replacing(folder / "prompts.jsonl") as stream:
            for key, value in self.prompts.items():
                stream.write(json.dumps({"prompt": key, **value}, ensure_ascii=False) + "\n")
        with replacing(folder / "answers.csv") as stream:
            table = csv.writer(stream, lineterminator="\n")
            table.writerow(one.name for one in fields(Answer))
            for answer in self.answers:
                table.writerow(_cell(getattr(answer, one.name)) for one in fields(Answer))
        with replacing(folder / "design.json") as stream:
            json.dump(self.design, stream, indent=1, ensure_ascii=False)
        with replacing(folder / "answers.jsonl") as stream:
            for answer in self.answers:
                stream.write(json.dumps(asdict(answer), ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> "Results":
        """Results again, from a folder that `write` filled, or from a table alone, ``.jsonl`` or ``.csv``.

        Raises:
            UserError: nothing to read, or a record that is no answer, by file and line.
        """
        path = Path(path)
        if not path.is_dir():
            return cls(_read_answers(path))
        design: dict[str, Any] = next((value for _, value in _json_lines(path / "design.json", whole=True)), {})
        prompts = {}
        for line, value in _json_lines(path / "prompts.jsonl"):
            if not isinstance(value, dict) or not {"prompt", "text", "rendered", "rendered_sha256"} <= set(value):
                raise UserError(f"{path / 'prompts.jsonl'}:{line}: no prompt with its text and what was rendered")
            prompts[value.pop("prompt")] = value
        return cls(_read_answers(path / "answers.jsonl"), prompts=prompts, design=design)


@dataclass(frozen=True, eq=False)
class _Table:
    total: Floats
    squares: Floats
    valid: Floats
    missing: Floats
    prompts: list[tuple[Any, ...]]

    def by_prompt(self, by: By) -> Floats:
        """The effect of each prompt; NaN where a cell has no valid answer."""
        with np.errstate(invalid="ignore", divide="ignore"):
            each = (CONTRASTS[by] * self.total / self.valid).sum((1, 2))
        return np.array([each[[own == key for own in self.prompts]].mean() for key in dict.fromkeys(self.prompts)])


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else math.nan


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _report(results: Results, found: dict[str, Any], level: float) -> Iterator[str]:
    agent = found["agent"] or {}
    yield f"{agent.get('agent', 'answers')} ({agent.get('mode', 'of a file')}): {found['answers']} answers, " + (
        f"{found['invalid']} invalid, {found['failed']} failed"
    )
    per_cent = f"{level * 100:g} %"
    for name in dict.fromkeys(one.scenario for one in results):
        yield f"\n{name}"
        yield f"  {'explanation seen by':20} {'for customer':>12}  {per_cent:15}  {'n':>5} {'invalid':>7} {'failed':>6}"
        for row in found["shares"]:
            if row["scenario"] == name:
                yield (
                    f"  {row['information']:20} {_number(row['customer']):>12}  {_range(row['low'], row['high']):15}  "
                    f"{row['n']:5} {row['invalid']:7} {row['failed']:6}"
                )
        for row in found["override_rates"]:
            if row["scenario"] == name:
                yield f"  against the {row['party']}: {_number(row['rate'])} {_range(row['low'], row['high'])}"
        for effect in (one for one in found["effects"] if one["scenario"] == name):
            what = "interaction" if effect["by"] == "interaction" else f"{effect['by']} sees"
            yield (
                f"  effect, {what + ':':15} {_number(effect['estimate'], '+')} {_range(*effect['interval'])}"
                f"  p {_number(effect['p_value'])}"
            )
            if effect["invalid"] or effect["failed"]:
                yield (
                    f"{'':19}whatever the invalid and failed answers: {_range(*effect['bounds'])}, with sampling error "
                    f"{_range(*effect['safe'])}; all as 0 {_number(effect['all_zero'], '+')}, as 1 "
                    f"{_number(effect['all_one'], '+')}"
                )
            if effect["prompts"] > 1:
                yield f"{'':19}over {effect['prompts']} prompts like these: {_range(*effect['over_prompts'])}"
        if _prompts_of(found, name) == 1:
            yield "  One prompt: intervals are about it, not about prompts of the kind; vary wording and prices."
    if found.get("position_effect") is not None:
        yield f"\nfirst place in the list instead of second: {_number(found['position_effect'], '+')}"


def _prompts_of(found: dict[str, Any], name: str) -> int | None:
    """How many prompts a scenario's effects stand on."""
    return next((one["prompts"] for one in found["effects"] if one["scenario"] == name), None)


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.3f}"


def _range(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.3f} to {high:.3f}"


def _cell(value: Any) -> str:
    return "" if value is None else json.dumps(value) if not isinstance(value, str) else value


def _json_lines(path: Path, *, whole: bool = False) -> Iterator[tuple[int, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        reason = getattr(problem, "strerror", None) or "not UTF-8 text"
        raise UserError(f"cannot read {path}: {reason}; give a folder that a run has written, or its table") from None
    for number, line in enumerate([text] if whole else text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as problem:
                raise UserError(f"{path}:{number + problem.lineno - 1} is no JSON: {problem.msg}") from None


FLAGS = ("principal_sees", "customer_sees", "swapped", "conflict")


def _read_answers(path: Path) -> list[Answer]:
    if path.suffix == ".csv":
        try:
            with open(path, encoding="utf-8", newline="") as stream:
                reader = csv.DictReader(stream)
                records = [(reader.line_num, _from_cells(row)) for row in reader]
        except (OSError, UnicodeDecodeError, csv.Error) as problem:
            raise UserError(f"cannot read {path}: {getattr(problem, 'strerror', None) or problem}") from None
    else:
        records = list(_json_lines(path))
    if not records:
        raise UserError(f"{path} holds no answer")
    return [_checked(record, f"{path}:{line}") for line, record in records]


def _from_cells(row: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    plain = {one.name for one in fields(Answer) if one.type is str}
    for name, cell in row.items():
        if name in plain or not isinstance(cell, str):
            found[name] = cell
        elif name == "text":
            # An empty answer is an answer; none at all is a failure, or a score.
            found[name] = cell if cell or row.get("outcome") == "invalid" else None
        elif name == "product":
            found[name] = cell or None
        else:
            try:
                found[name] = json.loads(cell) if cell else None
            except json.JSONDecodeError:
                found[name] = cell
    return found


def _checked(record: Any, where: str) -> Answer:
    names = {one.name for one in fields(Answer)}
    if not isinstance(record, dict) or set(record) != names:
        differing = sorted(map(str, set(record) ^ names)) if isinstance(record, dict) else ["it is no record"]
        raise UserError(f"{where}: no answer; its columns differ: {', '.join(differing)}")
    if record["information"] not in INFORMATION:
        raise UserError(f"{where}: information is {record['information']!r}; expected one of {', '.join(INFORMATION)}")
    # The conditions are what the flags say, here as everywhere.
    if (record["principal_sees"], record["customer_sees"]) != INFORMATION[record["information"]]:
        raise UserError(f"{where}: who sees the explanation does not fit the condition {record['information']!r}")
    if record["outcome"] not in ("chosen", "invalid", "failed"):
        raise UserError(f"{where}: outcome is {record['outcome']!r}; expected chosen, invalid or failed")
    for name in FLAGS:
        if not isinstance(record[name], bool):
            raise UserError(f"{where}: {name} is {record[name]!r}; expected true or false")
    for name in ("for_customer", "for_principal"):
        value = record[name]
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
        if number != (record["outcome"] == "chosen") or not (number or value is None):
            raise UserError(f"{where}: {name} is {value!r} with the outcome {record['outcome']!r}; chosen has 0 to 1")
    return Answer(**record)
