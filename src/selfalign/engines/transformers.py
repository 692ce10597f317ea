"""The engine that runs a model in this process, with transformers and PEFT."""

import gc
import sys
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from selfalign.core.errors import InternalError, MismatchError
from selfalign.core.protocols import Reply, Request, Sampling, Score
from selfalign.engines.adapters import check_adapter, refuse_adapter
from selfalign.engines.chat import Chat, before_first, common_prefix
from selfalign.engines.config import ModelConfig
from selfalign.engines.loading import load_model, load_tokenizer
from selfalign.engines.passes import SHORTEST_PREFIX, Reading, groups, readings

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

    from selfalign.engines.decoding import KV, Row

KEPT_PREFIXES = 4

PREFILL_TOKENS = {"cpu": 512, "cuda": 16_384}
"""Padded tokens of one forward pass: a CPU gains nothing from more, and pays for padding."""

PASS_TOKENS = {"cpu": 64, "cuda": 512}
"""What one more forward pass costs, in tokens. The CPU's is measured; the GPU's is a guess, not measured."""


class TransformersEngine:
    """A base model with its tokenizer and template, and the adapters that were asked for.

    What a call returns depends on that call alone, never on earlier ones, so that a resumed run and a run with
    other workers write the same bytes.
    """

    def __init__(self, config: ModelConfig) -> None:
        """Load the model. Raises what `loading` raises, and MismatchError for one whose cache cannot be shared."""
        import torch

        torch.set_num_threads(config.threads)
        refuse_adapter(config)
        self.tokens = 0
        self._config = config
        self._chat = Chat(load_tokenizer(config))
        self._model: PreTrainedModel | None = load_model(config)
        self._limit = _positions(config.path, self._model)
        self._stop_ids = self._chat.stop_ids | _ending_ids(self._model)
        self._budget = PREFILL_TOKENS[self._model.device.type]
        self._peft: PeftModel | None = None
        self._adapters: dict[str, str] = {}
        self._prefixes: OrderedDict[tuple[str | None, tuple[int, ...]], KV] = OrderedDict()

    def generate(self, requests: Sequence[Request], sampling: Sampling, adapter: Path | None = None) -> list[Reply]:
        """One reply a request, in order. Without an opening, white space at a reply's start is dropped."""
        import torch

        from selfalign.engines.decoding import Row, decode

        model = self._with(adapter)
        encoded = self._chat.encode_alike([[self._chat.prompt(request.messages)] for request in requests])
        prompts = [prompt.ids for (prompt,) in encoded]
        fitting = [at for at, prompt in enumerate(prompts) if len(prompt) + sampling.max_new_tokens <= self._limit]
        stops = (*sampling.stop, *self._chat.stop_texts)
        replies = [Reply("", 0, "too_long") for _ in requests]
        with torch.inference_mode():
            prefix, shared = self._prefix(model, adapter, [prompts[at] for at in fitting])
            rows = [Row(prompts[at][shared:], _noise(requests[at].seed, sampling)) for at in fitting]
            ended = self._ended(sampling.max_new_tokens, stops)
            decode(model, rows, prefix, sampling, ended, slots=self._config.slots, budget=self._budget)
        for at, row in zip(fitting, rows, strict=True):
            replies[at] = self._reply(requests[at], prompts[at], row, stops)
            self.tokens += len(prompts[at]) + len(row.new)
        return replies

    def score(
        self, requests: Sequence[Request], continuations: Sequence[Sequence[str]], adapter: Path | None = None
    ) -> list[list[Score] | None]:
        """For each request, one Score for each of its continuations; None where the prompt left no room.

        After a user's message a continuation is the start of the assistant's turn, rendered as training renders
        it. See `core.protocols.Scorer`.
        """
        import torch

        model = self._with(adapter)
        scores: list[list[Score] | None] = []
        jobs: list[Reading] = []
        for number, (context, tails) in enumerate(self._tails(requests, continuations)):
            if len(context) + max(map(len, tails), default=0) > self._limit:
                scores.append(None)
                continue
            scores.append([Score(0.0, len(tail)) for tail in tails])
            jobs += readings(number, context, tails)
            self.tokens += len(context) + sum(map(len, tails))
        with torch.inference_mode():
            for job, logits_LV in self._passes(model, adapter, jobs):
                for way, score in job.read(logits_LV):
                    row = scores[job.request]
                    assert row is not None
                    row[way] = score
        return scores

    def _passes(
        self, model: "PreTrainedModel", adapter: Path | None, jobs: Sequence[Reading]
    ) -> "Iterator[tuple[Reading, Tensor]]":
        """Each of `jobs` with the logits at its positions. What some of them begin with is run once for all of these.

        First what all begin with, then what candidates of one document do.
        """
        from selfalign.engines.decoding import batches, cached, prefill

        prefix, shared = self._prefix(model, adapter, [job.context for job in jobs])
        alone, alike = groups([job.context[shared:-1] for job in jobs], PASS_TOKENS[model.device.type])
        yield from self._run(model, [jobs[at] for at in alone], prefix, shared)
        for batch in batches([common for common, _ in alike], self._config.slots, self._budget):
            heads = [jobs[alike[at][1][0]].tokens[shared : shared + alike[at][0]] for at in batch]
            _, cache = prefill(model, heads, [[len(head) - 1] for head in heads], prefix)
            for place, at in enumerate(batch):
                common, members = alike[at]
                ends = shared + common
                one = slice(place, place + 1)
                start = [(keys[one, :, :ends], values[one, :, :ends]) for keys, values in cached(cache)]
                yield from self._run(model, [jobs[member] for member in members], start, ends)

    def _run(
        self, model: "PreTrainedModel", jobs: Sequence[Reading], prefix: "KV | None", shared: int
    ) -> "Iterator[tuple[Reading, Tensor]]":
        """Each of `jobs` with the logits at its positions; their first `shared` tokens are in `prefix`."""
        from selfalign.engines.decoding import batches, prefill

        for batch in batches([len(job.tokens) - shared for job in jobs], self._config.slots, self._budget):
            some = [jobs[at] for at in batch]
            wanted = [job.positions(shared) for job in some]
            logits, _ = prefill(model, [job.tokens[shared:] for job in some], wanted, prefix)
            yield from zip(some, logits, strict=True)

    def close(self) -> None:
        """Free the model's memory. The engine cannot be used afterwards."""
        import torch

        self._model = self._peft = None
        self._adapters.clear()
        self._prefixes.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _ended(self, limit: int, stops: Sequence[str]) -> "Callable[[Row], bool]":
        stopped = self._chat.stopper(stops)

        def ended(row: "Row") -> bool:
            return row.new[-1] in self._stop_ids or len(row.new) >= limit or stopped(row.new)

        return ended

    def _reply(self, request: Request, prompt: Sequence[int], row: "Row", stops: Sequence[str]) -> Reply:
        stopped = row.new[-1] in self._stop_ids
        written = row.new[:-1] if stopped else row.new
        opened = bool(request.messages) and request.messages[-1]["role"] == "assistant"
        whole = self._chat.decode(written, after=prompt[-4:] if opened else ())
        text = before_first(whole, stops)
        finish: Literal["stop", "length"] = "stop" if stopped or text != whole else "length"
        return Reply(text if opened else text.lstrip(), len(row.new), finish)

    def _tails(
        self, requests: Sequence[Request], continuations: Sequence[Sequence[str]]
    ) -> "Iterator[tuple[list[int], list[list[int]]]]":
        """The tokens of each request that all its continuations leave as they are, and what each of them adds."""
        texts = [
            [self._chat.prompt(request.messages, way) for way in ways]
            for request, ways in zip(requests, continuations, strict=True)
        ]
        for request, ways, joints in zip(requests, texts, self._chat.encode_alike(texts), strict=True):
            if not joints:
                yield [], []
                continue
            known = common_prefix([*ways, self._chat.prompt(request.messages)])
            shared = min(common_prefix([joint.ids for joint in joints]), *(bisect_right(j.ends, known) for j in joints))
            if not shared:
                raise MismatchError(
                    f"{request.id}: nothing stands before the continuation to score; use a chat template that opens "
                    "the assistant's turn"
                )
            yield joints[0].ids[:shared], [joint.ids[shared:] for joint in joints]

    def _prefix(
        self, model: "PreTrainedModel", adapter: Path | None, contexts: Sequence[list[int]]
    ) -> tuple["KV | None", int]:
        """Keys and values of tokens that all `contexts` start with, and their number; each keeps one token."""
        from selfalign.engines.decoding import cached, prefill

        shared = min(common_prefix(contexts), min(map(len, contexts)) - 1) if len(contexts) > 1 else 0
        if shared < SHORTEST_PREFIX:
            return None, 0
        # Some words more are the same only in this call: the prompt's own lines are so in the next one too.
        lines = (at for at in range(shared, SHORTEST_PREFIX - 1, -1) if self._chat.ends_line(contexts[0][at - 1]))
        shared = next(lines, shared)
        tokens = contexts[0][:shared]
        # Exactly these tokens: a slice of a longer prefix has other last bits, and a result would tell what ran before.
        key = (None if adapter is None else str(adapter.resolve()), tuple(tokens))
        if key not in self._prefixes:
            _, cache = prefill(model, [tokens], [[shared - 1]], None)
            self._prefixes[key] = cached(cache)
        self._prefixes.move_to_end(key)
        while len(self._prefixes) > KEPT_PREFIXES:
            self._prefixes.popitem(last=False)
        return self._prefixes[key], shared

    def _with(self, adapter: Path | None) -> "PreTrainedModel":
        """The model with just this adapter, or none, switched on."""
        if self._model is None:
            raise InternalError("the engine was used after it was closed")
        if adapter is not None:
            key = str(adapter.resolve())
            if key not in self._adapters:
                self._adapters[key] = self._load(adapter)
            assert self._peft is not None
            self._peft.set_adapter(self._adapters[key])
            self._peft.base_model.enable_adapter_layers()
        elif self._peft is not None:
            self._peft.base_model.disable_adapter_layers()
        return self._model

    def _load(self, adapter: Path) -> str:
        from peft import PeftConfig, PeftModel

        check_adapter(adapter, self._config)
        name = f"adapter{len(self._adapters)}"
        # The dtype it was saved in: float32 copies of a half-precision adapter would only be slower.
        if self._peft is None:
            config = PeftConfig.from_pretrained(str(adapter))
            self._peft = PeftModel(self._model, config, name, autocast_adapter_dtype=False)
        self._peft.load_adapter(str(adapter), name, autocast_adapter_dtype=False)
        return name


def _noise(seed: int, sampling: Sampling) -> list[float] | None:
    """One number in [0, 1) for each token a row may get, from the row's seed alone."""
    import torch

    if sampling.temperature == 0:
        return None
    noise: list[float] = torch.rand(
        sampling.max_new_tokens, generator=torch.Generator().manual_seed(seed % 2**63)
    ).tolist()
    return noise


def _positions(path: str, model: "PreTrainedModel") -> int:
    """How many tokens a conversation may have."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise MismatchError(f"{path} has layers without a key-value cache ({', '.join(sorted(kinds))}): not supported")
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


def _ending_ids(model: "PreTrainedModel") -> frozenset[int]:
    ids: Any = model.generation_config.eos_token_id if model.generation_config else None
    return frozenset([] if ids is None else ids if isinstance(ids, list) else [ids])
