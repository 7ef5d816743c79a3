"""Preference data: formats against TRL's own functions, bad records by their messages, conversions by brute force."""

import gzip
import itertools
import json
import subprocess
import sys
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterproof.errors import UserError
from counterproof.preference import Example, problems, read, split, survey, to_pairs, to_unpaired, write

USER = {"role": "user", "content": "What is a counterproof?"}
SYSTEM = {"role": "system", "content": "Answer briefly."}
GOOD = {"role": "assistant", "content": "A print pulled from a fresh proof."}
BAD = {"role": "assistant", "content": "Bread."}
PAIR = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
RANKED = {"prompt": "p", "completions": ["a", "b", "c"], "scores": [1, 3, 2]}
UNPAIRED = {"prompt": "p", "completion": "c", "label": False}
CHAT_PAIR = {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]}


def save(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def one(tmp_path):
    """Read the one example that a row makes."""

    def example(row, **options):
        (found,) = read(save(tmp_path / "one.jsonl", [row]), **options)
        return found

    return example


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A folder that the examples of a property share."""
    return tmp_path_factory.mktemp("scratch")


def contents(examples):
    return [(e.prompt, e.completions, e.scores, e.kind, dict(e.columns)) for e in examples]


# formats


def test_every_plain_format_is_read_as_what_it_is(one):
    assert contents([one(PAIR)]) == [("The sky is", (" blue.", " green."), (1.0, 0.0), "pair", {})]
    assert contents([one(UNPAIRED)]) == [("p", ("c",), (0.0,), "unpaired", {})]
    assert one({**UNPAIRED, "label": True}).scores == (1.0,)
    assert contents([one({"prompt": "p", "completion": "c"})]) == [("p", ("c",), (1.0,), "completion", {})]
    assert contents([one({"prompt": "p"})]) == [("p", (), (), "prompt", {})]
    ranked = [("p", ("a", "b", "c"), (1.0, 3.0, 2.0), "ranked", {})]
    assert contents([one(RANKED)]) == ranked
    assert contents([one({"query": "p", "responses": ["a", "b", "c"], "scores": [1, 3, 2]})]) == ranked


def test_ultrafeedback_rows_are_rankings_that_keep_the_rest(one):
    row = {
        "source": "flan",
        "instruction": "p",
        "models": ["m", "n"],
        "completions": [
            {"response": "a", "overall_score": 7.5, "fine-grained_score": 4.0, "model": "m"},
            {"response": "b", "overall_score": 8, "fine-grained_score": 3.0, "model": "n"},
        ],
    }
    found = one(row)
    assert (found.prompt, found.completions, found.scores, found.kind) == ("p", ("a", "b"), (7.5, 8.0), "ranked")
    assert found.columns["source"] == "flan"
    assert [detail["model"] for detail in found.columns["details"]] == ["m", "n"]
    for completion in row["completions"]:
        completion["overall_score"] = None
    assert one(row).scores == (4.0, 3.0)


def test_other_columns_are_kept(one):
    more = {
        "weight": 0.5,
        "margin_safer": [0.1, -0.2],
        "ref_chosen_logps": -3.5,
        "ref_rejected_logps": -4,
        "chat_template_kwargs": {"enable_thinking": False},
        "tools": [{"type": "function"}],
        "source": {"name": "x", "nothing": None},
        "label": "annotator 3",
        "unknown": None,
    }
    found = one({**PAIR, **more})
    del more["unknown"]  # null: not there
    assert found.kind == "pair"
    assert found.columns == more


def test_fields_that_fit_two_kinds_need_to_be_told(one):
    both = {**PAIR, **UNPAIRED}
    with pytest.raises(UserError, match=r"one\.jsonl:1: .*fit pair .*and unpaired .*kind='pair' or kind='unpaired'"):
        one(both)
    assert one(both, kind="unpaired").completions == ("c",)
    assert one(both, kind="pair").columns == {"completion": "c", "label": False}


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        (
            "pair",
            UNPAIRED,
            r"this is unpaired \(prompt, completion, label\); expected pair \(prompt, chosen, rejected\)",
        ),
        ("prompt", PAIR, r"this is pair \(prompt, chosen, rejected\); expected prompt only"),
        (
            "completion",
            UNPAIRED,
            "this is unpaired",
        ),  # trained on as it stands, its bad completions would count as good
        ("ranked", PAIR, "expected ranked .* ranked .* UltraFeedback"),
    ],
)
def test_another_kind_than_asked_for_is_refused(one, kind, row, message):
    with pytest.raises(UserError, match=message):
        one(row, kind=kind)


def test_an_unknown_kind_is_an_error_at_once(tmp_path):
    with pytest.raises(ValueError, match="kind 'pairs'; expected one of pair, "):
        read(save(tmp_path / "a.jsonl", [PAIR]), kind="pairs")


# as TRL has them


turns = st.lists(st.sampled_from([USER, SYSTEM, GOOD, BAD]), max_size=4)
ends = st.sampled_from([GOOD, BAD, {"role": "assistant", "content": "c"}])
conversations = st.builds(lambda shared, own, end: ([*shared, *own, end]), st.just([USER]) | turns, turns, ends)


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(conversations, conversations) | st.tuples(st.text("ab c\n", min_size=1), st.text("ab c\n", min_size=1))
)
def test_an_implicit_prompt_is_what_trl_extracts(scratch, both):
    from trl import extract_prompt

    chosen, rejected = both
    path = save(scratch / "a.jsonl", [{"chosen": chosen, "rejected": rejected}])
    bad = list(problems(path))
    if not bad:
        (found,) = read(path)
        theirs = extract_prompt({"chosen": chosen, "rejected": rejected})
        assert {"prompt": found.prompt, "chosen": found.completions[0], "rejected": found.completions[1]} == theirs
        return
    # Refused: nothing to prefer, or one of the three parts is empty or ends on the wrong turn.
    if chosen == rejected or chosen[:1] != rejected[:1]:
        return
    theirs = extract_prompt({"chosen": chosen, "rejected": rejected})
    if isinstance(chosen, str):
        assert not all(part.strip() for part in theirs.values())
    else:
        assert not theirs["prompt"] or theirs["prompt"][-1]["role"] == "system"


def test_a_text_prompt_beside_whole_conversations_is_found_in_them(one):
    from trl.data_utils import maybe_extract_prompt

    row = {"prompt": USER["content"], "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    found = one(row)
    theirs = maybe_extract_prompt(row)
    assert [found.prompt, *found.completions] == [theirs["prompt"], theirs["chosen"], theirs["rejected"]]
    with pytest.raises(UserError, match="do not begin with it; write the prompt as messages"):
        one({**row, "prompt": "Another"})


def test_unpairing_is_trls(tmp_path):
    from datasets import Dataset
    from trl import unpair_preference_dataset

    rows = [{**PAIR, "weight": 2.0}, {"prompt": "q", "chosen": "y", "rejected": "n", "weight": 0.5}]
    ours = tmp_path / "ours.jsonl"
    assert write(to_unpaired(read(save(tmp_path / "a.jsonl", rows))), ours) == 4
    found = [json.loads(line) for line in ours.read_text().splitlines()]
    theirs = list(unpair_preference_dataset(Dataset.from_list(rows)))
    assert sorted(sorted(row.items()) for row in found) == sorted(sorted(row.items()) for row in theirs)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".parquet", ""])
@pytest.mark.parametrize(
    "rows",
    [
        [PAIR, {**PAIR, "prompt": "Grass ü 日本 \u2028 is", "weight": 2.0}],
        [RANKED, {**RANKED, "completions": ["x", "y"], "scores": [0.5, -1.0]}],
        [UNPAIRED],
        [CHAT_PAIR, {**CHAT_PAIR, "chat_template_kwargs": {"brief": True}}],
        [
            {"prompt": [USER], "completion": [{"role": "assistant", "content": "c", "name": "n"}, BAD, GOOD]},
            {"prompt": [SYSTEM, USER], "completion": [GOOD]},
        ],
        [{"prompt": "p", "source": {"a": 1}}, {"prompt": "q", "source": {"b": "2"}}],
    ],
    ids=["pair", "ranked", "unpaired", "chat", "turns", "prompt"],
)
def test_every_file_format_gives_the_same_examples(tmp_path, rows, suffix):
    expected = contents(read(save(tmp_path / "expected.jsonl", rows)))
    path = tmp_path / f"data{suffix}"
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(_filled(rows)), path)
    elif suffix == "":
        from datasets import Dataset

        Dataset.from_list(_filled(rows)).save_to_disk(path, num_shards=len(rows))
    elif suffix == ".json":
        path.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    else:
        text = "\n".join(map(json.dumps, rows)).encode()
        path.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    found = list(read(path))
    assert contents(found) == expected
    place = {".json": ":", ".parquet": ", row 1", "": ", row 1"}.get(suffix, ":1")
    assert found[0].where.startswith(f"{path}{place}")


def _filled(rows):
    """A table's columns are those of any row, null where a row lacks one."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def test_a_saved_dict_of_splits_asks_for_one(tmp_path):
    from datasets import Dataset, DatasetDict

    part = Dataset.from_list([PAIR])
    DatasetDict(train=part, test=part).save_to_disk(tmp_path / "both")
    DatasetDict(train=part).save_to_disk(tmp_path / "single")
    with pytest.raises(UserError, match=r"holds the splits test, train; name one: .*both/train"):
        read(tmp_path / "both")
    assert len(list(read(tmp_path / "both" / "train"))) == len(list(read(tmp_path / "single"))) == 1


def test_folders_and_patterns_are_read_in_the_order_of_names(tmp_path):
    for name in ("b", "a", "c"):
        save(tmp_path / f"{name}.jsonl", [{"prompt": name}])
    save(tmp_path / ".hidden.jsonl", [PAIR])
    (tmp_path / "README.md").write_text("nothing")
    assert [e.prompt for e in read(tmp_path)] == ["a", "b", "c"]
    assert [e.prompt for e in read(tmp_path / "[ac].jsonl")] == ["a", "c"]
    assert [e.prompt for e in read(f"{tmp_path}/*.jsonl")] == ["a", "b", "c"]


def test_a_name_with_the_signs_of_a_pattern_is_a_name_first(tmp_path):
    assert len(list(read(save(tmp_path / "a[1].jsonl", [PAIR])))) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.jsonl", "absent.jsonl does not exist; give a file"),
        ("*.jsonl", r"no file matches .*\*.jsonl; give a file"),
        ("table.csv", r"table.csv is none of .jsonl, .*convert it"),
        ("empty", "no file of .jsonl.* and no saved data set$"),
        (".", "its folders are empty: name one of them"),
    ],
)
def test_what_cannot_be_read_at_all_is_said_before_the_first_example(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").touch()
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize("text", [b"", b"\n \n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_nothing_in_a_file_is_an_error(tmp_path, text, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(text)
    with pytest.raises(UserError, match=r"holds no record; expected pair \(prompt, chosen, rejected\)"):
        list(read(path))


def test_an_empty_array_and_damaged_tables_are_errors(tmp_path):
    (tmp_path / "a.json").write_text(" [ ] ")
    with pytest.raises(UserError, match="holds no record"):
        list(read(tmp_path / "a.json"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not PAR1")
    with pytest.raises(UserError, match=r"a\.parquet cannot be read as Parquet: .*write or fetch it again"):
        list(read(tmp_path / "a.parquet"))
    from datasets import Dataset

    Dataset.from_list([PAIR]).save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    arrow.write_bytes(b"0" * 99)
    with pytest.raises(UserError, match=r"saved cannot be read as a saved data set: .*save it again"):
        list(read(tmp_path / "saved"))
    arrow.unlink()
    with pytest.raises(UserError, match=r"cannot read .*saved"):
        list(read(tmp_path / "saved"))


# bad records


BROKEN = {
    "not JSON": (
        b'{"prompt": "a" "chosen": 1}',
        "not JSON at column 16: Expecting ',' delimiter.*on a line of its own",
    ),
    "pretty-printed": (b"{", "not JSON at column 2.*one JSON object on a line of its own"),
    "digits": (b'{"prompt": ' + b"1" * 5000 + b"}", "not a record: .*write it as"),
    "nested": (b"[" * 100_000, "not a record: .*write it as"),
    "latin": ('{"prompt": "é"}'.encode("latin-1"), "not UTF-8 .byte 0xe9 at column 13.*save the file as UTF-8"),
    "array": (b"[1, 2]", r"a record is an object with named fields, not \[1, 2\]; write it as \{"),
    "null line": (b"null", "an object with named fields, not null; write"),
}
WRONG = {
    "stepwise": ({"prompt": "p", "completions": ["a"], "labels": [True]}, "stepwise supervision .*join the steps"),
    "messages": ({"messages": [USER, GOOD]}, "messages is a conversation without a preference; put its last turn into"),
    "sharegpt": ({"conversations": [{"from": "human", "value": "x"}]}, "conversations is a conversation without"),
    "rejected": ({"prompt": "p", "chosen": "a"}, r"rejected missing for pair .*found: prompt, chosen; formats: pair"),
    "scores": ({"prompt": "p", "completions": ["a", "b"]}, r"scores missing for ranked .*add it"),
    "completion": ({"completion": "a", "label": True}, r"prompt missing for unpaired .*found: completion, label"),
    "unknown": ({"question": "a", "answer": "b"}, "no format has these fields: question, answer; rename them to"),
    "nothing": ({}, "no format has these fields: none"),
    "null": ({**PAIR, "prompt": None}, "prompt is null; write text, or a list of chat messages"),
    "number": ({**PAIR, "chosen": 3}, "chosen is 3; write text"),
    "strings": ({**PAIR, "chosen": ["a"]}, r"chosen is a list, and its item 1 is 'a'; write chat messages: \{\"role\""),
    "label": ({**UNPAIRED, "label": 1}, "label is 1; write true for a good completion, false for a bad one"),
    "no label": ({**UNPAIRED, "label": None}, "label is null; write true"),
    "equal": ({**PAIR, "chosen": " green."}, "chosen and rejected are equal.*correct one of them or drop the record"),
    "empty": ({**PAIR, "rejected": " \n"}, "rejected is empty; give it text, or drop the record"),
    "no prompt": ({**PAIR, "prompt": "  "}, "prompt is empty; give it text"),
    "no query": ({"query": "", "responses": ["a", "b"], "scores": [1, 2]}, "query is empty"),
    "implicit": ({"chosen": "yes", "rejected": "no"}, "begin differently, so no prompt is in both; add a field prompt"),
    "space": ({"chosen": "  yes", "rejected": "  no"}, "share no beginning but space; add a field prompt"),
    "hollow": ({"chosen": "", "rejected": "no"}, "chosen is empty; give it the prompt and a completion"),
    "few": ({**RANKED, "completions": ["a"], "scores": [1]}, "completions holds 1; a ranking takes two or more"),
    "lengths": ({**RANKED, "scores": [1, 2]}, "2 scores for 3 completions; give one score per completion"),
    "nan": ({**RANKED, "scores": [1, float("nan"), 2]}, "score 2 is nan; write a finite number, higher is better"),
    "inf": ({**RANKED, "scores": [1, 2, float("-inf")]}, "score 3 is -inf; write a finite number"),
    "bool": ({**RANKED, "scores": [True, 1, 2]}, "score 1 is true; write a finite number"),
    "text": ({**RANKED, "scores": "high"}, "scores is 'high'; write a list of numbers, one per completion"),
    "one text": ({**RANKED, "completions": "abc"}, "completions is 'abc'; write a list of two or more completions"),
    "hollow one": ({**RANKED, "completions": ["a", "", "c"]}, "completion 2 is empty"),
    "unrated": (
        {"instruction": "p", "completions": [{"response": "a", "overall_score": 1}, {"response": "b"}]},
        "not every completion has a score; give all of them overall_score or fine-grained_score",
    ),
    "bare": ({"instruction": "p", "completions": ["a", "b"]}, "completion 1 is 'a'; .*write objects with response"),
    "sorts": ({**CHAT_PAIR, "prompt": "p"}, "so no prompt is in both; add a field prompt that holds"),
    "mixed": ({**CHAT_PAIR, "chosen": "yes"}, "one of chosen and rejected is text, the other messages; write both"),
    "wrap": ({"prompt": [USER], "completion": "c"}, "prompt is messages, completion is text; write both in the same"),
    "no role": ({**CHAT_PAIR, "prompt": [{"content": "x"}]}, "message 1 of prompt has no role as text: .*write"),
    "from": ({**CHAT_PAIR, "prompt": [{"from": "human", "value": "x"}]}, "rename from and value to role and content"),
    "content": ({**CHAT_PAIR, "chosen": [{"role": "assistant"}]}, "message 1 of chosen has no content as text"),
    "parts": ({**CHAT_PAIR, "chosen": [{**GOOD, "content": [{"type": "text"}]}]}, "has no content as text"),
    "no turn": ({**CHAT_PAIR, "prompt": []}, "prompt has no message; give it at least the user's turn"),
    "system": ({**CHAT_PAIR, "prompt": [SYSTEM]}, "prompt ends on a message of 'system'; it must end on a turn"),
    "asks": ({**CHAT_PAIR, "chosen": [GOOD, USER]}, "chosen ends on a turn of 'user'; it must end on a turn of"),
    "silent": ({**CHAT_PAIR, "rejected": [{**BAD, "content": " "}]}, "rejected ends on an empty message; give it"),
    "twice": ({**CHAT_PAIR, "chosen": [SYSTEM, USER, GOOD]}, "chosen repeats the whole prompt.*in prompt only"),
    "half": ({**PAIR, "chosen": "a\ud83d"}, r"chosen holds half a character \(\\ud83d\); write the character whole"),
    "weight": ({**PAIR, "weight": -1}, "weight is -1; write a finite number, 0 or more"),
    "logps": ({**PAIR, "ref_chosen_logps": "x"}, "ref_chosen_logps is 'x'; write a finite number, or leave"),
    "margin": ({**PAIR, "margin_chosen": []}, r"margin_chosen is \[\]; write a finite number, or a list of them"),
    "kwargs": ({**PAIR, "chat_template_kwargs": 1}, "chat_template_kwargs is 1; write an object"),
    "tools": ({**PAIR, "tools": "{}"}, r"tools is '\{\}'; write a list of tool descriptions"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*BROKEN, *WRONG])
def test_a_bad_record_is_named_with_line_and_remedy(tmp_path, name):
    line, message = {**BROKEN, **WRONG}[name]
    if name in WRONG:
        line = json.dumps(line).encode()
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n" + line + b"\n")
    with pytest.raises(UserError, match=rf"(?s)^{path}:2: .*{message}") as caught:
        list(read(path))
    assert "\n" not in str(caught.value)
    assert [str(problem) for problem in problems(path)] == [str(caught.value)]


def test_examples_come_before_the_first_bad_record_and_all_bad_ones_are_listed(tmp_path):
    path = save(tmp_path / "a.jsonl", [PAIR, {**PAIR, "chosen": ""}, PAIR, UNPAIRED, CHAT_PAIR])
    examples = read(path)
    assert next(examples).where == f"{path}:1"
    with pytest.raises(UserError, match=r"a\.jsonl:2: chosen is empty"):
        next(examples)
    assert [problem.where for problem in problems(path)] == [f"{path}:{line}" for line in (2, 4, 5)]
    *_, other, chat = problems(path)
    assert other.what.startswith(f"this is unpaired (prompt, completion, label), the records from {path}:1 on are pair")
    assert "this is chat messages" in chat.what
    assert "a file of its own" in chat.what


def test_a_pair_without_its_prompt_among_pairs_with_one_is_not_taken_for_an_implicit_one(tmp_path):
    # Its prompt would be the " bl" that the two happen to share.
    path = save(tmp_path / "a.jsonl", [PAIR, {"chosen": " blue", "rejected": " black"}])
    (problem,) = problems(path)
    assert problem.what.startswith("this is pair with the prompt in both")


def test_a_byte_order_mark_is_tolerated_and_utf_16_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIR).encode() + b"\r\n\r\n")
    assert len(list(read(path))) == 1
    assert survey(path).blank == 1
    path.write_text(json.dumps(PAIR), encoding="utf-16")
    with pytest.raises(UserError, match=r"a\.jsonl:1: the file is UTF-16; save it as UTF-8"):
        list(read(path))
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf \n" + json.dumps([PAIR]).encode())
    assert next(read(path)).where == f"{path}:2, item 1"


def test_a_truncated_archive_is_named_where_it_breaks(tmp_path):
    rows = [{"prompt": f"{i * 7919 % 10007}"} for i in range(3000)]
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    (problem,) = problems(path)
    assert "the compressed file is damaged from here on" in problem.what
    assert 0 < int(problem.where.rsplit(":", 1)[1]) < 3000
    path.write_bytes(b"plain text")
    with pytest.raises(UserError, match=r"a\.jsonl\.gz:1: the compressed file is damaged"):
        list(read(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"prompt": "a"},\n {"prompt" "b"}]', r":2, item 2: not JSON at column 12: Expecting ':' delimiter"),
        ('[{"prompt": "a"}\n {"prompt": "b"}]', r":2, item 1: not JSON at column 2: expected ',' or '\]'"),
        ('[{"prompt": "a"},\n]', r":2, item 2: not JSON at column 1: .*value"),
        ('[{"prompt": "a"}', r":1, item 1: not JSON at column 17: expected ',' or '\]'"),
        ('[{"prompt": "a"}] {}', ":1, item 1: not JSON at column 19: expected nothing after"),
        ('[{"prompt": "a"}, {"prompt": "', ":1, item 2: not JSON at column 30: Unterminated string"),
        ('[{"prompt": "a"}, 12]', ":1, item 2: a record is an object with named fields, not 12"),
        ('[{"prompt": "a"}, ' + "1" * 5000 + "]", ":1, item 2: not JSON at column 19: Exceeds the limit"),
    ],
)
def test_a_broken_array_is_named_where_it_breaks(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    examples = read(path)
    assert next(examples).prompt == "a"
    with pytest.raises(UserError, match=message):
        next(examples)


def test_a_byte_that_is_not_utf_8_costs_an_array_one_item(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes('[{"prompt": "ü"},\n{"prompt": "'.encode() + b"\xe9" + b'"}, {"prompt": "c"}]')
    (problem,) = problems(path)
    assert str(problem) == f"{path}:2, item 2: not UTF-8 (byte 0xe9); save the file as UTF-8"
    assert survey(path).records == 2


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=30) | st.integers() | st.floats(allow_nan=False))),
    st.sampled_from([None, 1]),
    st.integers(1, 9),
)
def test_an_array_read_in_pieces_is_what_json_reads(scratch, columns, indent, chunk):
    """However the pieces fall: across strings, escapes, numbers and literals."""
    from counterproof.preference import data

    path = scratch / "a.json"
    rows = [{"x": more, "t": [True, None, -1.5e-7], "prompt": "p"} for more in columns]
    path.write_text(json.dumps(rows, indent=indent), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "CHUNK", chunk)
        assert [value for _, value in data._json_array(path)] == json.loads(path.read_text())


