"""counterproof detection: train a detector on your pictures, let it search, score it, look at the data."""

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from counterproof.errors import UserError

SPEC = "A COCO json, coco:FILE,PICTURES, or a folder in COCO or YOLO layout (yolo:FOLDER where it has both)"
as_json = click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
split = click.option("--split", type=click.Choice(["train", "val", "test"]), help="Which pictures of a YOLO folder.")
side = click.option("--side", type=click.IntRange(32), help="Longest side in pixels; default the model's own.")
batch = click.option("--batch", default=8, show_default=True, type=click.IntRange(1), help="Pictures at a time.")
device = click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")


@click.group()
def commands() -> None:
    """Find objects in your pictures: look at the data, train a detector, let it search, score it."""


def setting(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    """``NAME=VALUE`` pairs; a value is JSON, or else text."""
    found: dict[str, Any] = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not (equals and name):
            raise click.BadParameter(f"{value!r} is not NAME=VALUE, such as num_groups=11")
        try:
            found[name.replace("-", "_")] = json.loads(text)
        except json.JSONDecodeError:
            found[name.replace("-", "_")] = text
    return found


@commands.command()
@click.option("--data", required=True, help=f"{SPEC}.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A new folder for the detector.")
@click.option("--model", help="Train this detector on: a folder or a hub id. Default a small new Deformable DETR.")
@click.option("--method", default="baseline", show_default=True,
              help="An arm of counterproof compare detection, such as group-detr.")  # fmt: skip
@click.option("--set", "options", multiple=True, callback=setting, metavar="NAME=VALUE",
              help="A setting of the method, such as num_groups=11; repeatable.")  # fmt: skip
@click.option("--epochs", type=click.FloatRange(0, min_open=True),
              help="Passes over the pictures; default 30, for a new model 100.")  # fmt: skip
@click.option("--steps", type=click.IntRange(1), help="Optimizer steps, in place of epochs.")
@batch
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True),
              help="At its highest; default 1e-4, for a new model 1e-3.")  # fmt: skip
@click.option("--side", type=click.IntRange(32),
              help="Longest side of the pictures in pixels; default 640, for a new model 320.")  # fmt: skip
@click.option("--held-out", type=click.FloatRange(0, 1, min_open=True, max_open=True),
              help="Share of the pictures kept for evaluation; default a YOLO folder's own val, else 0.2.")  # fmt: skip
@click.option("--val", help="Data to evaluate on, in place of a share.")
@click.option("--ema", default=0.9997, show_default=True, type=click.FloatRange(0, 1, max_open=True),
              help="Decay of the moving average of the weights; 0 for none.")  # fmt: skip
@click.option("--precision", default="fp32", show_default=True, type=click.Choice(["fp32", "bf16"]),
              help="Of the passes through the model.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of weights, split and batches.")
