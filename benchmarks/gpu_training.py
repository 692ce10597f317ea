"""QLoRA on one GPU, on random weights of the true shapes: `python benchmarks/gpu_training.py [--minutes 9] [SHAPE…]`.

For each shape: useful tokens a second, their share of the line of PERFORMANCE (half of the card's peak FLOP/s), and the
most memory that was held, against plain TRL without padding and, where it is installed, Unsloth, by turns in one run.
Then each recipe of that shape at its own settings with rows of full length, in no more memory than its card has, beside
what was estimated. No checkpoint and no network is needed. Where there is no GPU it says so and measures nothing.
"""

import argparse
import gc
import importlib.util
import json
import random
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

from gpu import SHAPES, peak_of, scratch, write_model
from measure import Result, Work, in_child, machine, show, write
from rich.console import Console
from rich.table import Table

from selfalign.core.errors import UsageError
from selfalign.core.lease import Lease, Owner
from selfalign.core.records import Example, Message
from selfalign.engines.adapters import skeleton
from selfalign.engines.config import ModelConfig
from selfalign.engines.loading import load_tokenizer
from selfalign.recipe import load
from selfalign.training.checkpoints import Checkpoints
from selfalign.training.config import TrainConfig
from selfalign.training.memory import GIB, Batch, Card, Estimate, estimate, is_out_of_memory, largest_batch
from selfalign.training.preflight import Tokenised, fit, stop_ids, tokenise
from selfalign.training.sft import train

CARDS_GIB = {"lima150-llama2-7b": 15, "oasst-tinyllama-1.1b": 8}
"""What the cards have that the recipes are for (a T4 leaves 15 of its 16); 80 for all others."""

QLORA = TrainConfig(
    lora_r=16,
    lora_alpha=16,
    learning_rate=1e-4,
    optim="adamw_8bit",
    per_device_train_batch_size=4,
    max_length=2048,
    packing=True,
    gradient_checkpointing=True,
    logging_steps=1,
    max_steps=8,
)
ROUNDS = 2
ROWS = 600
"""More than the steps of a measurement see."""
WARM = 3
"""Steps that are not timed: kernels are chosen, and the allocator fills."""

RECIPES = Path(__file__).parents[1] / "recipes"


@dataclass(frozen=True)
class Measured:
    """Useful (unpadded) tokens a second after `WARM` steps, and the most bytes that the device's allocator held."""

    tokens_s: float
    peak_bytes: int


class Clock:
    """Takes the time of each step's end, and the tokens until then. Reading a loss makes the device finish first."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.tokens: list[float] = []

    def __call__(self, figures: Mapping[str, float]) -> None:
        """A step's figures, as training logs them."""
        self.times.append(perf_counter())
        self.tokens.append(figures["tokens"])

    @property
    def tokens_s(self) -> float:
        """Of the steps after the first `WARM`."""
        at = min(WARM, len(self.times) - 1) - 1
        return (self.tokens[-1] - self.tokens[at]) / (self.times[-1] - self.times[at])


def made_up(rows: int, length: int | None, seed: int = 0) -> list[Example]:
    """Rows of more than `length` words, or of lengths spread as answers' are (median 350 words, few above 2,000)."""
    chance = random.Random(seed)
    words = ("lake", "city", "river", "tower", "stands", "behind", "old", "hills", "north", "of", "every", "bridge")
    made = []
    for number in range(rows):
        size = length or min(int(chance.lognormvariate(5.85, 0.8)) + 8, 2000)
        question = Message(role="user", content=" ".join(chance.choices(words, k=6)) + "?")
        answer = Message(role="assistant", content=" ".join(chance.choices(words, k=size)))
        made.append(Example(id=str(number), kind="seed", prompt=(question,), completion=(answer,)))
    return made


def tokenised(model: ModelConfig, examples: Sequence[Example], max_length: int) -> list[Tokenised]:
    """The rows as training sees them."""
    tokenizer = load_tokenizer(model)
    stops = stop_ids(tokenizer, model)
    return fit((tokenise(one, tokenizer, stops) for one in examples), max_length)[0]


def ours(model: ModelConfig, config: TrainConfig, examples: Sequence[Example]) -> Measured:
    """A training as a stage starts it."""
    clock = Clock()
    with scratch() as folder:
        me = Owner.this_process()
        lease = folder / "lease.json"
        lease.write_text(json.dumps(asdict(me)))
        kept = Checkpoints(folder / "kept", "benchmark", Lease(lease, me))
        return _watched(clock, lambda: train(examples, model, config, folder / "model", 0, clock, kept))


