"""Prefill and decoding of a causal language model: one shared cache whose slots rows enter and leave.

Axes: B rows of a batch, L tokens, T cached columns, V vocabulary; keys and values are [B, heads, T, head size].
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from selfalign.core.protocols import Sampling

KV = list[tuple[Tensor, Tensor]]
"""Keys and values, layer by layer."""

ROOM = 64
"""Free columns that a cache gets at a time."""

NUCLEUS = 1024
"""Candidates looked at first for top-p: sorting a whole vocabulary costs more than the rest of the choice."""


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """A cache layer with free columns to the right, so that a step writes one column and copies nothing."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        """A layer whose `keys` and `values` are buffers, with no column in use."""
        super().__init__()
        self.buffers = [keys, values]
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.use(0)

    def use(self, columns: int) -> None:
        """Take the first `columns` of the buffers as cached."""
        self.keys, self.values = (buffer[:, :, :columns] for buffer in self.buffers)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the new columns, and return all of them."""
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        if end > self.buffers[0].shape[2]:
            self.buffers = [_widened(buffer, end + ROOM) for buffer in self.buffers]
        self.buffers[0][:, :, start:end] = key_states
        self.buffers[1][:, :, start:end] = value_states
        self.use(end)
        return self.keys, self.values


def _widened(buffer: Tensor, columns: int) -> Tensor:
    batch, heads, used, size = buffer.shape
    wide = buffer.new_zeros(batch, heads, columns, size)
    wide[:, :, :used] = buffer
    return wide


def _forked(prefix: KV, batch: int, room: int) -> Cache:
    """A cache of `batch` rows that start with `prefix`, which is copied once and stays as it is."""
    layers = []
    for keys, values in prefix:
        _, heads, columns, size = keys.shape
        layer = RoomyLayer(*(kv.new_zeros(batch, heads, columns + room, kv.shape[3]) for kv in (keys, values)))
        layer.use(columns)
        layer.keys.copy_(keys.expand(batch, heads, columns, size))
        layer.values.copy_(values.expand(batch, heads, columns, values.shape[3]))
        layers.append(layer)
    return Cache(layers=layers)


