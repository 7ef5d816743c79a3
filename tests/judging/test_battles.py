import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from counterproof.errors import UserError
from counterproof.judging.battles import count_battles, read_battles

ROWS = [
    {"model_a": "b", "model_b": "a", "winner": "model_a", "prompt_id": "p1"},
    {"model_a": "a", "model_b": "b", "winner": "model_b", "prompt_id": "p1"},
    {"model_a": "a", "model_b": "c", "winner": "tie (bothbad)", "prompt_id": "p2"},
    {"model_a": "c", "model_b": "a", "winner": "Tie", "prompt_id": "p2"},
    {"model_a": "b", "model_b": "a", "winner": "model_b", "prompt_id": "p2"},
]


def written(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def cells(battles):
    prompts = battles.prompt if battles.prompt is not None else np.zeros(len(battles.first), int)
    return sorted(
        (battles.models[i], battles.models[j], y, w, n, p)
        for i, j, y, w, n, p in zip(
            battles.first, battles.second, battles.outcome, battles.weight, battles.count, prompts, strict=True
        )
    )


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.tsv", "x.parquet", "x.ndjson"])
def test_every_format_gives_the_same_counts(tmp_path, name):
    battles = read_battles(written(tmp_path / name, ROWS))
    assert battles.models == ("a", "b", "c")
    assert len(battles) == 5
    # b beat a twice on the first prompt, whichever stood first; a beat b once on the second.
    assert cells(battles) == [("a", "b", 0.0, 1.0, 2.0, 0), ("a", "b", 1.0, 1.0, 1.0, 1), ("a", "c", 0.5, 1.0, 2.0, 1)]
    assert cells(count_battles(ROWS)) == cells(battles)


def test_what_is_counted_does_not_depend_on_blocks_order_or_sides(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    rows = []
    for number in range(500):
        a, b = rng.choice(6, 2, replace=False)
        winner = rng.choice(["model_a", "model_b", "tie"])
        rows.append({"model_a": f"m{a}", "model_b": f"m{b}", "winner": winner, "prompt_id": number % 7, "weight": 2.5})
    whole = cells(read_battles(written(tmp_path / "a.jsonl", rows)))
    flip = {"model_a": "model_b", "model_b": "model_a", "tie": "tie"}
    turned = [
        {**row, "model_a": row["model_b"], "model_b": row["model_a"], "winner": flip[row["winner"]]}
        for row in reversed(rows)
    ]
    by_prompt = {row[-1] for row in whole}
    monkeypatch.setattr("counterproof.judging.battles.BLOCK", 700)
    monkeypatch.setattr("counterproof.judging.battles.PARTS", 50)
    for name in ("b.jsonl", "b.csv", "b.parquet"):
        again = read_battles(written(tmp_path / name, turned))
        assert len({row[-1] for row in cells(again)}) == len(by_prompt) == 7
        assert sorted(row[:-1] for row in cells(again)) == sorted(row[:-1] for row in whole)
    apart = read_battles(tmp_path / "b.csv", by_prompt=False)
    assert apart.prompt is None
    assert len(apart) == 500
    assert len(apart.first) <= 15 * 3


def test_columns_of_other_names_and_categories(tmp_path):
    rows = [{"model_x": r["model_a"], "model_y": r["model_b"], "winner": "left", "id": 7} for r in ROWS]
    names = {"model_a": "model_x", "model_b": "model_y", "prompt_id": "id"}
    assert len(read_battles(written(tmp_path / "x.csv", rows), columns=names)) == 5
    table = pa.Table.from_pylist(ROWS)
    for name in ("model_a", "winner"):
        table = table.set_column(table.column_names.index(name), name, table[name].dictionary_encode())
    pq.write_table(table, tmp_path / "categories.parquet")
    assert cells(read_battles(tmp_path / "categories.parquet")) == cells(count_battles(ROWS))


def test_judgments_of_arena_hard_auto(tmp_path):
    rows = [
        {"uid": "u1", "model": "m", "baseline": "base", "games": [{"score": "A>>B"}, {"score": "A>B"}]},
        {"uid": "u2", "model": "m", "baseline": "base", "games": [{"score": "A=B"}, {"score": None}]},
        {"uid": "u3", "model": "m", "baseline": "base", "games": [{"score": "B>>A"}, {"score": "B>A"}]},
    ]
    battles = read_battles(written(tmp_path / "j.jsonl", rows))
    # base is sorted before m: 1 is a win of the baseline. Game 1 has the baseline as A, game 2 as B.
    assert cells(battles) == [
        ("base", "m", 0.0, 1.0, 1.0, 0),
        ("base", "m", 0.0, 3.0, 1.0, 2),
        ("base", "m", 0.5, 1.0, 1.0, 1),
        ("base", "m", 1.0, 1.0, 1.0, 2),
        ("base", "m", 1.0, 3.0, 1.0, 0),
    ]
    assert battles.unread == 1
    rows[1]["games"][0]["score"] = "A>>>B"
    with pytest.raises(UserError, match=r"j.jsonl:2: score is 'A>>>B'"):
        read_battles(written(tmp_path / "j.jsonl", rows))


BAD = [
    ({"winner": "model_c"}, "winner is 'model_c'; expected model_a, model_b, tie"),
    ({"model_b": "b"}, "'b' is matched against itself"),
    ({"model_a": ""}, "there is no model_a"),
    ({"weight": -1.0}, "weight is -1.0; expected a number above 0"),
    ({"weight": float("nan")}, "weight is nan; expected a number above 0"),
]


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.parquet"])
@pytest.mark.parametrize(("change", "says"), BAD)
def test_a_bad_record_is_named_by_its_line(tmp_path, name, change, says):
    rows = [{**row, "weight": 1.0} for row in ROWS]
    rows[3] = {**rows[0], **change}
    line = 5 if name == "x.csv" else 4
    with pytest.raises(UserError, match=rf"{name}:{line}: {says}"):
        read_battles(written(tmp_path / name, rows))


def test_what_is_no_file_of_battles_is_refused(tmp_path):
    def refused(name, text, says):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=says):
            read_battles(tmp_path / name)

    good = json.dumps(ROWS[0]) + "\n"
    refused("a.jsonl", good + "{oops\n", r"a.jsonl:2: not JSON")
    refused("b.jsonl", good + "\n" + "[1]\n", r"b.jsonl:3: \[1\] is no record")
    refused("c.jsonl", "", "c.jsonl has no battle in it")
    refused(
        "d.jsonl", json.dumps({"model_a": "a", "winner": "tie"}) + "\n", "no column 'model_b'; it has model_a, winner"
    )
    refused("e.csv", "model_a,model_b,winner\n", "e.csv has no battle in it")
    refused("f.csv", "model_a,model_b,winner\na,b,tie\na,b\n", r"f.csv:3: 2 fields, but the header has 3")
    refused("g.xlsx", "", "is a .xlsx; battles are .jsonl, .csv, .tsv or .parquet")
    refused("h.parquet", "no", "h.parquet is not a Parquet file")
    refused("i.jsonl", good + json.dumps({**ROWS[0], "winner": 3}) + "\n", r"i.jsonl:2: winner is 3; expected text")
    refused("j.jsonl", good + json.dumps({k: ROWS[0][k] for k in ("model_a", "model_b", "winner")}) + "\n",
            r"j.jsonl:2: there is no prompt_id, which other battles have")  # fmt: skip
    with pytest.raises(UserError, match="there is no file"):
        read_battles(tmp_path / "none.csv")
    with pytest.raises(UserError, match=r"has no column 'x' \(for winner\)"):
        read_battles(tmp_path / "a.jsonl", columns={"winner": "x"})
    with pytest.raises(UserError, match="battle 2: 'a' is matched against itself"):
        count_battles([ROWS[0], {"model_a": "a", "model_b": "a", "winner": "tie"}])


def test_a_column_that_the_first_battle_lacks_is_not_passed_over(tmp_path):
    bare = {name: ROWS[0][name] for name in ("model_a", "model_b", "winner")}
    for late in ({"weight": 3.0}, {"weight": "3"}, {"prompt_id": "p"}, {"question_id": 7}):
        path = written(tmp_path / "x.jsonl", [bare, {**bare, **late}])
        with pytest.raises(UserError, match=f"some battles have {next(iter(late))}, and the first has not"):
            read_battles(path)
    path = written(tmp_path / "y.jsonl", [{**bare, "weight": 1.0}, {**bare, "weight": "3"}])
    with pytest.raises(UserError, match=r"y.jsonl:2: weight is '3'; expected a number"):
        read_battles(path)
    (tmp_path / "z.csv").write_bytes(b"model_a,model_b,winner\na,b,tie\n\xff,b,tie\n")
    with pytest.raises(UserError, match=r"z\.csv is not UTF-8 text"):
        read_battles(tmp_path / "z.csv")


def test_memory_does_not_grow_with_the_number_of_battles(tmp_path):
    """What is kept are cells: as many for 200,000 battles as for 20,000."""
    rng = np.random.default_rng(0)
    sizes = []
    for count in (20_000, 200_000):
        a = rng.integers(8, size=count)
        b = (a + rng.integers(1, 8, size=count)) % 8
        names = np.array([f"m{n}" for n in range(8)])
        winner = np.where(rng.random(count) < 0.5, "model_a", "model_b")
        pq.write_table(pa.table({"model_a": names[a], "model_b": names[b], "winner": winner}), tmp_path / "x.parquet")
        battles = read_battles(tmp_path / "x.parquet")
        assert len(battles) == count
        sizes.append(len(battles.first))
    assert sizes == [56, 56]
