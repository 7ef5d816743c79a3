"""Tables of people with a known outcome, on which decisions can be replayed, and simple rules that decide."""

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from counterproof.errors import UserError, extra
from counterproof.incentives.auditing import Auditor, ColumnDistance, Panel

__all__ = [
    "DecisionTable",
    "HalfSpaces",
    "breast_cancer_table",
    "read_decision_table",
    "separating_points",
    "table_columns",
]

Floats = NDArray[np.float64]

ALLOW = (0.8, 1.0, 1.2, 1.5, 2.5)  # scales of the five auditors of the synthetic task, kept for tables
FEWEST = 20  # people in a table
CATEGORIES = 50  # most values of a column of texts
WORDS = ({"0": 0, "1": 1}, {"false": 0, "true": 1}, {"no": 0, "yes": 1}, {"n": 0, "y": 1})


class HalfSpaces:
    """A finite class of rules h(x) = 1[w . x >= b].

    Args:
        weights: (h, d), a row of zeros makes a constant rule.
        thresholds: (h,).
        names: h texts that say what a rule accepts; None: ``rule 0``, ...
    """

    def __init__(self, weights: ArrayLike, thresholds: ArrayLike, names: Sequence[str] | None = None) -> None:
        self.weights, self.thresholds = np.array(weights, dtype=float), np.array(thresholds, dtype=float)
        if self.weights.ndim != 2 or self.thresholds.shape != (len(self.weights),):
            raise ValueError(
                f"weights have shape (rules, columns) and thresholds (rules,), not {self.weights.shape} and "
                f"{self.thresholds.shape}"
            )
        self.names = tuple(f"rule {i}" for i in range(len(self.weights))) if names is None else tuple(names)
        if len(self.names) != len(self.weights):
            raise ValueError(f"{len(self.weights)} rules need as many names, not {len(self.names)}")

    def __len__(self) -> int:
        return len(self.weights)

    def __call__(self, X: ArrayLike) -> NDArray[np.bool_]:
        """(n, h) decisions on the rows of X (n, d)."""
        decided: NDArray[np.bool_] = np.asarray(X, dtype=float) @ self.weights.T >= self.thresholds
        return decided

    def __add__(self, other: "HalfSpaces") -> "HalfSpaces":
        return HalfSpaces(
            np.concatenate([self.weights, other.weights]),
            np.concatenate([self.thresholds, other.thresholds]),
            self.names + other.names,
        )

    @classmethod
    def constants(cls, columns: int) -> "HalfSpaces":
        """The two rules that reject and accept everybody."""
        return cls(np.zeros((2, columns)), [1.0, -1.0], ["nobody", "everybody"])

    @classmethod
    def sample(cls, count: int, X: ArrayLike, rng: np.random.Generator) -> "HalfSpaces":
        """Random rules: a direction uniform on the sphere, a boundary through a random row of X (n, d)."""
        X = np.asarray(X, dtype=float)
        weights = rng.normal(size=(count, X.shape[1]))
        weights /= np.linalg.norm(weights, axis=1, keepdims=True)
        return cls(weights, (weights * X[rng.integers(len(X), size=count)]).sum(1))

    @classmethod
    def stumps(cls, X: ArrayLike, cuts: int = 5, names: Sequence[str] | None = None) -> "HalfSpaces":
        """Rules on one column each, in both directions.

        Args:
            X: (n, d) people; a column is cut between its values, at up to `cuts` evenly spaced quantiles.
            cuts: per column.
            names: d names of columns.
        """
        X = np.asarray(X, dtype=float)
        names = [f"column {c}" for c in range(X.shape[1])] if names is None else names
        weights, thresholds, says = [], [], []
        for c in range(X.shape[1]):
            values = np.unique(X[:, c])
            between = (values[1:] + values[:-1]) / 2
            at = np.quantile(X[:, c], np.arange(1, cuts + 1) / (cuts + 1))
            for cut in between if len(between) <= cuts else np.unique(at):
                for sign in (1.0, -1.0):
                    weights.append(sign * np.eye(X.shape[1])[c])
                    thresholds.append(sign * cut)
                    says.append(f"{names[c]} {'>=' if sign > 0 else '<='} {cut:.3g}")
        return cls(np.reshape(weights, (-1, X.shape[1])), thresholds, says)

    def distinct(self, X: ArrayLike) -> "HalfSpaces":
        """The rules of which no earlier one decides alike on every row of X (n, d)."""
        _, first = np.unique(self(X), axis=1, return_index=True)
        kept = np.sort(first)
        return HalfSpaces(self.weights[kept], self.thresholds[kept], [self.names[i] for i in kept])


