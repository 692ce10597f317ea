"""What a training takes of its card: estimated before any weights are loaded, and explained when it was too much."""

import os
import resource
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from selfalign.core.errors import MismatchError, SelfalignError, UsageError, is_out_of_memory
from selfalign.engines.config import ModelConfig
from selfalign.training.config import TrainConfig, refuse_contradictions

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel

GIB = 2**30

CONTEXT = 3 * GIB // 4
"""CUDA's context with the handles and workspaces of cuBLAS: half to one GiB, by card and driver."""

TILE = (4096, 32768)
"""Tokens and vocabulary that TRL's fused head projects at a time."""

OPTIMIZER_BYTES = {"adamw_8bit": 2, "paged_adamw_8bit": 2, "adafactor": 0}
"""Of the states, a trained parameter; 8 in all others (two float32 moments). Adafactor keeps rows and columns only."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The largest micro-batch: `rows` of `length` tokens with their padding, `trained` of all of them with loss.

    `packed`: rows that stand behind each other in one, each attended to by itself. `masked`: attention takes a mask for
    the padding, which sdpa keeps for each layer, and with it keys and values for each head.
    """

    rows: int
    length: int
    trained: int
    packed: bool = False
    masked: bool = False

    @property
    def tokens(self) -> int:
        """With padding."""
        return self.rows * self.length

    @property
    def pairs(self) -> int:
        """Elements of the attention mask."""
        return self.rows * self.length**2 if self.masked else 0

    def cut(self, rows: int, length: int) -> "Batch":
        """The same with fewer rows, or shorter ones."""
        trained = self.trained * rows * length // (self.rows * self.length)
        return replace(self, rows=rows, length=length, trained=trained, masked=self.masked and rows > 1)


@dataclass(frozen=True, slots=True)
class Card:
    """Where a rank trains: a GPU, or its share of a machine's memory."""

    name: str
    total: int
    is_gpu: bool


@dataclass(frozen=True, slots=True)
class Matrix:
    """A linear layer's weight."""

    inputs: int
    outputs: int

    @property
    def size(self) -> int:
        """Its elements."""
        return self.inputs * self.outputs


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes a device.

    `activations` stay from the forward to the backward pass; over them come, one after the other, `logits` (the loss
    and its gradient) and `layer` (one layer computed again under checkpointing, and the gradients that flow through
    it); `step` is the optimiser's working memory, when the activations are gone; `loading` what a quantised base takes
    before it is sharded. `paged`: the optimizer's states may
    be evicted to the host.
    """

    weights: int
    loading: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    layer: int
    logits: int
    step: int
    context: int
    paged: bool

    @property
    def states(self) -> int:
        """What stands in memory for the whole training."""
        return self.weights + self.adapter + self.gradients + self.optimizer

    @property
    def certain(self) -> int:
        """What no batch, however small, can do without."""
        return max(self.states - (self.optimizer if self.paged else 0), self.loading)

    @property
    def peak(self) -> int:
        """The most at any time."""
        training = self.states + max(self.activations + max(self.layer, self.logits), self.step)
        return self.context + max(training, self.loading)


@dataclass(frozen=True, slots=True)
class Forecast:
    """An estimate held against a card. `advice`: the three settings that help this case most, the best one first."""

    estimate: Estimate
    batch: Batch
    card: Card
    advice: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the peak is below what the card has."""
        return self.estimate.peak <= self.card.total

    def text(self) -> str:
        """For people, in GiB."""
        e = self.estimate
        parts = {
            "weights": e.weights,
            "adapter": e.adapter,
            "gradients": e.gradients,
            "optimizer (may be evicted to the host)" if e.paged else "optimizer": e.optimizer,
            "activations": e.activations,
            "loss": e.logits,
            "one layer at work": e.layer,
            "context": e.context,
        }
        shape = f"{self.batch.rows} rows of {self.batch.length} tokens"
        beside = "" if self.card.is_gpu else "; the process itself comes on top"
        lines = [
            f"memory a device: about {_gib(e.peak)} of {_gib(self.card.total)} GiB ({self.card.name}), "
            f"largest micro-batch {shape}{beside}",
            "  " + ", ".join(f"{name} {_gib(size)}" for name, size in parts.items() if size),
        ]
        if not self.fits:
            lines += ["  PREDICTION: THIS WILL RUN OUT OF MEMORY. What helps most:", *_numbered(self.advice)]
        return "\n".join(lines)


