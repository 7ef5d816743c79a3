"""The command line as a newcomer meets it, on a third party's small paper."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import click
import pytest
from click.testing import CliRunner

from counterproof.cli import cli, run_claims
from counterproof.page.catalogue import ROOMS, papers
from lab.claims import make_claim

PLANNED = [paper.slug for paper in papers().values() if paper.status == "planned"]
RUNNING = {paper.room for paper in papers().values() if paper.status == "runs"}

FIELDS = """paper claim says task metric better unit effect_kind baseline method effect interval level e_value seeds
verdict reported seconds budget device cached"""


def commands(group, path=()):
    context = click.Context(group)
    for name in group.list_commands(context):
        yield (*path, name)
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


@pytest.mark.parametrize("path", list(commands(cli)), ids=" ".join)
def test_every_command_has_help(path):
    result = CliRunner().invoke(cli, [*path, "--help"])
    assert result.exit_code == 0
    assert len(result.output.split("Options:")[0].split()) > 8
    assert "\x00" not in result.output


def test_every_option_has_help():
    for path in commands(cli):
        command = cli
        for name in path:
            command = command.get_command(click.Context(command), name)
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert parameter.help, f"{' '.join(path)} {parameter.name}"


def test_papers_are_listed(plugin):
    done = plugin("papers", "--json")
    listed = json.loads(done.stdout)
    assert len(listed) == 51
    assert listed[-1]["slug"] == "shrunken-mean"
    assert len(plugin("papers", "--room", "rewards").stdout.splitlines()) > 4


def test_a_paper_is_shown(plugin):
    done = plugin("show", "shrunken-mean")
    assert "counterproof check shrunken-mean" in done.stdout
    assert json.loads(plugin("show", "group-detr", "--json").stdout)["arxiv"] == "2207.13085"


def test_a_paper_is_traced_to_its_roots(plugin):
    done = plugin("show", "group-detr", "--history")
    assert "Hungarian method" in done.stdout, done.stderr
    found = json.loads(plugin("show", "group-detr", "--history", "--json").stdout)
    assert found["id"] == "group-detr"
    assert {"detr-2020"} <= {root["id"] for root in found["roots"]}


def test_papers_are_found(plugin):
    found = json.loads(plugin("search", "shrunk", "noisy", "mean", "--json").stdout)
    assert found[0]["slug"] == "shrunken-mean"
    nothing = plugin("search", "qqqqqq")
    assert (nothing.returncode, nothing.stdout) == (0, "")
    assert "nothing found" in nothing.stderr


def test_a_check_gives_its_verdict_and_is_cached(plugin):
    done = plugin("check", "shrunken-mean", "--json")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert set(FIELDS.split()) <= set(found)
    assert found["verdict"] == "holds"
    assert found["cached"] is False
    assert "shrunken-mean/main" in done.stderr  # progress
    again = json.loads(plugin("check", "shrunken-mean/main", "--json").stdout)
    assert again["cached"] is True
    assert again["keys"] == found["keys"]
    text = plugin("check", "shrunken-mean").stdout
    assert "HOLDS" in text
    assert "what the paper reports" in text
    assert plugin("check", "shrunken-mean", "--strict").returncode == 0


def test_strict_says_when_a_claim_does_not_hold(plugin):
    assert plugin("check", "shrunken-mean", "--strict", "--seeds", "2:2").returncode == 3
    assert plugin("check", "shrunken-mean", "--seeds", "2:2").returncode == 0


def test_a_failed_trial_is_exit_code_1(plugin):
    module = plugin.python.parent.parent / "lib"
    (method,) = module.glob("python*/site-packages/elsewhere/papers/shrunken_mean.py")
    text = method.read_text()
    try:
        method.write_text(text.replace("if values.size == 0:", "if values.size:\n        raise OSError('gone')"))
        done = plugin("check", "shrunken-mean", "--json")
        assert done.returncode == 1
        assert json.loads(done.stdout)["failed"] == {"baseline": 0, "method": 4}
        shown = plugin("check", "shrunken-mean")
        assert "OSError: gone" in shown.stdout
        key = json.loads(done.stdout)["keys"][1]
        assert "OSError: gone" in plugin("runs", "show", key[:10]).stdout
    finally:
        method.write_text(text)
    assert json.loads(plugin("check", "shrunken-mean", "--json").stdout)["verdict"] == "holds"
    explained = json.loads(plugin("runs", "explain", key[:10], "--json").stdout)
    assert explained["stale"] == ["module elsewhere.papers.shrunken_mean has changed"]


def test_arms_are_compared(plugin):
    done = plugin("compare", "shrunken-mean-task", "--arms", "mean,shrunken-mean", "--json")
    assert json.loads(done.stdout)["verdict"] == "holds"


def test_journals_travel(plugin, tmp_path):
    plugin("check", "shrunken-mean")
    out = tmp_path / "trials.jsonl"
    assert plugin("runs", "export", "--paper", "shrunken-mean", "--current", "--out", out).returncode == 0
    other = {"COUNTERPROOF_HOME": str(tmp_path / "other")}
    done = plugin("runs", "import", out, **other)
    count = len(out.read_text().splitlines())
    assert f"{count} new, 0 known" in done.stdout
    assert f"0 new, {count} known" in plugin("runs", "import", out, **other).stdout
    assert json.loads(plugin("check", "shrunken-mean", "--json", **other).stdout)["cached"] is True
    assert len(json.loads(plugin("runs", "list", "--json", **other).stdout)) == count
    assert "0 trials" in plugin("runs", "prune", "--stale", "--dry-run", **other).stdout
    assert "0 trials" in plugin("runs", "prune", "--failed", **other).stdout


def test_json_is_an_object_a_line_also_when_claims_need_more_evidence_to_stand_together(capsys):
    gains = (0.45, 0.46, *(k / 1e6 for k in range(6)))
    claims = [replace(make_claim(by=gain), name=f"gain-{gain}") for gain in gains]
    common = {"budget": "quick", "seeds": (4, 10), "jobs": 2, "engine": "local", "device": "cpu", "fresh": False}
    run_claims(claims, **common, strict=False, as_json=True)
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["claim"] for one in found] == [claim.name for claim in claims]
    assert any(one["seeds"] > 4 for one in found if one["verdict"] == "holds")


BAD = [
    (["show", "grup-detr"], "no paper 'grup-detr'; did you mean group-detr"),
    (["check", "zzzzzz"], "no paper 'zzzzzz'"),
    *[(["check", slug], f"{slug} is planned") for slug in PLANNED[:1]],
    (["check", "shrunken-mean/mian"], "no claim 'mian'; did you mean main"),
    (["check"], "say what to check"),
    (["check", "--all", "shrunken-mean"], "say what to check"),
    (["check", "--room", "judgin"], "no room 'judgin'; did you mean judging"),
    *[(["check", "--room", room], f"no paper of the room {room} runs yet") for room in ROOMS if room not in RUNNING][
        :1
    ],
    (["check", "shrunken-mean", "--budget", "huge"], "no budget 'huge'"),
    (["check", "shrunken-mean", "--seeds", "5:4"], "5:4"),
    (["check", "shrunken-mean", "--seeds", "many"], "not MIN:MAX"),
    (["check", "shrunken-mean", "--jobs", "0"], "--jobs"),
    (["check", "shrunken-mean", "--engine", "cloud"], "unknown engine 'cloud'"),
    (["check", "shrunken-mean", "--device", "cuda:77"], "--device cuda:77"),
    (["check", "shrunken-mean", "--device", "abacus"], "--device abacus"),
    (["compare", "shrunken-task", "--arms", "a,b"], "no task 'shrunken-task'; did you mean shrunken-mean-task"),
    (["compare", "shrunken-mean-task", "--arms", "mean,shrunk-mean"], "no arm 'shrunk-mean'; did you mean"),
    (["compare", "shrunken-mean-task", "--arms", "mean"], "two or more different arms"),
    (["compare", "shrunken-mean-task", "--arms", "mean,shrunken-mean", "--metric", "x"], "no metric 'x'"),
    (["compare", "shrunken-mean-task", "--arms", "mean,shrunken-mean", "--data", "."], "takes no --data"),
    (["compare", "shrunken-mean-task", "--arms", "mean,shrunken-mean", "--model", "m"], "takes no --model"),
    (["papers", "--room", "kitchen"], "no room 'kitchen'"),
    (["runs", "show", "nope"], "no trial has the key 'nope'"),
    (["runs", "prune"], "say which trials"),
    (["runs", "import", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
    (["report", "--out", "nowhere/page.html"], "no folder"),
    (["report", "--out", "."], "is a folder"),
    (["new", "Bad Slug", "--room", "video"], "is not a slug"),
    (["new", "group-detr", "--room", "video"], "is taken by"),
    (["new", "fine", "--room", "video", "--into", "src"], "is not a package"),
    (["frobnicate"], "No such command 'frobnicate'"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_bad_usage_is_one_clear_line_and_exit_code_2(plugin, words, message):
    done = plugin(*words)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("Usage:", "Try '")) and line]
    assert len(lines) == 1, done.stderr
    assert done.stdout == ""


@pytest.mark.skipif(not os.path.isdir("/proc/sys"), reason="needs a folder that even root cannot write")
def test_a_home_that_cannot_be_written_is_one_clear_line(plugin):
    done = plugin("check", "shrunken-mean", COUNTERPROOF_HOME="/proc/sys/home")
    assert done.returncode == 2
    assert "COUNTERPROOF_HOME" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_missing_extra_is_one_clear_line(monkeypatch):
    import importlib.metadata

    from counterproof.errors import MissingExtra, require

    real = importlib.metadata.version

    def without_torch(name):
        if name == "torch":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", without_torch)
    with pytest.raises(
        MissingExtra, match=r"torch is not installed; it comes with: pip install 'counterproof\[rewards\]'"
    ):
        require("rewards")


def test_a_broken_third_party_package_is_named(plugin, tmp_path):
    info = tmp_path / "broken-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[counterproof.papers]\nbroken = not_there.papers\n")
    done = plugin("papers", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert "broken = 'not_there.papers'" in done.stderr


def test_help_comes_without_the_heavy_libraries():
    ran = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "counterproof", "--help"], capture_output=True, text=True, check=True
    )
    loaded = {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines()}
    assert not loaded & {"torch", "numpy", "scipy", "rich"}