def plain_trl(model: ModelConfig, config: TrainConfig, examples: Sequence[Example]) -> Measured:
    """TRL's trainer without padding on the same rows and with the same settings, as its documents set it up."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    rows = tokenised(model, examples, config.max_length)
    clock = Clock()

    def work() -> None:
        import torch

        cuda = torch.cuda.is_available()
        quantised = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if cuda else torch.float32,
        )
        base = AutoModelForCausalLM.from_pretrained(
            model.path,
            dtype=torch.bfloat16 if cuda else torch.float32,
            quantization_config=quantised,
            device_map={"": "cuda" if cuda else "cpu"},
        )
        _trl(base, _lora(config), model, config, rows, clock)

    return _watched(clock, work)


def unsloth(folder: str) -> Work:
    """Unsloth's loading and adapter under the same trainer, in a process of its own: its import patches others."""
    from unsloth import FastLanguageModel

    model = ModelConfig(path=folder)
    rows = tokenised(model, made_up(ROWS, None), QLORA.max_length)
    clock = Clock()

    def work() -> None:
        base, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=QLORA.max_length, load_in_4bit=True)
        adapted = FastLanguageModel.get_peft_model(
            base, r=QLORA.lora_r, lora_alpha=QLORA.lora_alpha, use_gradient_checkpointing="unsloth"
        )
        _trl(adapted, None, model, QLORA, rows, clock)

    return lambda: asdict(_watched(clock, work))