def test_rows_of_a_table_that_are_not_utf_8_are_named(tmp_path):
    import pyarrow
    import pyarrow.parquet

    prompts = pyarrow.array([b"a", b"\xe9", b"c"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": prompts}), tmp_path / "a.parquet")
    (problem,) = problems(tmp_path / "a.parquet")
    assert str(problem).startswith(f"{tmp_path / 'a.parquet'}, row 2: text that is not UTF-8")
    assert survey(tmp_path / "a.parquet").records == 2


# streaming


def large(path, rows):
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        batch = pyarrow.table({"prompt": [f"{i} " + "words " * 100 for i in range(1000)]})
        with pyarrow.parquet.ParquetWriter(path, batch.schema) as writer:
            for _ in range(rows // 1000):
                writer.write_table(batch)
        return path
    lines = (json.dumps({"prompt": f"{i} " + "words " * 100}) for i in range(rows))
    with path.open("w") as file:
        file.write("[" + ",\n".join(lines) + "]" if path.suffix == ".json" else "\n".join(lines))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, suffix):
    peaks = []
    for rows in (1000, 5000):
        path = large(tmp_path / f"{rows}{suffix}", rows)
        list(itertools.islice(read(path), 3))  # imports
        tracemalloc.start()
        assert sum(1 for _ in read(path)) == rows
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0] + 50_000
    assert peaks[1] < path.stat().st_size / 4 or suffix == ".parquet"


def test_reading_stops_where_the_reader_stops(tmp_path, monkeypatch):
    """Of 50,000 lines, those that are not asked for are not parsed; the last is broken and not reached."""
    from counterproof.preference import data

    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "p"}\n' * 50_000 + "broken")
    parsed = []
    monkeypatch.setattr(data, "_parsed", lambda *args, real=data._parsed: parsed.append(1) or real(*args))
    assert len(list(itertools.islice(read(path), 10))) == 10
    assert len(parsed) == 10
    with pytest.raises(UserError, match=r"a\.jsonl:50001: not JSON"):
        list(read(path))


