"""The engine that runs a model in this process, with transformers and PEFT."""

import gc
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from selfalign.core.errors import InternalError, MismatchError
from selfalign.core.protocols import Reply, Request, Sampling, Score
from selfalign.engines.adapters import check_adapter, refuse_adapter
from selfalign.engines.chat import Chat, before_first, common_prefix
from selfalign.engines.config import ModelConfig
from selfalign.engines.loading import load_model, load_tokenizer

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

    from selfalign.engines.decoding import KV, Row

SHORTEST_PREFIX = 32
"""Tokens below which a shared prefix is not worth a forward pass of its own."""

KEPT_PREFIXES = 4

PREFILL_TOKENS = {"cpu": 256, "cuda": 16_384}
"""Padded tokens of one forward pass: a CPU gains nothing from more, and pays for padding."""


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
        prompts = self._chat.encode([self._chat.prompt(request.messages) for request in requests])
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
        it. The stop token counts only where the text of a continuation holds it.
        """
        import torch

        from selfalign.engines.decoding import batches, prefill

        model = self._with(adapter)
        scores: list[list[Score] | None] = []
        jobs: list[_Reading] = []
        for number, (request, ways) in enumerate(zip(requests, continuations, strict=True)):
            context, tails = self._tails(request, ways)
            if len(context) + max(map(len, tails), default=0) > self._limit:
                scores.append(None)
                continue
            scores.append([Score(0.0, len(tail)) for tail in tails])
            jobs += _readings(number, context, tails)
            self.tokens += len(context) + sum(map(len, tails))
        with torch.inference_mode():
            prefix, shared = self._prefix(model, adapter, [job.context for job in jobs])
            tokens = [job.tokens[shared:] for job in jobs]
            for batch in batches([len(row) for row in tokens], self._config.slots, self._budget):
                wanted = [jobs[at].positions(shared) for at in batch]
                logits, _ = prefill(model, [tokens[at] for at in batch], wanted, prefix)
                for at, logits_LV in zip(batch, logits, strict=True):
                    for way, score in jobs[at].read(logits_LV):
                        row = scores[jobs[at].request]
                        assert row is not None
                        row[way] = score
        return scores

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
        def ended(row: "Row") -> bool:
            return row.new[-1] in self._stop_ids or len(row.new) >= limit or self._chat.stopped(row.new, stops)

        return ended

    def _reply(self, request: Request, prompt: Sequence[int], row: "Row", stops: Sequence[str]) -> Reply:
        stopped = row.new[-1] in self._stop_ids
        written = row.new[:-1] if stopped else row.new
        opened = bool(request.messages) and request.messages[-1]["role"] == "assistant"
        whole = self._chat.decode(written, after=prompt[-4:] if opened else ())
        text = before_first(whole, stops)
        finish: Literal["stop", "length"] = "stop" if stopped or text != whole else "length"
        return Reply(text if opened else text.lstrip(), len(row.new), finish)

    def _tails(self, request: Request, ways: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """The tokens that all continuations of a request share, and what each of them adds."""
        texts = [self._chat.prompt(request.messages, way) for way in ways]
        if not texts:
            return [], []
        if len(ways) == 1:
            *joints, prompt = self._chat.encode_variants([*texts, self._chat.prompt(request.messages)])
            shared = common_prefix([*joints, prompt])
        else:
            joints = self._chat.encode_variants(texts)
            # Where one continuation is the start of another, it keeps a token of its own to be scored by.
            shared = min(common_prefix(joints), min(map(len, joints)) - 1)
        if not shared:
            raise MismatchError(
                f"{request.id}: nothing stands before the continuation to score; use a chat template that opens "
                "the assistant's turn"
            )
        return joints[0][:shared], [joint[shared:] for joint in joints]

    def _prefix(
        self, model: "PreTrainedModel", adapter: Path | None, contexts: Sequence[list[int]]
    ) -> tuple["KV | None", int]:
        """Keys and values of the tokens that all `contexts` start with, and their number; each keeps one token."""
        from selfalign.engines.decoding import cached, prefill

        shared = min(common_prefix(contexts), min(map(len, contexts)) - 1) if len(contexts) > 1 else 0
        if shared < SHORTEST_PREFIX:
            return None, 0
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


@dataclass(frozen=True, slots=True)
class _Reading:
    """One forward pass and what to read from it: each of `tails` begins after the last token of `context`."""

    request: int
    context: list[int]
    tokens: list[int]
    tails: list[tuple[int, list[int]]]

    def positions(self, shared: int) -> list[int]:
        """Where the logits of the tails stand, counted from token `shared` on."""
        return list(range(len(self.context) - 1 - shared, len(self.tokens) - shared))

    def read(self, logits_LV: "Tensor") -> list[tuple[int, Score]]:
        """Each tail's number and Score from the logits at `positions`."""
        logs_LV = logits_LV.log_softmax(-1)
        return [
            (way, Score(float(logs_LV[range(len(tail)), tail].double().sum()), len(tail))) for way, tail in self.tails
        ]


def _readings(request: int, context: list[int], tails: Sequence[list[int]]) -> list[_Reading]:
    """One pass for tails of one token each, which are all read at its end; else one for each tail."""
    numbered = [(way, tail) for way, tail in enumerate(tails) if tail]
    if all(len(tail) == 1 for tail in tails):
        return [_Reading(request, context, context, numbered)] if numbered else []
    return [_Reading(request, context, context + tail[:-1], [(way, tail)]) for way, tail in numbered]


def _noise(seed: int, sampling: Sampling) -> "Tensor | None":
    """One number in [0, 1) for each token a row may get, from the row's seed alone."""
    import torch

    if sampling.temperature == 0:
        return None
    return torch.rand(sampling.max_new_tokens, generator=torch.Generator().manual_seed(seed % 2**63))


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