def largest_batch(lengths: Sequence[int], trained: Sequence[int], config: TrainConfig) -> Batch:
    """The largest micro-batch that a device can meet.

    `lengths` and `trained`: tokens, and those of them with loss, of each row, or of each packed sequence.
    """
    rows = min(config.per_device_train_batch_size, len(lengths))
    longest, most = sorted(lengths)[-rows:], sum(sorted(trained)[-rows:])
    masked = not config.packing and rows > 1 and min(lengths) < longest[-1]
    return Batch(rows, longest[-1], most, packed=config.packing, masked=masked)


def this_card(ranks: int = 1) -> Card:
    """The GPU of this process; without one, the machine's memory, shared by the ranks."""
    import torch

    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(torch.cuda.current_device())
        return Card(card.name, card.total_memory, is_gpu=True)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    total = total if limit == resource.RLIM_INFINITY else min(total, limit)
    shared = f", shared by {ranks} ranks" if ranks > 1 else ""
    return Card(f"this machine's memory{shared}", total // ranks, is_gpu=False)


def forecast(
    model: ModelConfig, config: TrainConfig, batch: Batch, shape: "PreTrainedModel", card: Card | None = None
) -> Forecast:
    """Whether the training fits `card`, by default this process's, judged by the base's `skeleton` before its weights.

    `model` as it is loaded here (float32 without a GPU). Raises UsageError where weights, adapter, gradients and
    optimizer alone are too much, which no batch can change.
    """
    card = card or this_card(config.num_processes)
    whole = estimate(model, config, batch, shape, card.is_gpu)
    found = Forecast(whole, batch, card, _advice(model, config, batch, shape, card))
    if whole.certain > card.total:
        need = f"weights, adapter, gradients and optimizer alone take {_gib(whole.certain)} GiB"
        raise UsageError(
            f"{model.path} cannot be trained so on {card.name}: {need}, and it has {_gib(card.total)}. "
            "Change in the recipe's section, the one that helps most first:\n" + "\n".join(_numbered(found.advice))
        )
    return found


def estimate(
    model: ModelConfig, config: TrainConfig, batch: Batch, shape: "PreTrainedModel", is_gpu: bool = True
) -> Estimate:
    """Bytes a device, from the model's shapes.

    Counts what autograd keeps in transformers' decoder layers as Llama, Mistral and Qwen have them: RMSNorm, rotary
    attention by sdpa, an MLP with or without gate. Experts, attention that is not sdpa's (Gemma 2, Bloom) and dropout
    of the model's own (GPT-2) keep more; Liger and FlashAttention less. On a GPU the loss is TRL's fused head, tile by
    tile; elsewhere ours, which projects the positions with loss.
    """
    sharded, full = config.deepspeed is not None, config.lora_r is None
    half = is_gpu and model.dtype != "float32"
    # All weights are trained in float32 under autocast; under DeepSpeed in 16 bits, with float32 masters.
    compute = 2 if half else 4
    residual = 4 if full and not sharded else compute
    ranks = config.num_processes if sharded else 1
    holders = ranks if config.deepspeed == "zero3" else 1

    head = shape.get_output_embeddings()
    matrices = _matrices(shape, but=head)
    parameters = sum(p.numel() for p in shape.parameters())
    adapter = 0
    if config.lora_r is not None:
        adapted = (m for name, m in matrices.items() if _is_target(name, config))
        adapter = config.lora_r * sum(m.inputs + m.outputs for m in adapted)
    trained = parameters if full else adapter
    weights = parameters * residual if full else _frozen(model, matrices, parameters, compute)
    state = OPTIMIZER_BYTES.get(config.optim, 8) + (4 if full and sharded and half else 0)
    kept, again, inner = _activations(model, config, batch, shape, compute, residual)
    # Autocast keeps its copies of the weights as long as the forward pass lasts, or what it kept for the backward.
    copies = sum(2 * m.size for m in matrices.values()) if residual > compute else 0
    loss = _logits(batch, head.weight, compute, full, is_gpu)
    checkpointed = config.gradient_checkpointing
    largest = max(m.size for m in matrices.values())
    # A frozen matrix is dequantised to be used; a trained one's gradient stands beside the sum of those before it.
    matrix = 4 * largest if full else compute * largest if model.quantisation else 0
    return Estimate(
        weights=weights // holders,
        # A quantised base is loaded whole by every rank, and sharded then.
        loading=0 if full or not model.quantisation else weights,
        adapter=4 * adapter,
        # DDP sums them up in buckets of its own.
        gradients=trained * (residual if full else 4) * (2 if config.num_processes > 1 and not sharded else 1) // ranks,
        optimizer=trained * state // ranks,
        activations=kept + (0 if checkpointed else copies),
        layer=again + 3 * compute * batch.tokens * inner + matrix,
        logits=loss + (copies if checkpointed else 0),
        # torch's AdamW takes the root of all second moments at once.
        step=4 * trained // ranks if is_gpu and config.optim == "adamw_torch" else 0,
        context=CONTEXT if is_gpu else 0,
        paged=config.optim.startswith("paged_") and is_gpu,
    )


@contextmanager
def explained_out_of_memory(work: str, expected: Forecast) -> Iterator[None]:
    """Turn running out of memory in `work` ("loading the model", "training") into a UsageError that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError, SelfalignError) as error:
        if not is_out_of_memory(error):
            raise
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"out of memory while {work} on {expected.card.name}, which has {_gib(expected.card.total)} GiB and may be "
            f"used by others; the estimate was {_gib(expected.estimate.peak)}. {text}\n"
            "Change in the recipe's section, the one that helps most first:\n" + "\n".join(_numbered(expected.advice))
        ) from error


def _frozen(model: ModelConfig, matrices: Mapping[str, Matrix], parameters: int, compute: int) -> int:
    """Bytes of a base that is not trained. Embeddings, norms and head stay in the model's dtype."""
    if model.quantisation is None:
        return parameters * compute
    weights = sum(m.size for m in matrices.values())
    if model.quantisation == "int8":
        scales = sum(4 * m.outputs for m in matrices.values())
        return (parameters - weights) * compute + weights + scales
    # One float32 scale for 64 weights; quantised in turn, a byte, and a float32 for 256 of them.
    scales = weights // 64 * 4 if not model.double_quantisation else weights // 64 + weights // 64 // 64
    return (parameters - weights) * compute + weights // 2 + scales


def _activations(
    model: ModelConfig, config: TrainConfig, batch: Batch, shape: "PreTrainedModel", compute: int, residual: int
) -> tuple[int, int, int]:
    """Bytes kept from forward to backward, bytes of a layer that is computed again, and the MLP's inner width."""
    text, full = shape.config.get_text_config(), config.lora_r is None
    layers = _layers(shape)
    # `held`: bitsandbytes keeps what its int8 matrices read where checkpointing does not see it.
    hidden, inner, held = text.hidden_size, 0, 0
    if not getattr(text, "num_attention_heads", None):
        raise MismatchError(f"{type(shape).__name__} has no attention heads: its memory cannot be estimated")
    size = getattr(text, "head_dim", None) or hidden // text.num_attention_heads
    queries = size * text.num_attention_heads
    keys = queries if batch.masked else size * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    # A norm keeps its input and the inverse root in float32, and what its weight multiplies if that is trained.
    norm = (4 + (residual if full else 0)) * hidden + 4
    token = norm * sum(type(module).__name__.endswith("Norm") for module in layers[0].modules())
    # Queries, keys, values, the output, and the softmax's sums.
    token += compute * (2 * queries + 2 * keys) + 4 * text.num_attention_heads
    for name, block in _blocks(layers[0]).items():
        *readers, last = block.values()
        adapted = {key: matrix for key, matrix in block.items() if _is_target(f"{name}.{key}", config)}
        reads_last = list(block)[-1] in adapted
        attends = "attn" in name or "attention" in name
        # Attention keeps its output, and if that was put together from documents, it is kept again to be read.
        own = compute * last.inputs if batch.packed or not attends else 0
        if not attends:
            inner = last.inputs
            # Before and behind the activation, and the gate's other half.
            token += own * (3 if sum(m.outputs for m in readers) == 2 * inner else 1)
        if full:
            # Readers share the norm's output, unless autocast copies it for each of them.
            token += own + compute * hidden * (len(readers) if residual > compute else 1)
            continue
        token += compute * (config.lora_r or 0) * len(adapted)
        if config.lora_dropout:
            # Each adapter drops on its own: what is left, and the mask.
            token += sum((compute + (1 if compute == 2 else compute)) * m.inputs for m in adapted.values())
        elif model.quantisation is None and compute == 2:
            # PEFT reads in the adapter's float32, and autocast makes a copy in 16 bits.
            token += sum(compute * m.inputs for m in adapted.values())
        else:
            token += own * reads_last + compute * hidden * (len(adapted) > reads_last)
        if model.quantisation == "int8":
            held += compute * (hidden + last.inputs)
    layer = batch.tokens * token + compute * batch.pairs
    around = batch.tokens * (norm + 2 * size * residual + 8) + batch.pairs
    if config.gradient_checkpointing:
        return around + len(layers) * batch.tokens * (hidden * residual + held), layer, inner
    return around + len(layers) * (layer + batch.tokens * held), 0, inner


def _logits(batch: Batch, head: "Tensor", compute: int, full: bool, is_gpu: bool) -> int:
    """Bytes of the loss: in tiles on a GPU, as logits, their logarithms and the gradient elsewhere."""
    vocabulary, hidden = head.shape
    if not is_gpu:
        return batch.trained * (12 * vocabulary + 4 * hidden)
    tile = compute * min(batch.trained, TILE[0]) * TILE[1]
    return tile + batch.trained * hidden * (compute + 4) + (4 * vocabulary * hidden if full else 0)


def _matrices(module: "Module", but: "Module | None" = None) -> dict[str, Matrix]:
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    found = {}
    for name, child in module.named_modules():
        if isinstance(child, Linear) and child is not but:
            found[name] = Matrix(child.in_features, child.out_features)
        elif isinstance(child, Conv1D):
            found[name] = Matrix(*child.weight.shape)
    return found


def _layers(shape: "PreTrainedModel") -> "Sequence[Module]":
    """The decoder's layers. Raises MismatchError where the model does not have them in one list."""
    from torch.nn import ModuleList

    wanted = shape.config.get_text_config().num_hidden_layers
    for module in shape.modules():
        if isinstance(module, ModuleList) and len(module) == wanted:
            return list(module)
    raise MismatchError(f"{type(shape).__name__} is no decoder of {wanted} layers: its memory cannot be estimated")


def _blocks(layer: "Module") -> dict[str, dict[str, Matrix]]:
    """A layer's matrices by the module that holds them: attention and MLP."""
    blocks: dict[str, dict[str, Matrix]] = {}
    for name, matrix in _matrices(layer).items():
        parent, _, key = name.rpartition(".")
        blocks.setdefault(parent, {})[key] = matrix
    return blocks


def _is_target(name: str, config: TrainConfig) -> bool:
    targets = config.target_modules
    return targets == "all-linear" or any(name == t or name.endswith(f".{t}") for t in targets)


def _advice(
    model: ModelConfig, config: TrainConfig, batch: Batch, shape: "PreTrainedModel", card: Card
) -> tuple[str, ...]:
    """The three changes that lower the peak most, each by itself, with the peak that each leaves."""
    now = estimate(model, config, batch, shape, card.is_gpu).peak
    found = []
    for text, other, training, smaller in _changes(model, config, batch, shape, card):
        try:
            refuse_contradictions(training, other)
        except UsageError:
            continue
        peak = estimate(other, training, smaller, shape, card.is_gpu).peak
        if peak < now and _gib(peak) != _gib(now):
            # Of what saves the same, the one that changes less comes first.
            found.append((round(peak / GIB, 1), f"{text}: about {_gib(peak)} GiB"))
    helpful = [text for _, text in sorted(found, key=lambda one: one[0])]
    return (*helpful, "model.path: a smaller model")[:3]


def _changes(
    model: ModelConfig, config: TrainConfig, batch: Batch, shape: "PreTrainedModel", card: Card
) -> Iterator[tuple[str, ModelConfig, TrainConfig, Batch]]:
    """What can be changed, as a recipe would say it."""
    rows, steps = config.per_device_train_batch_size, config.gradient_accumulation_steps
    for fewer in [n for n in range(rows - 1, 0, -1) if rows % n == 0]:
        smaller = batch.cut(min(fewer, batch.rows), batch.length)
        if fewer == 1 or estimate(model, config, smaller, shape, card.is_gpu).peak <= card.total:
            text = f"per_device_train_batch_size={fewer}"
            if config.size_schedule is None:
                text += f" with gradient_accumulation_steps={steps * rows // fewer}"
            yield f"{text} (the same step)", model, config, smaller
            break
    if not config.gradient_checkpointing:
        more = config.model_copy(update={"gradient_checkpointing": True})
        yield "gradient_checkpointing=true", model, more, batch
    if batch.length > 128:
        half = batch.length // 2
        yield f"max_length={half} (longer rows are cut)", model, config, batch.cut(batch.rows, half)
    if model.quantisation != "nf4":
        lora = config.model_copy(update={"lora_r": config.lora_r or 16})
        text = " with lora_r=16 (an adapter)" if config.lora_r is None else ""
        yield *_nf4(model, config.deepspeed, text), lora, batch
    if OPTIMIZER_BYTES.get(config.optim, 8) > 2:
        # ZeRO shards the states instead of paging them.
        name = "adamw_8bit" if config.deepspeed else "paged_adamw_8bit"
        yield f"optim={name}", model, config.model_copy(update={"optim": name}), batch
    if config.lora_r is not None and config.lora_r > 8:
        rank = config.lora_r // 2
        yield f"lora_r={rank}", model, config.model_copy(update={"lora_r": rank}), batch
    if card.is_gpu:
        ranks = max(2, 2 * config.num_processes)
        split = config.model_copy(update={"deepspeed": "zero3", "num_processes": ranks})
        text = f"deepspeed=zero3 with num_processes={ranks} (as many cards)"
        if model.quantisation != "nf4":
            yield text, model, split, batch
        else:
            added, stored = _nf4(model, "zero3", "")
            yield f"{text} and {added}", stored, split, batch


def _nf4(model: ModelConfig, deepspeed: str | None, text: str) -> tuple[str, ModelConfig]:
    """A base in nf4; ZeRO-3 shards it where it is stored as floating numbers."""
    update = {"quantisation": "nf4"}
    if deepspeed == "zero3":
        update["quantisation_storage"] = model.dtype
        text = f"{text} and model.quantisation_storage={model.dtype}"
    return f"model.quantisation=nf4{text}", model.model_copy(update=update)


def _numbered(advice: Sequence[str]) -> list[str]:
    return [f"  {number}. {text}" for number, text in enumerate(advice, 1)]


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}" if size >= GIB / 10 else f"{size / GIB:.3f}"