def test_neither_torch_nor_pandas_is_imported_to_read(tmp_path):
    from datasets import Dataset

    save(tmp_path / "a.jsonl", [PAIR])
    Dataset.from_list([PAIR]).save_to_disk(tmp_path / "saved")
    code = f"""
import sys
from counterproof.preference import read, survey
assert not {{"pyarrow", "datasets", "transformers"}} & set(sys.modules)
print(survey({str(tmp_path / "a.jsonl")!r}).records, len(list(read({str(tmp_path / "saved")!r}))))
print(sorted({{"torch", "pandas", "datasets", "transformers"}} & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.split("\n")[:2] == ["1 1", "[]"], ran.stderr


# conversions


def ranking(*scores, completions=None, prompt="p"):
    completions = completions or tuple(f"c{i}" for i in range(len(scores)))
    return Example(prompt=prompt, completions=completions, scores=tuple(map(float, scores)), kind="ranked", where="r:1")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=5), st.sampled_from(["best_worst", "best_vs_rest", "all"]))
def test_pairs_of_a_ranking(scores, strategy):
    """Against the definition: which two are compared, which of them is better, which are equal."""
    example = ranking(*scores)
    pairs = to_pairs([example], strategy)
    made = list(pairs)
    order = sorted(range(len(scores)), key=lambda i: -scores[i])  # stable: the first of equals leads
    compared = {
        "best_worst": {frozenset((order[0], min(i for i in order if scores[i] == min(scores))))},
        "best_vs_rest": {frozenset((order[0], i)) for i in order[1:]},
        "all": set(map(frozenset, itertools.combinations(order, 2))),
    }[strategy]
    unequal = {pair for pair in compared if len({scores[i] for i in pair}) == 2}
    found = {frozenset(int(c[1:]) for c in pair.completions) for pair in made}
    assert found == unequal
    assert len(made) == len(unequal)
    assert pairs.ties == len(compared) - len(unequal)
    for pair in made:
        better, worse = (int(c[1:]) for c in pair.completions)
        assert scores[better] > scores[worse]
        assert (pair.columns["score_chosen"], pair.columns["score_rejected"]) == (scores[better], scores[worse])
        assert (pair.kind, pair.scores, pair.where, pair.prompt) == ("pair", (1.0, 0.0), "r:1", "p")


def test_equal_completions_make_no_pair_and_are_counted():
    pairs = to_pairs([ranking(1, 2, 3, completions=("a", "b", "a"))], "all")
    assert [pair.completions for pair in pairs] == [("b", "a"), ("a", "b")]
    assert (pairs.ties, pairs.identical) == (0, 1)


def test_pairs_pass_and_other_kinds_have_none(one):
    pair = one(PAIR)
    assert list(to_pairs([pair])) == [pair]
    with pytest.raises(UserError, match=r"one\.jsonl:1: no pair can be made of one unpaired; give pairs or rankings"):
        list(to_pairs([one(UNPAIRED)]))
    with pytest.raises(ValueError, match="strategy 'best'; expected one of best_worst, best_vs_rest, all"):
        to_pairs([pair], "best")


def test_rankings_are_unpaired_at_a_threshold(one):
    found = list(to_unpaired([ranking(1, 2, 3)], threshold=2))
    assert [(e.completions, e.scores, e.columns["score"]) for e in found] == [
        (("c0",), (0.0,), 1.0),
        (("c1",), (1.0,), 2.0),
        (("c2",), (1.0,), 3.0),
    ]
    with pytest.raises(UserError, match="r:1: a ranking says what is better, not what is good; give a threshold"):
        list(to_unpaired([ranking(1, 2)]))
    with pytest.raises(UserError, match="prompt: nothing says how good it is"):
        list(to_unpaired([one({"prompt": "p"})]))
    with pytest.raises(ValueError, match="threshold is nan"):
        to_unpaired([], threshold=float("nan"))
    assert list(to_unpaired([one(UNPAIRED)])) == [one(UNPAIRED)]


def test_conversions_and_splits_read_only_what_is_asked_for():
    read_so_far = []

    def source():
        for i in itertools.count():
            read_so_far.append(i)
            yield ranking(1, 2, prompt=f"{i}")

    for stream in (to_pairs(source()), to_unpaired(source(), 1.5), split(source(), 0.0)[0]):
        read_so_far.clear()
        list(itertools.islice(stream, 5))
        assert len(read_so_far) <= 5


def test_a_split_is_by_prompt_and_adding_rows_moves_nothing():
    examples = [ranking(1, 2, prompt=f"prompt {i % 400}") for i in range(1200)]
    train, held = map(list, split(examples, 0.25, seed=3))
    assert len(train) + len(held) == 1200
    assert not {e.prompt for e in train} & {e.prompt for e in held}
    # 400 prompts, each held out with probability 1/4: within four standard deviations.
    assert abs(len(held) / 3 - 100) < 4 * (400 * 0.25 * 0.75) ** 0.5
    fewer = list(split(examples[::7], 0.25, seed=3)[1])
    assert all(e in held for e in fewer)
    assert {e.prompt for e in split(examples, 0.25, seed=4)[1]} != {e.prompt for e in held}
    # A larger share holds out the same prompts and more.
    assert {e.prompt for e in held} <= {e.prompt for e in split(examples, 0.4, seed=3)[1]}
    assert survey(train, against=held).leaks.prompts == 0
    shouted = [replace(e, prompt=f" {e.prompt.upper()}\n") for e in held]
    assert len(list(split(shouted, 0.25, seed=3)[1])) == len(held)


@pytest.mark.parametrize(("share", "sizes"), [(0, (50, 0)), (1, (0, 50))])
def test_the_ends_of_a_split(share, sizes):
    assert tuple(len(list(side)) for side in split([ranking(1, 2, prompt=f"{i}") for i in range(50)], share)) == sizes
    with pytest.raises(ValueError, match=r"share 1\.5; expected a number from 0 to 1"):
        split([], 1.5)


def test_an_example_that_contradicts_its_kind_is_refused():
    with pytest.raises(ValueError, match="pair: 1 completions, 1 scores; expected 2 of each"):
        Example(prompt="p", completions=("a",), scores=(1.0,), kind="pair")
    with pytest.raises(ValueError, match=r"a pair has \(1, 0\)"):
        Example(prompt="p", completions=("a", "b"), scores=(2.0, 1.0), kind="pair")
    with pytest.raises(ValueError, match="ranked: 1 completions"):
        Example(prompt="p", completions=("a",), scores=(2.0,), kind="ranked")


# writing


texts = st.text(min_size=1).filter(str.strip)
plain = st.one_of(
    st.builds(lambda p, a, b: {"prompt": p, "chosen": a + "1", "rejected": b + "2"}, texts, texts, texts),
    st.builds(lambda p, c, label: {"prompt": p, "completion": c, "label": label}, texts, texts, st.booleans()),
    st.builds(
        lambda p, a, x, b, y: {"prompt": p, "completions": [a, b], "scores": [x, y]},
        texts, texts, st.floats(-9, 9), texts, st.floats(-9, 9),
    ),
    st.builds(lambda p: {"prompt": p, "source": {"n": None, "é": [1, 2.5, "x"]}}, texts),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(plain)
def test_what_is_written_is_read_again(scratch, row):
    first = list(read(save(scratch / "a.jsonl", [row])))
    assert write(first, scratch / "b.jsonl", overwrite=True) == 1
    assert json.loads((scratch / "b.jsonl").read_text(encoding="utf-8")) == row
    assert contents(read(scratch / "b.jsonl")) == contents(first)


@pytest.mark.parametrize(
    "row",
    [
        CHAT_PAIR,
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"query": "p", "responses": ["a", "b"], "scores": [1, 2]},
    ],
)
def test_other_ways_to_write_it_come_out_in_trls(tmp_path, row):
    from datasets import load_dataset

    first = list(read(save(tmp_path / "a.jsonl", [row])))
    write(first, tmp_path / "b.jsonl")
    assert contents(read(tmp_path / "b.jsonl")) == contents(first)
    (theirs,) = load_dataset(
        "json", data_files=str(tmp_path / "b.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert theirs["prompt"] == first[0].prompt
    assert tuple(theirs.get("completions") or (theirs["chosen"], theirs["rejected"])) == first[0].completions


def test_a_file_that_is_there_stays_unless_it_may_go(tmp_path):
    path = save(tmp_path / "a.jsonl", [PAIR, {**PAIR, "prompt": "Grass is"}])
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"a\.jsonl exists and is left as it is; name another file"):
        write(read(path), path)
    assert path.read_bytes() == before
    assert write(to_unpaired(read(path)), path, overwrite=True) == 4  # even out of itself
    assert [e.kind for e in read(path)] == ["unpaired"] * 4


def test_a_failed_write_leaves_nothing(tmp_path, one):
    path = save(tmp_path / "a.jsonl", [PAIR, {**PAIR, "chosen": ""}])
    with pytest.raises(UserError, match=r"a\.jsonl:2: chosen is empty"):
        write(read(path), tmp_path / "b.jsonl")
    with pytest.raises(UserError, match=r"unpaired \(plain text\) after pair \(plain text\); write each to a file"):
        write([one(PAIR), one(UNPAIRED)], tmp_path / "b.jsonl")
    for value in (float("nan"), b"bytes", {1}):
        with pytest.raises(UserError, match=r"cannot be written as JSON.*drop or convert that column"):
            write([replace(one(PAIR), columns={"x": value})], tmp_path / "b.jsonl")
    with pytest.raises(UserError, match="the column label has the name of a field of the format; rename it"):
        write(to_unpaired([one({**PAIR, "label": "x"})]), tmp_path / "b.jsonl")
    with pytest.raises(UserError, match=r"b\.parquet: JSON lines are written; name a file that ends in .jsonl"):
        write([one(PAIR)], tmp_path / "b.parquet")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", "one.jsonl"]


def test_half_a_character_in_a_column_survives(tmp_path, one):
    write([replace(one(PAIR), columns={"x": "\ud83d ü"})], tmp_path / "b.jsonl")
    assert next(read(tmp_path / "b.jsonl")).columns == {"x": "\ud83d ü"}


# what is in it


def test_lengths_are_numpys(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        {"prompt": "p " * int(a), "chosen": "c" * int(b), "rejected": "r" * int(c)}
        for a, b, c in rng.integers(1, 60, (101, 3))
    ]
    found = survey(save(tmp_path / "a.jsonl", rows))
    for role in ("prompt", "chosen", "rejected"):
        for unit, size in (("characters", len), ("words", lambda text: len(text.split()))):
            values = [size(row[role]) for row in rows]
            of = found.lengths[unit][role]
            expected = (np.mean(values), np.median(values), np.quantile(values, 0.95), max(values))
            np.testing.assert_allclose((of.mean, of.median, of.p95, of.longest), expected)
            assert of.count == len(values)
    assert found.chosen_longer["characters"] == np.mean([len(r["chosen"]) > len(r["rejected"]) for r in rows])
    assert found.chosen_longer["words"] == 0


def test_duplicates_contradictions_and_repeats():
    def pair(prompt, chosen, rejected):
        return Example(prompt=prompt, completions=(chosen, rejected), scores=(1.0, 0.0), kind="pair")

    found = survey(
        [
            pair("p", "a", "b"),
            pair("p", "a", "b"),  # duplicate
            pair("p", "b", "a"),  # contradiction
            pair("p", "b", "a"),  # duplicate of the contradiction, which counts once
            pair("P ", "a", "b"),  # not the same text: only the prompt repeats
            pair("q", "a", "b"),
        ]
    )
    assert (found.records, found.prompts, found.repeated_prompts) == (6, 2, 4)
    assert (found.duplicates, found.contradictions) == (2, 1)
    assert (found.completions_per_prompt.mean, found.completions_per_prompt.longest) == (6, 10)
    single = [
        Example(prompt="p", completions=(text,), scores=(score,), kind="unpaired")
        for text, score in (("a", 1.0), ("a", 0.0), ("b", 1.0), ("b", 1.0))
    ]
    assert (survey(single).duplicates, survey(single).contradictions) == (1, 1)


def test_ties_and_roles_of_rankings():
    found = survey([ranking(1, 1, 1), ranking(2, 1, 1, 2), ranking(0, 5, completions=("long", "s"))])
    assert found.ties == 3 + 2
    roles = found.lengths["characters"]
    assert roles["completion"].count == 9
    assert roles["chosen"].count == roles["rejected"].count == 2  # all equal: neither best nor worst
    assert roles["rejected"].longest == 4
    assert found.chosen_longer["characters"] == 0


def test_leaks_are_found_whatever_case_and_space(tmp_path):
    train = save(tmp_path / "train.jsonl", [PAIR, {"prompt": "Grass", "chosen": "a", "rejected": "b"}])
    rows = [
        {"prompt": " the  SKY\nis", "chosen": "Red.", "rejected": "Blue. "},  # prompt and completion
        {"prompt": "grass", "chosen": "x", "rejected": "y"},  # prompt only
        {"prompt": "Snow", "chosen": " blue.", "rejected": "green"},  # a completion of another prompt
    ]
    test = save(tmp_path / "test.jsonl", rows)
    leaks = survey(test, against=train).leaks
    assert (leaks.prompts, leaks.completions, leaks.where) == (2, 1, (f"{test}:1", f"{test}:2"))
    assert leaks == survey(read(test), against=train).leaks
    assert survey(test, against=list(read(train))).leaks.against == "the other examples"
    chat = save(tmp_path / "chat.jsonl", [{"prompt": [{"role": "user", "content": "grass"}]}])
    assert survey(chat, against=train).leaks.prompts == 1
    with pytest.raises(UserError, match=r"bad\.jsonl:1: "):
        survey(test, against=save(tmp_path / "bad.jsonl", [{}]))


def test_a_survey_lists_the_bad_and_is_shown_as_text_and_json(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [PAIR, {**PAIR, "chosen": ""}, PAIR, {**PAIR, "prompt": "Grass is"}, {"prompt": 1}]
    path.write_text("\n\n".join(map(json.dumps, rows)))
    found = survey(path, against=[next(read(path))])
    assert [problem.where for problem in found.problems] == [f"{path}:3", f"{path}:9"]
    assert (found.records, found.blank, found.duplicates) == (3, 4, 1)
    again = json.loads(json.dumps(found.as_json()))
    assert again["kinds"] == {"pair": 3}
    assert again["problems"][0] == {"where": f"{path}:3", "what": "chosen is empty; give it text, or drop the record"}
    assert again["lengths"]["words"]["chosen"]["longest"] == 1
    assert again["leaks"]["prompts"] == 2
    text = found.text()
    for line in (
        "3 (3 pair)",
        "2 different; repeated by records: 1",
        f"  {path}:9: ",
        "4, skipped",
        "2, records with a",
    ):
        assert line in text
    table = [line for line in text.splitlines() if line.startswith(("length", "prompt,", "chosen,", "rejected,"))]
    assert len({len(line) for line in table}) == 1
    assert len(table) == 1 + 2 * 3


def test_a_survey_keeps_hashes_and_not_texts():
    def examples(size):
        for i in range(600):
            yield ranking(1, 2, prompt=f"{i}" + "p" * size, completions=("a" * size, "b" * size))

    def peak(size):
        tracemalloc.start()
        survey(examples(size), against=examples(size))
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    peak(1)
    assert abs(peak(4000) - peak(10)) < 200_000  # the texts are 7 MB