def cached(cache: Cache) -> KV:
    """The keys and values that `cache` holds."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def prefill(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]], prefix: KV | None
) -> tuple[list[Tensor], Cache]:
    """Run `rows` of tokens, which follow `prefix`, once.

    Returns for each row the logits [len(wanted[row]), V], float32, at the positions `wanted` of that row, and the
    cache. Shorter rows are padded on the right: under causal attention padding then reaches no real token, so that
    neither mask nor positions are needed. The cache's columns past a row's end are rubbish.
    """
    from transformers import DynamicCache

    longest = max(map(len, rows))
    ids_BL = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=model.device)
    positions = sorted({position for places in wanted for position in places})
    where = {position: at for at, position in enumerate(positions)}
    cache = _forked(prefix, len(rows), longest) if prefix else DynamicCache()
    keep = torch.tensor(positions, device=model.device)
    out = model(input_ids=ids_BL, past_key_values=cache, use_cache=True, logits_to_keep=keep)
    logits = [out.logits[row, [where[p] for p in places]].float() for row, places in enumerate(wanted)]
    return logits, cache


def batches(lengths: Sequence[int], slots: int, budget: int) -> list[list[int]]:
    """Row numbers in batches, the longest first, of at most `slots` rows and `budget` padded tokens."""
    done: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not done or len(done[-1]) == slots or (len(done[-1]) + 1) * lengths[done[-1][0]] > budget:
            done.append([])
        done[-1].append(row)
    return done


@dataclass(slots=True)
class Row:
    """One reply in the making. `prompt` follows the shared prefix; `noise` is one uniform number a new token."""

    prompt: Sequence[int]
    noise: Tensor | None = None
    new: list[int] = field(default_factory=list)
    done: bool = False


class Slots:
    """Rows that decode together over one cache.

    All rows end at the same column, whatever their length; the mask hides what lies left of a row's first token.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.rows: list[Row] = []
        self.lengths: list[int] = []
        self.cache: Cache | None = None
        self.mask_BT = torch.empty(0, 0)

    def live(self) -> int:
        """Rows that still want tokens."""
        return sum(not row.done for row in self.rows)

    def repack(self, rows: Sequence[Row], lengths: Sequence[int], parts: Sequence[KV]) -> None:
        """Drop finished rows, let `rows` in (`parts`: their keys and values, from column 0), and align all."""
        keep = [at for at, row in enumerate(self.rows) if not row.done]
        old = cached(self.cache) if self.cache is not None else []
        self.rows = [*(self.rows[at] for at in keep), *rows]
        self.lengths = [*(self.lengths[at] for at in keep), *lengths]
        if not self.rows:
            return
        width = max(self.lengths)
        layers = []
        for number, sample in enumerate(parts[0] if parts else old):
            layer = RoomyLayer(
                *(kv.new_zeros(len(self.rows), kv.shape[-3], width + ROOM, kv.shape[-1]) for kv in sample)
            )
            layer.use(width)
            for which, target in enumerate((layer.keys, layer.values)):
                if keep:
                    kept = old[number][which]
                    columns = min(width, kept.shape[2])
                    target[: len(keep), :, width - columns :] = kept[keep, :, kept.shape[2] - columns :]
                for at, (part, length) in enumerate(zip(parts, lengths, strict=True), len(keep)):
                    target[at, :, width - length :] = part[number][which][:, :length]
            layers.append(layer)
        self.cache = Cache(layers=layers)
        device = self.model.device
        starts_B1 = width - torch.tensor(self.lengths, device=device)[:, None]
        self.mask_BT = (torch.arange(width, device=device) >= starts_B1).long()

    def step(self) -> Tensor:
        """Logits [B, V], float32, of the token after each row's newest one."""
        device = self.model.device
        ids_B1 = torch.tensor([[row.new[-1]] for row in self.rows], device=device)
        # A finished row rides along until the next repacking; its position must stay inside the model's.
        at = [0 if row.done else length for row, length in zip(self.rows, self.lengths, strict=True)]
        positions_B1 = torch.tensor(at, device=device)[:, None]
        self.mask_BT = torch.nn.functional.pad(self.mask_BT, (0, 1), value=1)
        padded = len(set(self.lengths)) > 1
        out = self.model(
            input_ids=ids_B1,
            attention_mask=self.mask_BT if padded else None,
            position_ids=positions_B1,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.lengths = [length + 1 for length in self.lengths]
        logits: Tensor = out.logits[:, -1].float()
        return logits


def decode(
    model: PreTrainedModel,
    rows: Sequence[Row],
    prefix: KV | None,
    sampling: Sampling,
    ended: Callable[[Row], bool],
    *,
    slots: int,
    budget: int,
) -> None:
    """Write `new` of all rows. Up to `slots` decode together; freed slots are filled from the longest prompts on.

    `budget` bounds the padded tokens of one prefill.
    """
    shared = prefix[0][0].shape[2] if prefix else 0
    waiting = deque(sorted(rows, key=lambda row: -len(row.prompt)))
    pool = Slots(model)

    def take(logits_BV: Tensor, taking: Sequence[Row]) -> None:
        noise = [float(row.noise[len(row.new)]) if row.noise is not None and not row.done else 0.0 for row in taking]
        for row, token in zip(taking, choose(logits_BV, sampling, noise), strict=True):
            if not row.done:
                row.new.append(token)
                row.done = ended(row)

    while waiting or pool.live():
        free = slots - pool.live()
        # Repacking copies the whole cache: it waits until a quarter of the slots is idle.
        if (waiting and free * 4 >= slots) or (len(pool.rows) - pool.live()) * 4 >= len(pool.rows):
            coming = [waiting.popleft() for _ in range(min(free, len(waiting)))]
            parts: dict[int, KV] = {}
            for batch in batches([len(row.prompt) for row in coming], slots, budget):
                prompts = [coming[at].prompt for at in batch]
                logits, cache = prefill(model, prompts, [[len(prompt) - 1] for prompt in prompts], prefix)
                take(torch.cat(logits), [coming[at] for at in batch])
                kv = cached(cache)
                for place, at in enumerate(batch):
                    parts[at] = [(keys[place], values[place]) for keys, values in kv]
            joining = [at for at, row in enumerate(coming) if not row.done]
            pool.repack(
                [coming[at] for at in joining],
                [shared + len(coming[at].prompt) for at in joining],
                [parts[at] for at in joining],
            )
        if pool.live():
            take(pool.step(), pool.rows)


def choose(logits_BV: Tensor, sampling: Sampling, noise: Sequence[float]) -> list[int]:
    """The next token of each row: the likeliest at temperature 0, else drawn by the row's number in [0, 1).

    Temperature, then top-k, then top-p, as transformers orders them. One uniform number against the cumulative
    probabilities, taken in the order of token ids, is the same draw in any batch and on any device.
    """
    if sampling.temperature == 0:
        greedy: list[int] = logits_BV.argmax(-1).tolist()
        return greedy
    probs_BK, ids_BK = _candidates(logits_BV / sampling.temperature, sampling.top_k, sampling.top_p)
    mass_BK = probs_BK.cumsum(-1)
    aim_B1 = mass_BK[:, -1:] * torch.tensor(noise, dtype=mass_BK.dtype, device=mass_BK.device)[:, None]
    at_B1 = torch.searchsorted(mass_BK, aim_B1, right=True).clamp(max=mass_BK.shape[1] - 1)
    drawn: list[int] = ids_BK.gather(1, at_B1)[:, 0].tolist()
    return drawn


def _candidates(logits_BV: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Probabilities [B, K], float64, zero where cut off, and their token ids in ascending order."""
    vocabulary = logits_BV.shape[1]
    if top_p == 1 and not top_k:
        return logits_BV.double().softmax(-1), torch.arange(vocabulary, device=logits_BV.device).expand_as(logits_BV)
    width = min(vocabulary, top_k or NUCLEUS)
    while True:
        top_BK, ids_BK = logits_BV.topk(width)
        total_B1 = (top_BK if top_k else logits_BV).logsumexp(-1, keepdim=True)
        probs_BK = (top_BK.double() - total_B1).exp()
        kept_BK = probs_BK.cumsum(-1) - probs_BK < top_p
        if top_k or width == vocabulary or not kept_BK[:, -1].any():
            break
        width = vocabulary
    ids_BK, order_BK = ids_BK.sort()
    return (probs_BK * kept_BK).gather(1, order_BK), ids_BK