def _trl(
    base: Any, lora: Any, model: ModelConfig, config: TrainConfig, rows: Sequence[Tokenised], clock: Clock
) -> None:
    """As many rows a step as fill our packed sequences."""
    import datasets
    import torch
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Steps(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" in logs:
                clock({"tokens": logs["num_tokens"]})

    data = datasets.Dataset.from_dict(
        {"input_ids": [list(row.input_ids) for row in rows], "labels": [row.labels for row in rows]}
    )
    mean = statistics.mean(len(row.input_ids) for row in rows)
    cuda = torch.cuda.is_available()
    with scratch() as folder:
        arguments = SFTConfig(
            output_dir=str(folder),
            per_device_train_batch_size=max(int(config.per_device_train_batch_size * config.max_length / mean), 2),
            max_length=None,
            padding_free=True,
            dataset_kwargs={"skip_prepare_dataset": True},
            learning_rate=config.learning_rate,
            optim=config.optim,
            max_steps=config.max_steps,
            logging_steps=1,
            gradient_checkpointing=config.gradient_checkpointing,
            bf16=cuda,
            use_cpu=not cuda,
            dataloader_pin_memory=cuda,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        SFTTrainer(
            model=base,
            args=arguments,
            train_dataset=data,
            processing_class=load_tokenizer(model),
            peft_config=lora,
            callbacks=[Steps()],
        ).train()


def _lora(config: TrainConfig) -> Any:
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=config.lora_r, lora_alpha=config.lora_alpha, target_modules="all-linear")


def line(shape: Mapping[str, Any], config: TrainConfig, peak_flops: float) -> float:
    """Tokens a second at half of the card's peak: what an adapter on frozen weights cannot do without.

    Two FLOPs a weight (all but the embeddings) and pass, and causal attention over `max_length` tokens: forward, back
    to the activations, and forward again under checkpointing; the adapter's own gradients are one pass more.
    """
    with scratch() as folder:
        (folder / "config.json").write_text(json.dumps(dict(shape)))
        model = skeleton(ModelConfig(path=str(folder)))
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        tied = embedding is head
        weights = sum(p.numel() for p in model.parameters()) - (0 if tied else embedding.numel())
        attention = model.config.num_hidden_layers * model.config.hidden_size * config.max_length
        batch = Batch(1, 1, 1)
        adapter = estimate(ModelConfig(path=str(folder)), config, batch, model).adapter // 4
    passes = 3 if config.gradient_checkpointing else 2
    return 0.5 * peak_flops / (passes * (2 * weights + 2 * attention) + (passes + 1) * 2 * adapter)


@dataclass(frozen=True)
class Fit:
    """A recipe's training at its own settings on rows of full length. `peak_bytes` is None where none was seen."""

    recipe: str
    card: Card
    expected: Estimate
    peak_bytes: int | None
    outcome: str


def fits(recipe: str, model: ModelConfig, steps: int = 3) -> Fit:
    """Train a few steps of a recipe's backward direction, which no forward one exceeds, within its card's memory."""
    import torch

    whole = load(RECIPES / f"{recipe}.yaml", []).recipe
    config, like = _few_steps(whole.backward, steps), whole.model
    model = like.model_copy(update={"path": model.path, "revision": None, "chat_template": "plain"})
    card = Card("its card", CARDS_GIB.get(recipe, 80) * GIB, is_gpu=torch.cuda.is_available())
    rows = made_up(config.per_device_train_batch_size * config.gradient_accumulation_steps * steps, config.max_length)
    lengths = tokenised(model, rows, config.max_length)
    batch = largest_batch([len(r.input_ids) for r in lengths], [sum(r.completion_mask) for r in lengths], config)
    expected = estimate(model, config, batch, skeleton(model), card.is_gpu)
    if config.num_processes > 1:
        return Fit(recipe, card, expected, None, f"needs {config.num_processes} cards")
    try:
        with _at_most(card.total):
            return Fit(recipe, card, expected, ours(model, config, rows).peak_bytes, "fits")
    except UsageError as error:
        if not is_out_of_memory(error):
            raise
        return Fit(recipe, card, expected, None, "does not fit")


def _few_steps(config: TrainConfig, steps: int) -> TrainConfig:
    plain = TrainConfig(**config.model_dump(include=set(TrainConfig.model_fields)))
    return plain.model_copy(update={"max_steps": steps, "logging_steps": 1, "size_schedule": None})


def recipes_of(shape: str) -> list[str]:
    """The shipped recipes whose model has that shape."""
    same = {"humpback-llama-7b": "llama2-7b"}
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    return [name for name in names if name.endswith(f"-{shape}") or same.get(name) == shape]


def main(arguments: Sequence[str]) -> int:
    """The process's exit code."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(SHAPES)}; all by default")
    parser.add_argument("--minutes", type=float, default=9, help="begin nothing new after so long")
    given = parser.parse_args(arguments)
    if unknown := set(given.shapes) - set(SHAPES):
        parser.error(f"no shape {', '.join(sorted(unknown))}; there are {', '.join(SHAPES)}")
    if not torch.cuda.is_available():
        print("there is no GPU here: nothing was measured")
        return 0
    card = torch.cuda.get_device_name()
    peak = peak_of(card)
    until = monotonic() + 60 * given.minutes
    speed, memory = Table("shape", "side", "tokens/s", "of the line", "peak GiB"), _memory_table()
    result = None
    for name in given.shapes or SHAPES:
        with scratch() as folder:
            model = write_model(SHAPES[name], folder / "model").model_copy(update={"quantisation": "nf4"})
            sides = by_turns(model, until)
            goal = None if peak is None else line(SHAPES[name], QLORA, peak.flops)
            for side, measured in sides.items():
                share = "unknown peak" if goal is None else f"{measured.tokens_s / goal:.0%}"
                row = (f"{measured.tokens_s:,.0f}", share, f"{measured.peak_bytes / GIB:.1f}")
                speed.add_row(name, side, *row)
            if name == "llama3.1-8b" and goal is not None and {"ours", "plain TRL"} <= set(sides):
                result = _result(sides, goal, f"{card}; {machine()}")
            for recipe in recipes_of(name):
                if monotonic() < until:
                    _add(memory, fits(recipe, model))
    Console(width=None if sys.stdout.isatty() else 160).print(memory, *([] if result else [speed]))
    if result is None:
        return 0
    write(result)
    show(result, speed)
    return 0 if result.is_met else 1


def by_turns(model: ModelConfig, until: float) -> dict[str, Measured]:
    """Each side's median over the rounds; what has no time left is left out."""
    examples = made_up(ROWS, None)
    found: dict[str, list[Measured]] = {}
    for number in range(ROUNDS):
        sides = [("ours", ours), ("plain TRL", plain_trl)]
        for name, side in sides[:: 1 if number % 2 == 0 else -1]:
            if monotonic() < until:
                found.setdefault(name, []).append(side(model, QLORA, examples))
        if importlib.util.find_spec("unsloth") and monotonic() < until:
            output = in_child("gpu_training:unsloth", model.path).output
            assert isinstance(output, dict)
            found.setdefault("Unsloth", []).append(Measured(**output))
    return {
        name: Measured(statistics.median(m.tokens_s for m in all_), max(m.peak_bytes for m in all_))
        for name, all_ in found.items()
    }


def _result(sides: Mapping[str, Measured], goal: float, machine: str) -> Result:
    ratio = sides["ours"].tokens_s / sides["plain TRL"].tokens_s
    return Result(
        row="gpu_training",
        value=sides["ours"].tokens_s / goal,
        unit="of the line",
        better="higher",
        must=0.85,
        aim=1.0,
        check=f"1.1 x plain TRL without padding (it was {ratio:.2f} x)",
        passed=ratio >= 1.1,
        rounds=ROUNDS,
        machine=machine,
    )


def _memory_table() -> Table:
    return Table("recipe", "card GiB", "estimate GiB", "measured GiB", "")


def _add(table: Table, fit: Fit) -> None:
    # What the allocator holds has no context in it.
    expected = (fit.expected.peak - fit.expected.context) / GIB
    measured = "not measured" if fit.peak_bytes is None else f"{fit.peak_bytes / GIB:.1f}"
    table.add_row(fit.recipe, f"{fit.card.total / GIB:.0f}", f"{expected:.1f}", measured, fit.outcome)


def _watched(clock: Clock, work: Any) -> Measured:
    import torch

    gc.collect()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    work()
    peak = torch.cuda.max_memory_reserved() if cuda else 0
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return Measured(clock.tokens_s, peak)


@contextmanager
def _at_most(size: int) -> Iterator[None]:
    """The process may take so many bytes of the device, context aside, as if it had no more."""
    import torch

    if not torch.cuda.is_available():
        yield
        return
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(size / total, 1.0))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