def separating_points(decisions: ArrayLike) -> NDArray[np.int64]:
    """A small set of people on whom any two rules differ somewhere, as far as they differ on the given ones at all.

    Greedy: each time the person who takes most rules out of the groups that still agree.

    Args:
        decisions: (n, h), 0 or 1, of every rule on every candidate.

    Returns:
        Indices of candidates, in the order in which they were taken; none when all rules agree.
    """
    decided = np.asarray(decisions) == 1
    group = np.zeros(decided.shape[1], np.int64)
    kinds = len(np.unique(decided, axis=1).T)
    taken: list[int] = []
    while group.max() + 1 < kinds:
        size = np.bincount(group)
        accepting = decided @ np.eye(len(size))[group]  # (n, groups): how many rules of a group accept
        taken.append(int(np.minimum(accepting, size - accepting).sum(1).argmax()))
        group = np.unique(group * 2 + decided[taken[-1]], return_inverse=True)[1].ravel()
    return np.array(taken, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class DecisionTable:
    """People, and what would become of each of them if accepted.

    Args:
        X: (n, d) numbers: columns of numbers standardised to mean 0 and variance 1, of texts as 0 and 1.
        y: (n,) 1 where accepting is right, 0 where it is wrong.
        names: of the d columns.
        source: the table's column behind each of the d.
        shift, spread: (d,), X * spread + shift are the table's own values.
        weights: (d,) worth of a difference of 1, so that the whole of a table's column, from its 5 % to its 95 %
            quantile or from one text to another, is worth 1.
        says: one line that describes the table.
    """

    X: Floats
    y: NDArray[np.int64]
    names: tuple[str, ...]
    source: tuple[str, ...]
    shift: Floats
    spread: Floats
    weights: Floats
    says: str

    def __len__(self) -> int:
        return len(self.X)

    def panel(
        self,
        similar_by: Sequence[str] = (),
        protected: Sequence[str] = (),
        *,
        allow: Sequence[float] = ALLOW,
        gamma: float = 0.6,
        alpha: float = 0.1,
    ) -> Panel:
        """Auditors to whom people are as different as their values in certain columns, on average over the columns.

        Args:
            similar_by: columns of the table that may make a difference; empty: all but the protected ones.
            protected: columns that may not.
            allow: per auditor, the difference in chances allowed over the whole of all those columns.
            gamma, alpha: of the panel.

        Raises:
            UserError: for a column that is not there, or none left.
        """
        known = list(dict.fromkeys(self.source))
        for name in (*similar_by, *protected):
            if name not in known:
                raise UserError(f"there is no column {name!r} to compare people by; columns: {', '.join(known)}")
        if both := set(similar_by) & set(protected):
            raise UserError(f"column {min(both)!r} is protected and cannot make people different; choose one")
        counted = [name for name in (similar_by or known) if name not in protected]
        if not counted:
            raise UserError("every column is protected, so no two people differ; name fewer, or columns to compare by")
        columns = [c for c, name in enumerate(self.source) if name in counted]
        weights = (self.weights[columns] / len(set(counted))).tolist()
        return Panel([Auditor(ColumnDistance(scale, columns, weights)) for scale in allow], gamma=gamma, alpha=alpha)

    def rules(self, cuts: int = 5) -> HalfSpaces:
        """Rules on one column each and the two constant ones; of rules that decide alike on this table, one."""
        d = self.X.shape[1]
        found = (HalfSpaces.constants(d) + HalfSpaces.stumps(self.X, cuts)).distinct(self.X)
        names = list(found.names)
        for i in np.flatnonzero(found.weights.any(1)):
            c = int(np.flatnonzero(found.weights[i])[0])
            up = found.weights[i, c] > 0
            cut = (found.thresholds[i] if up else -found.thresholds[i]) * self.spread[c] + self.shift[c]
            if self.names[c] == self.source[c]:
                names[i] = f"{self.names[c]} {'>=' if up else '<='} {cut:.4g}"
            else:
                names[i] = self.names[c] if up else self.names[c].replace("=", "!=", 1)
        return HalfSpaces(found.weights, found.thresholds, names)

    def rounds(self, count: int, size: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
        """Row indices of `count` batches of `size` people: the table in random order, again and again as needed."""
        passes = -(-count * size // len(self))
        order = np.concatenate([rng.permutation(len(self)) for _ in range(passes)])[: count * size]
        return list(order.reshape(count, size))


def breast_cancer_table() -> DecisionTable:
    """The Wisconsin breast-cancer table of scikit-learn: 569 people, 30 columns; accepting is right if benign."""
    with extra("incentives"):
        from sklearn.datasets import load_breast_cancer

    found = load_breast_cancer()
    columns = {str(name): found.data[:, c] for c, name in enumerate(found.feature_names)}
    return _encode(columns, found.target.astype(np.int64), "breast cancer (scikit-learn)")


def read_decision_table(
    path: Path,
    label: str = "label",
    *,
    positive: str | None = None,
    drop: Sequence[str] = (),
    watch: Callable[[int], None] | None = None,
) -> DecisionTable:
    """Read a CSV file (UTF-8, a header, commas; tabs if its name ends in .tsv) with the outcome of every row.

    Args:
        path: the file.
        label: its column of outcomes, two different values.
        positive: the value for which accepting is right; None: 1, true, yes or y.
        drop: columns that are not read.
        watch: called with the number of lines read, now and then.

    Raises:
        UserError: for anything that cannot be read or used, naming file, line, column and remedy.
    """
    header, rows, lines = _rows(path, watch)
    for name in (label, *drop):
        if name not in header:
            raise UserError(f"{path}, line 1: there is no column {name!r}; columns: {', '.join(header)}")
    if len(rows) < FEWEST:
        raise UserError(f"{path} has {len(rows)} rows; decisions are replayed on {FEWEST} or more")
    y = _labels(path, label, [row[header.index(label)].strip() for row in rows], lines, positive)
    columns: dict[str, Floats | list[str]] = {}
    for c, name in enumerate(header):
        if name != label and name not in drop:
            columns[name] = _column(path, name, [row[c].strip() for row in rows], lines)
    if not columns:
        raise UserError(f"{path} has no column besides the outcomes {label!r}; add what is known before a decision")
    return _encode(columns, y, path.name)


def table_columns(path: Path) -> list[str]:
    """The column names of a CSV file.

    Raises:
        UserError: as `read_decision_table`.
    """
    return _rows(path, None, only_header=True)[0]


def _rows(
    path: Path, watch: Callable[[int], None] | None, *, only_header: bool = False
) -> tuple[list[str], list[list[str]], list[int]]:
    """Header, rows, and the line on which each row begins."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a CSV file")
    rows: list[list[str]] = []
    lines: list[int] = []
    header: list[str] = []
    line = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
            for row in reader:
                start, line = line + 1, reader.line_num
                if not row:
                    continue  # an empty line is no person
                if not header:
                    header = [name.strip() for name in row]
                    if "" in header:
                        raise UserError(f"{path}, line {start}: column {header.index('') + 1} has no name; name it")
                    if twice := [name for name in header if header.count(name) > 1]:
                        raise UserError(f"{path}, line {start}: two columns are called {twice[0]!r}; rename one")
                    if only_header:
                        break
                    continue
                if len(row) != len(header):
                    raise UserError(
                        f"{path}, line {start}: {len(row)} cells under {len(header)} column names; quote cells that "
                        "hold the separator, or mend the line"
                    )
                rows.append(row)
                lines.append(start)
                if watch is not None and len(rows) % 1000 == 0:
                    watch(line)
    except UnicodeDecodeError as problem:
        raise UserError(f"{path}, after line {line}: not UTF-8 ({problem.reason}); save it as UTF-8") from None
    except csv.Error as problem:
        raise UserError(f"{path}, line {line + 1}: {problem}; mend the quotes") from None
    except OSError as problem:
        raise UserError(f"{path} cannot be read: {problem.strerror or problem}; name a CSV file") from None
    if not header:
        raise UserError(f"{path} is empty; it needs a line of column names and a line per person")
    return header, rows, lines


def _labels(path: Path, name: str, cells: list[str], lines: list[int], positive: str | None) -> NDArray[np.int64]:
    if "" in cells:
        raise UserError(
            f"{path}, line {lines[cells.index('')]}, column {name!r}: no outcome; decisions can only be replayed where "
            "the outcome is known: fill it in or delete the row"
        )
    values = list(dict.fromkeys(cells))
    if len(values) > 2:
        raise UserError(
            f"{path}, line {lines[cells.index(values[2])]}, column {name!r}: {values[2]!r} is a third outcome after "
            f"{values[0]!r} and {values[1]!r}; keep two"
        )
    if len(values) < 2:
        raise UserError(f"{path}, column {name!r}: every outcome is {values[0]!r}; there is nothing to learn")
    if positive is not None:
        if positive not in values:
            raise UserError(
                f"{path}, column {name!r}: no outcome is {positive!r}; they are {values[0]!r}, {values[1]!r}"
            )
        return np.array([int(cell == positive) for cell in cells])
    numbers = {"0.0": "0", "1.0": "1"}
    lowered = [numbers.get(cell.lower(), cell.lower()) for cell in cells]
    for words in WORDS:
        if set(lowered) == set(words):
            return np.array([words[cell] for cell in lowered])
    raise UserError(
        f"{path}, column {name!r}: which of {values[0]!r} and {values[1]!r} makes accepting right? Say it with "
        f"--positive {values[0]}, or write 1 and 0"
    )


def _column(path: Path, name: str, cells: list[str], lines: list[int]) -> Floats | list[str]:
    """The numbers of a column, or its texts."""
    numbers = np.empty(len(cells))
    bad: list[int] = []
    for i, cell in enumerate(cells):
        where = f"{path}, line {lines[i]}, column {name!r}"
        if not cell:
            raise UserError(f"{where}: the cell is empty; fill it in, delete the row, or leave the column out (--drop)")
        try:
            numbers[i] = float(cell)
        except ValueError:
            bad.append(i)
            continue
        if not math.isfinite(numbers[i]):
            raise UserError(f"{where}: {cell!r} is no finite number; give one, delete the row, or leave the column out")
    if not bad:
        return numbers
    if len(bad) < len(cells) / 2:
        raise UserError(
            f"{path}, line {lines[bad[0]]}, column {name!r}: {cells[bad[0]]!r} is no number, but most of the column "
            "are; mend it, delete the row, or leave the column out (--drop)"
        )
    if (kinds := len(set(cells))) > CATEGORIES:
        raise UserError(
            f"{path}, column {name!r}: {kinds} different texts, more than {CATEGORIES}; leave it out (--drop) if it "
            "names people, else group its values or write numbers"
        )
    return cells


def _encode(columns: Mapping[str, Floats | list[str]], y: NDArray[np.int64], name: str) -> DecisionTable:
    """Numbers standardised, texts as indicators (two texts as one)."""
    encoded: list[Floats] = []
    names: list[str] = []
    source: list[str] = []
    weights: list[float] = []
    units: list[tuple[float, float]] = []
    constant: list[str] = []
    texts = 0
    for column, values in columns.items():
        if isinstance(values, np.ndarray):
            mean, spread = values.mean(), values.std()
            if not spread > 1e-12 * max(1.0, abs(mean)):
                constant.append(column)
                continue
            low, high = np.quantile(values, [0.05, 0.95])
            reach = high - low if high > low else values.max() - values.min()
            encoded.append((values - mean) / spread)
            names.append(column)
            source.append(column)
            weights.append(float(spread / reach))
            units.append((mean, spread))
            continue
        kinds = sorted(set(values))
        texts += 1
        if len(kinds) == 1:
            constant.append(column)
            continue
        for kind in kinds[1:] if len(kinds) == 2 else kinds:
            encoded.append(np.array([float(value == kind) for value in values]))
            names.append(f"{column}={kind}")
            source.append(column)
            units.append((0.0, 1.0))
            weights.append(1.0 if len(kinds) == 2 else 0.5)  # two indicators differ between two of several texts
    if not encoded:
        raise UserError(f"{name}: no column has two different values; there is nothing to decide by")
    says = f"{name}: {len(y)} people, {len(columns)} columns ({texts} of texts), {y.mean():.1%} worth accepting"
    if constant:
        says += f"; the same for all, so not used: {', '.join(constant)}"
    shift, spreads = np.array(units).T
    return DecisionTable(np.stack(encoded, 1), y, tuple(names), tuple(source), shift, spreads, np.array(weights), says)
