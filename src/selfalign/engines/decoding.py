"""Prefill and decoding of a causal language model: one shared cache whose slots rows enter and leave.

Axes: B rows of a batch, L tokens, T cached columns, V vocabulary; keys and values are [B, heads, T, head size].
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from selfalign.core.protocols import Sampling

KV = list[tuple[Tensor, Tensor]]
"""Keys and values, layer by layer."""

ROOM = 16
"""Free columns that a cache gets at a time, at least; an eighth of the longest row where that is more."""

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
            self.buffers = [_widened(buffer, end + _room(end)) for buffer in self.buffers]
        self.buffers[0][:, :, start:end] = key_states
        self.buffers[1][:, :, start:end] = value_states
        self.use(end)
        return self.keys, self.values


def _room(columns: int) -> int:
    return max(ROOM, columns // 8)


def _widened(buffer: Tensor, columns: int) -> Tensor:
    batch, heads, used, size = buffer.shape
    wide = buffer.new_zeros(batch, heads, columns, size)
    wide[:, :, :used] = buffer
    return wide


def _forked(prefix: KV, batch: int, room: int) -> Cache:
    """A cache of `batch` rows that start with `prefix`, which is copied once and stays as it is.

    All of its `room` columns must be written before any is read.
    """
    layers = []
    for keys, values in prefix:
        _, heads, columns, size = keys.shape
        layer = RoomyLayer(*(kv.new_empty(batch, heads, columns + room, kv.shape[3]) for kv in (keys, values)))
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

    Returns for each row the logits [len(wanted[row]), V] at the positions `wanted` of that row, and the
    cache. Shorter rows are padded on the right: under causal attention padding then reaches no real token, so that
    neither mask nor positions are needed. The cache's columns past a row's end are rubbish.
    """
    from transformers import DynamicCache

    longest = max(map(len, rows))
    ids_BL = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=model.device)
    cache = _forked(prefix, len(rows), longest) if prefix else DynamicCache()
    places = [(row, position) for row, positions in enumerate(wanted) for position in positions]
    rows_N, positions_N = torch.tensor(places, device=model.device).T

    # `logits_to_keep` takes positions for all rows alike: rows of different lengths would pay for each other's, and a
    # vocabulary is often dearer than all layers before it.
    def select(_: torch.nn.Module, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (states[0][rows_N, positions_N], *states[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        logits_NV = model(input_ids=ids_BL, past_key_values=cache, use_cache=True).logits
    finally:
        hook.remove()
    return list(logits_NV.split([len(positions) for positions in wanted])), cache


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
    noise: Sequence[float] | None = None
    new: list[int] = field(default_factory=list)
    done: bool = False


class Joining(NamedTuple):
    """A row that was prefilled: `length` tokens, whose keys and values `part` holds from column 0 on."""

    row: Row
    length: int
    part: KV


class Slots:
    """Rows that decode together over one cache.

    All rows end at the same column, whatever their length; the mask hides what lies left of a row's first token.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        # The model looks through its weights to tell.
        self._device = model.device
        self.rows: list[Row] = []
        self.lengths: list[int] = []
        self.cache = Cache(layers=[])
        self.width = 0
        self.mask_BT = torch.empty(0, 0, dtype=torch.bool)
        config = model.config.get_text_config()
        sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
        # A mask in its final shape is taken as it is; any other is made anew in each step. Not every kernel takes one.
        self._final_mask = config._attn_implementation == "sdpa" and not sliding

    def live(self) -> int:
        """Rows that still want tokens."""
        return sum(not row.done for row in self.rows)

    def fill(self, ready: deque[Joining], slots: int) -> None:
        """Let rows of `ready` into free slots, up to `slots` in all, and drop finished rows where many are left."""
        for at, row in enumerate(self.rows):
            if row.done and ready and ready[0].length <= self.width:
                self._replace(at, ready.popleft())
        live = self.live()
        if ready and live < slots:
            self.repack([ready.popleft() for _ in range(min(slots - live, len(ready)))])
        elif (len(self.rows) - live) * 4 >= len(self.rows):
            # Repacking copies the whole cache: it waits until a quarter of the slots is idle.
            self.repack()

    def _replace(self, at: int, joining: Joining) -> None:
        """Put a row into the slot of a finished one: nothing else moves."""
        start = self.width - joining.length
        for layer, part in zip(self.cache.layers, joining.part, strict=True):
            for target, source in zip((layer.keys, layer.values), part, strict=True):
                target[at, :, start:] = source[:, : joining.length]
        self.mask_BT[at, :start] = False
        self.mask_BT[at, start : self.width] = True
        self.rows[at], self.lengths[at] = joining.row, joining.length

    def repack(self, joining: Sequence[Joining] = ()) -> None:
        """Drop finished rows, let others in, and align all on the left."""
        keep = [at for at, row in enumerate(self.rows) if not row.done]
        old = cached(self.cache)
        self.rows = [*(self.rows[at] for at in keep), *(one.row for one in joining)]
        self.lengths = [*(self.lengths[at] for at in keep), *(one.length for one in joining)]
        if not self.rows:
            return
        self.width = width = max(self.lengths)
        room = _room(width)
        layers = []
        for number, sample in enumerate(joining[0].part if joining else old):
            layer = RoomyLayer(
                *(kv.new_zeros(len(self.rows), kv.shape[-3], width + room, kv.shape[-1]) for kv in sample)
            )
            layer.use(width)
            for which, target in enumerate((layer.keys, layer.values)):
                if keep:
                    kept = old[number][which]
                    columns = min(width, kept.shape[2])
                    target[: len(keep), :, width - columns :] = kept[keep, :, kept.shape[2] - columns :]
                for at, one in enumerate(joining, len(keep)):
                    target[at, :, width - one.length :] = one.part[number][which][:, : one.length]
            layers.append(layer)
        self.cache = Cache(layers=layers)
        starts_B1 = width - torch.tensor(self.lengths, device=self._device)[:, None]
        self.mask_BT = torch.arange(width + room, device=self._device) >= starts_B1

    def step(self) -> Tensor:
        """Logits [B, V], float32, of the token after each row's newest one."""
        if self.width == self.mask_BT.shape[1]:
            self.repack()
        # A finished row rides along until its slot is taken; its position must stay inside the model's.
        at = [0 if row.done else length for row, length in zip(self.rows, self.lengths, strict=True)]
        ids_B1, positions_B1 = torch.tensor([[row.new[-1] for row in self.rows], at], device=self._device)[:, :, None]
        self.width += 1
        mask_BT: Tensor | None = None
        if any(length + 1 < self.width for length in at if length):
            mask_BT = self.mask_BT[:, : self.width]
            mask_BT = mask_BT[:, None, None] if self._final_mask else mask_BT.long()
        out = self.model(
            input_ids=ids_B1,
            attention_mask=mask_BT,
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
    """Write `new` of all rows. Up to `slots` decode together; a free slot is filled at once, the longest prompts first.

    `budget` bounds the padded tokens of one prefill.
    """
    waiting = deque(sorted(rows, key=lambda row: (-len(row.prompt), row.prompt)))
    ready: deque[Joining] = deque()
    pool = Slots(model)

    def take(logits_BV: Tensor, taking: Sequence[Row]) -> None:
        noise = [row.noise[len(row.new)] if row.noise and not row.done else 0.0 for row in taking]
        for row, token in zip(taking, choose(logits_BV, sampling, noise), strict=True):
            if not row.done:
                row.new.append(token)
                row.done = ended(row)

    while waiting or ready or pool.live():
        free = slots - pool.live()
        while waiting and len(ready) < free:
            # As many as one pass has room for: a pass for each row that finds a free slot would be a pass a row.
            count = max(free - len(ready), min(slots, budget // len(waiting[0].prompt)))
            # Candidates of one document have one prompt, which is run once.
            coming: dict[tuple[int, ...], list[Row]] = {}
            while waiting and (count > 0 or tuple(waiting[0].prompt) in coming):
                row = waiting.popleft()
                coming.setdefault(tuple(row.prompt), []).append(row)
                count -= 1
            for logits_BV, joining in _prefilled(model, coming, prefix, slots, budget):
                take(logits_BV, [one.row for one in joining])
                ready.extend(one for one in joining if not one.row.done)
        pool.fill(ready, slots)
        if pool.live():
            take(pool.step(), pool.rows)


def _prefilled(
    model: PreTrainedModel, rows: Mapping[tuple[int, ...], Sequence[Row]], prefix: KV | None, slots: int, budget: int
) -> Iterator[tuple[Tensor, list[Joining]]]:
    """The rows of each prompt, batch by batch, with the logits [B, V], float32, of their first tokens."""
    prompts = list(rows)
    shared = prefix[0][0].shape[2] if prefix else 0
    for batch in batches([len(prompt) for prompt in prompts], slots, budget):
        some = [prompts[at] for at in batch]
        logits, cache = prefill(model, some, [[len(prompt) - 1] for prompt in some], prefix)
        kv = cached(cache)
        joining, places = [], []
        for place, prompt in enumerate(some):
            part = [(keys[place], values[place]) for keys, values in kv]
            joining += [Joining(row, shared + len(prompt), part) for row in rows[prompt]]
            places += [place] * len(rows[prompt])
        yield torch.cat(logits)[places].float(), joining


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
