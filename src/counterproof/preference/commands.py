"""counterproof preference: look at preference data, train with a method, list the methods."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from transformers import TrainerCallback

as_json = click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")


@click.group()
def commands() -> None:
    """Align a language model with your preferences: look at the data, choose a method, train."""


@commands.command()
@as_json
def methods(as_json: bool) -> None:
    """List the methods that train takes, with their hyper-parameters."""
    from counterproof.preference.trainer import methods

    rows: list[dict[str, Any]] = []
    for name, method in methods().items():
        options: dict[str, Any] = {}
        if is_dataclass(method):
            options = {field.name: None if field.default is MISSING else field.default for field in fields(method)}
        says = (method.__doc__ or "").strip().splitlines()[0]
        rows.append({"method": name, "says": says, "options": options})
    if as_json:
        click.echo(json.dumps(rows, default=str))
        return
    for row in rows:
        click.echo(row["method"], nl=False)
        given = ", ".join(f"{name}={value}" for name, value in row["options"].items())
        click.echo(f"  ({given})" if given else "")
        click.echo(f"    {row['says']}")


@commands.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--against", type=click.Path(path_type=Path), help="Another split, to look for leaks.")
@click.option("--model", help="Count tokens with this model's tokenizer: a folder, a hub id, or smollm2.")
@as_json
def survey(data: Path, against: Path | None, model: str | None, as_json: bool) -> None:
    """Read preference data and report: counts, lengths, ties, duplicates, leaks, bad records by file and line."""
    from counterproof.preference.data import survey

    tokenizer = None
    if model is not None:
        from counterproof.language import load

        tokenizer = load(model).tokenizer
    found = survey(data, tokenizer, against=against)
    click.echo(json.dumps(found.as_json(), ensure_ascii=False) if as_json else found.text())


def hyper_parameter(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals:
            raise click.BadParameter(f"{value!r} is not NAME=VALUE, such as beta=0.1")
        try:
            found[name.replace("-", "_")] = json.loads(text)
        except json.JSONDecodeError:
            found[name.replace("-", "_")] = text
    return found


def setting_options(command: Any) -> Any:
    """An option for every field of TrainSettings, whose docstring explains them."""
    explained = {
        "epochs": (float, "Passes over the data."),
        "steps": (int, "Optimizer steps, in place of epochs."),
        "batch": (int, "Prompts per step."),
        "learning_rate": (float, "At its highest; a tenth or less for full fine-tuning."),
        "schedule": (click.Choice(["cosine", "linear", "constant"]), "After the warm-up."),
        "warmup": (float, "Share of the steps over which the rate rises."),
        "lora": (int, "Rank of the adapter; 0 trains all parameters."),
        "max_length": (int, "Tokens; a longer prompt loses its beginning."),
        "micro_tokens": (int, "Tokens in memory at a time."),
        "evaluate_every": (int, "Steps; default ten times in all."),
        "checkpoint_every": (int, "Steps; default with every evaluation."),
        "samples": (int, "Held-out prompts answered per evaluation, for KL and length."),
        "sample_tokens": (int, "Longest of these answers."),
        "held_out": (float, "Share of prompts kept for evaluation."),
        "seed": (int, "Of adapter, order and answers."),
    }
    for name, (kind, says) in reversed(explained.items()):
        command = click.option(f"--{name.replace('_', '-')}", name, type=kind, help=says)(command)
    return command


@commands.command()
@click.option("--method", default="dpo", show_default=True, help="See counterproof preference methods.")
@click.option("--set", "options", multiple=True, callback=hyper_parameter, metavar="NAME=VALUE",
              help="A hyper-parameter of the method, such as beta=0.1; repeatable.")  # fmt: skip
@click.option("--model", default="smollm2", show_default=True, help="A local folder, a GGUF file, or a hub id.")
@click.option("--data", required=True, type=click.Path(path_type=Path), help="JSONL, Parquet or a saved dataset.")
@click.option("--held-out-data", type=click.Path(path_type=Path), help="For evaluation; default a share of --data.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the adapter or model.")
@click.option("--limit", type=click.IntRange(1), help="Read so many examples only.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option("--dtype", default="float32", show_default=True, help="float32, bfloat16 or float16.")
@setting_options
@as_json
def train(
    method: str,
    options: dict[str, Any],
    model: str,
    data: Path,
    held_out_data: Path | None,
    out: Path,
    limit: int | None,
    device: str,
    dtype: str,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train a model on preferences; with LoRA, OUT becomes an ordinary peft adapter folder.

    Stop it at any time: the same command goes on from the last checkpoint.
    """
    from counterproof.preference.trainer import TrainingDiverged, TrainSettings, find_method, train

    chosen = find_method(method, **options)
    wanted = TrainSettings(**{name: value for name, value in settings.items() if value is not None})
    with progress() as (callback, watch):
        try:
            done = train(
                model,
                data,
                method=chosen,
                out=out,
                held_out=held_out_data,
                settings=wanted,
                device=device,
                dtype=dtype,
                limit=limit,
                callbacks=[callback],
                watch=watch,
            )
        except TrainingDiverged as problem:
            click.echo(f"counterproof: {problem}", err=True)
            sys.exit(1)
        except KeyboardInterrupt:
            click.echo("counterproof: interrupted; the same command goes on from the last checkpoint", err=True)
            sys.exit(130)
    for note in done.notes:
        click.echo(f"note: {note}", err=True)
    final = {name.removeprefix("eval_"): value for name, value in done.final.items() if name.startswith("eval_")}
    if as_json:
        click.echo(json.dumps({"out": str(out), "method": method, "final": final, "notes": list(done.notes)}))
        return
    for name, value in final.items():
        click.echo(f"{name:16} {value:.4g}")
    click.echo(f"saved to {out}")


@contextmanager
def progress() -> "Iterator[tuple[TrainerCallback, Any]]":
    """A bar on a terminal, a line per evaluation elsewhere; both on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from transformers import TrainerCallback

    console = Console(stderr=True)
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
        console=console,
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    row = bars.add_task("loading", total=None, state="")

    class Callback(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            bars.update(row, description="training", total=state.max_steps, completed=state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            bars.update(row, completed=state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
            logs = logs or {}
            if "loss" in logs:
                bars.update(row, state=f"loss {float(logs['loss']):.4f}")
            if "eval_loss" in logs:
                shown = ("eval_loss", "eval_accuracy", "eval_margin", "eval_kl", "eval_length")
                values = ", ".join(f"{n.removeprefix('eval_')} {float(logs[n]):.4g}" for n in shown if n in logs)
                console.print(f"step {state.global_step} of {state.max_steps}: {values}", highlight=False)

    def watch(what: str, done: int, of: int) -> None:
        bars.update(row, description=what, total=of, completed=done)

    with bars:
        yield Callback(), watch