@device
@click.option("--workers", default=0, show_default=True, type=click.IntRange(0), help="Processes that read pictures.")
@click.option("--looks", default=10, show_default=True, type=click.IntRange(1), help="Evaluations on the way.")
@as_json
def train(
    data: str,
    out: Path,
    model: str | None,
    method: str,
    options: dict[str, Any],
    val: str | None,
    device: str,
    workers: int,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train a detector on your pictures; OUT becomes an ordinary transformers checkpoint.

    OUT also gets training.json (settings, curve, scores), held-out.json (the pictures that were kept for evaluation),
    curve.png and detections.png. Stop it at any time, even with kill -9: the same command goes on from the last
    checkpoint. Nothing of a method is left in what is saved.
    """
    from counterproof.detection.runs import TrainSettings, train

    with quiet(), progress("reading") as tell:
        try:
            done = train(
                data,
                out,
                model=model,
                method=method,
                options=options,
                settings=TrainSettings(**settings),
                val=val,
                device=device,
                workers=workers,
                watch=tell,
            )
        except FloatingPointError as problem:
            click.echo(f"counterproof: {problem}; a lower --learning-rate may help", err=True)
            sys.exit(1)
        except KeyboardInterrupt:
            click.echo("counterproof: interrupted; the same command goes on from the last checkpoint", err=True)
            sys.exit(130)
    for note in done.notes:
        click.echo(f"note: {note}", err=True)
    if as_json:
        click.echo(json.dumps(done.as_json(), ensure_ascii=False))
        return
    click.echo(done.scores.text())
    click.echo(f"the detector is in {out}; the curve in {out / 'curve.png'}, pictures in {out / 'detections.png'}")
    spec = shlex.quote(done.held_out_spec)
    click.echo(f"score it again: counterproof detection eval --model {shlex.quote(str(out))} --data {spec}")


@commands.command()
@click.option("--model", required=True, help="A detector: a folder or a hub id.")
@click.option("--data", required=True, help=f"A picture, a folder of pictures, or data: {SPEC[2:]}.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The COCO results, a .json file.")
@click.option("--draw", type=click.Path(path_type=Path), help="A new folder for copies with the boxes drawn.")
@click.option("--threshold", type=click.FloatRange(0, 1),
              help="Least score; default 0 in the file, 0.3 in drawings.")  # fmt: skip
@side
@split
@batch
@device
@as_json
def predict(
    model: str,
    data: str,
    out: Path,
    draw: Path | None,
    threshold: float | None,
    side: int | None,
    split: str | None,
    batch: int,
    device: str,
    as_json: bool,
) -> None:
    """Let a detector search pictures: COCO results, at most 100 detections of each.

    With data that have annotations, ids are theirs, and classes are found in them by name. Plain pictures have none:
    they get the ids 1, 2, ... by path, classes the model's numbers, and OUT's name with .images.json in place of .json
    says what these mean.
    """
    from counterproof.detection.evaluation import write_results
    from counterproof.detection.outputs import check_ending
    from counterproof.detection.predicting import (
        LEAST_SCORE,
        copies,
        detect,
        draw_found,
        open_detector,
        open_pictures,
        write_pictures,
    )

    check_ending(out, (".json",))
    keep_inputs(out, data)
    with quiet(), progress("reading") as tell:
        detector = open_detector(model, side=side, device=device)
        pictures, plain = open_pictures(data, detector.labels, split=split)
        if draw is not None:
            copies(pictures, draw)
        results = detect(detector, pictures, batch=batch, threshold=threshold or 0.0, watch=told(tell, "searched"))
        write_results(results, out)
        beside = out.with_suffix(".images.json")
        if plain:
            write_pictures(pictures, beside)
        if draw is not None:
            least = LEAST_SCORE if threshold is None else threshold
            draw_found(pictures, results, draw, least_score=least, watch=told(tell, "drawn"))
    found = {
        "out": str(out),
        "pictures": len(pictures.pictures),
        "annotated": not plain,
        "detections": len(results),
        "images": str(beside) if plain else None,
        "drawn": None if draw is None else str(draw),
    }
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))
        return
    kind = "pictures without annotations" if plain else "pictures"
    click.echo(f"{len(results):,} detections in {len(pictures.pictures):,} {kind} of {data}: {out}")
    if plain:
        click.echo(f"ids of pictures and classes: {beside}")
    if draw is not None:
        click.echo(f"drawn: {draw}")


@commands.command("eval")
@click.option("--data", required=True, help=f"{SPEC}.")
@click.option("--model", help="A detector: a folder or a hub id.")
@click.option("--results", type=click.Path(path_type=Path), help="What a detector found: COCO results json.")
@click.option("--out", type=click.Path(path_type=Path),
              help="Also write .html (with pictures), .json or .csv.")  # fmt: skip
@side
@split
@batch
@device
@as_json
def evaluate(
    data: str,
    model: str | None,
    results: Path | None,
    out: Path | None,
    side: int | None,
    split: str | None,
    batch: int,
    device: str,
    as_json: bool,
) -> None:
    """Score detections as COCO does: AP, AP50, AP75, by size, AR, and each class.

    Of a detector, which then searches the pictures, or of results that any tool has written. The scores are those of
    faster-coco-eval, equal to pycocotools'.
    """
    from counterproof.detection.annotations import read_data
    from counterproof.detection.evaluation import evaluate, read_results
    from counterproof.detection.outputs import check_ending
    from counterproof.detection.predicting import detect, open_detector, write_scores

    if (model is None) == (results is None):
        raise UserError("say what to score: --model DIR, or --results results.json")
    if out is not None:
        check_ending(out, (".html", ".json", ".csv"))
        keep_inputs(out, data, *([] if results is None else [results]))
    with quiet(), progress("reading") as tell:
        truth = read_data(data, split=split)
        if model is not None:
            detector = open_detector(model, side=side, device=device)
            found = detect(detector, truth, batch=batch, watch=told(tell, "searched"))
        else:
            assert results is not None
            found = read_results(results, truth)
        scores = evaluate(truth, found)
        if out is not None:
            write_scores(out, scores, truth, found, title=f"{model or results} on {data}")
    click.echo(json.dumps(scores.as_json(), ensure_ascii=False) if as_json else scores.text())
    if out is not None:
        click.echo(f"written to {out}", err=True)


@commands.command()
@click.argument("data", metavar="SPEC")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The COCO json to write.")
@click.option("--drop-bad-boxes", is_flag=True, help="Leave out boxes outside their picture, without area, or NaN.")
@split
@as_json
def convert(data: str, out: Path, drop_bad_boxes: bool, split: str | None, as_json: bool) -> None:
    """Write any data that can be read as one COCO json; the pictures stay where they are.

    SPEC is a COCO json, coco:FILE,PICTURES, or a folder in COCO or YOLO layout. What was left out or cut at a picture's
    edge is listed.
    """
    from counterproof.detection.annotations import read_data, write_coco
    from counterproof.detection.outputs import check_ending, folder_of

    check_ending(out, (".json",))
    keep_inputs(out, data)
    with progress("reading"):
        read = read_data(data, split=split, drop_bad_boxes=drop_bad_boxes)
    write_coco(read, out)
    clipped = [
        {"image_id": one.id, "file_name": one.name, "boxes": one.clipped} for one in read.pictures if one.clipped
    ]
    spec = f"coco:{out},{folder_of(read)}"
    objects = sum(len(one.boxes) for one in read.pictures)
    if as_json:
        click.echo(
            json.dumps(
                {
                    "out": str(out),
                    "read_with": spec,
                    "pictures": len(read.pictures),
                    "boxes": objects,
                    "classes": list(read.classes),
                    "notes": list(read.notes),
                    "clipped": clipped,
                },
                ensure_ascii=False,
            )
        )
        return
    for note in read.notes:
        click.echo(note)
    for row in clipped:
        click.echo(f"cut at the edge: {row['boxes']} of image {row['image_id']} ({row['file_name']})")
    click.echo(f"{len(read.pictures):,} pictures, {objects:,} boxes of {len(read.classes)} classes written to {out}")
    click.echo(f"read it with {shlex.quote(spec)}")


@commands.command("inspect")
@click.argument("data", metavar="SPEC")
@click.option("--draw", type=click.Path(path_type=Path), help="A .png of twelve pictures with their objects.")
@split
@as_json
def look(data: str, draw: Path | None, split: str | None, as_json: bool) -> None:
    """Say what is in data: pictures, objects, classes, sizes, and what may spoil a training.

    SPEC is a COCO json, coco:FILE,PICTURES, or a folder in COCO or YOLO layout. Every picture's header is read.
    """
    from counterproof.detection.annotations import read_data
    from counterproof.detection.outputs import check_ending, save_picture
    from counterproof.detection.survey import sheet, survey_data

    if draw is not None:
        check_ending(draw, (".png",))
        keep_inputs(draw, data)
    with progress("reading"):
        read = read_data(data, split=split, check_pictures=True)
        found = survey_data(read)
        if draw is not None:
            save_picture(sheet(read), draw)
    click.echo(json.dumps(found.as_json(), ensure_ascii=False) if as_json else found.text())
    if draw is not None:
        click.echo(f"drawn: {draw}", err=True)


def keep_inputs(out: Path, *inputs: str | Path) -> None:
    """Refuse to write over what is read.

    Raises:
        UserError: it is one of the inputs.
    """
    for given in inputs:
        words = str(given).removeprefix("coco:").removeprefix("yolo:")
        for name in (words, words.rpartition(",")[0]):
            if name and Path(name).expanduser().resolve() == out.resolve():
                raise UserError(f"{out} is what is read; name another file")


def told(tell: Callable[..., None], what: str) -> Callable[[int, int], None]:
    return lambda done, of: tell(what, done, of, {})


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its bars, its reports on loading and its advice, inside."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def progress(what: str) -> Iterator[Callable[[str, int, int, Mapping[str, float]], None]]:
    """A bar with an estimate on a terminal, a line per look elsewhere; both on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    row = bars.add_task(what, total=None, state="")
    last: dict[str, Any] = {"what": what, "loss": "", "ap": ""}

    def tell(what: str, done: int, of: int, values: Mapping[str, float]) -> None:
        if what == "look":
            shown = ", ".join(f"{name.upper()} {'-' if v is None else f'{v:.3f}'}" for name, v in values.items())
            last["ap"] = shown.split(",")[0]
            console.print(f"step {done} of {of}: {shown}", highlight=False)
            return
        if what != last["what"]:  # a new estimate
            bars.reset(row, description=what, total=of or None, completed=done, state="")
            last["what"] = what
        if "loss" in values:
            last["loss"] = f"loss {values['loss']:.3f}"
        bars.update(row, completed=done, state=f"{last['loss']} {last['ap']}" if what == "training" else "")

    with bars:
        yield tell
