"""An engine that follows a script instead of a model: for tests, and to try a recipe's plumbing in seconds.

The script is a JSON file (`model.path`): a list of rules, tried in order on the text of a request's messages.

    {"match": "capital of (\\\\w+)", "reply": "What is the capital of \\\\1?"}      a regular expression and a reply
    {"match": "…", "scores": {" 4": 0.7, " 1": 0.1}}                                 probabilities of continuations
    {"match": "…", "action": "exit"}                                                  kill the process, as a crash would
    {"match": "…", "action": "hang"}                                                  never answer
    {"match": "…", "action": "fill"}                                                  take all the memory that there is
    {"match": "…", "action": "too_long"}                                              the prompt leaves no room

Where no rule matches, the reply is the prompt's digest and scores are uniform.
"""

import hashlib
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from selfalign.core.errors import InternalError, UsageError
from selfalign.core.frozen import Frozen
from selfalign.core.protocols import STOP, Reply, Request, Sampling, Score
from selfalign.engines.config import ModelConfig


class Rule(Frozen):
    """One line of a script."""

    match: re.Pattern[str]
    reply: str | None = None
    scores: dict[str, float] | None = None
    action: Literal["exit", "hang", "fill", "too_long"] | None = None


class ScriptedEngine:
    """See the module. Implements `core.protocols.Engine`."""

    def __init__(self, config: ModelConfig) -> None:
        try:
            self._rules = TypeAdapter(list[Rule]).validate_json(Path(config.path).read_bytes())
        except OSError as error:
            raise UsageError(f"model.path: no script {config.path!r} for the scripted engine") from error
        except ValidationError as error:
            raise UsageError(f"{config.path} is no script: {error.errors()[0]['msg']}") from error
        self.tokens = 0
        self._closed = False

    def generate(self, requests: Sequence[Request], sampling: Sampling, adapter: Path | None = None) -> list[Reply]:
        """See `core.protocols.Generator`."""
        self._refuse_closed()
        return [self._reply(request, sampling) for request in requests]

    def score(
        self, requests: Sequence[Request], continuations: Sequence[Sequence[str]], adapter: Path | None = None
    ) -> list[list[Score] | None]:
        """See `core.protocols.Scorer`."""
        self._refuse_closed()
        return [self._score(r, options) for r, options in zip(requests, continuations, strict=True)]

    def close(self) -> None:
        """Nothing is held. The engine cannot be used afterwards, as no other could."""
        self._closed = True

    def _refuse_closed(self) -> None:
        if self._closed:
            raise InternalError("the engine was used after it was closed")

    def _reply(self, request: Request, sampling: Sampling) -> Reply:
        text = _text(request)
        rule, found = self._rule(text, lambda rule: rule.reply is not None)
        if rule is not None and rule.action == "too_long":
            return Reply("", 0, "too_long")
        if rule is None or found is None or rule.reply is None:
            written = hashlib.sha256(f"{text}{request.seed if sampling.temperature else 0}".encode()).hexdigest()[:12]
        else:
            written = found.expand(rule.reply)
        for stop in sampling.stop:
            written = written.split(stop)[0]
        words = written.split(" ")
        self.tokens += len(words)
        cut = len(words) > sampling.max_new_tokens
        kept = " ".join(words[: sampling.max_new_tokens])
        return Reply(kept, min(len(words), sampling.max_new_tokens), "length" if cut else "stop")

    def _score(self, request: Request, options: Sequence[str]) -> list[Score] | None:
        rule, _ = self._rule(_text(request), lambda rule: rule.scores is not None)
        if rule is not None and rule.action == "too_long":
            return None
        table = rule.scores if rule and rule.scores else {}
        self.tokens += len(options)
        uniform = 1 / max(2, len(options))
        # A script says nothing of ends: they are certain, and so is nothing at all.
        texts = [option.removesuffix(STOP) for option in options]
        shares = [table.get(text, 1e-9 if table else uniform) if text else 1.0 for text in texts]
        logs = [math.log(share) if share > 0 else -math.inf for share in shares]
        return [Score(log, 1 if option else 0) for log, option in zip(logs, options, strict=True)]

    def _rule(self, text: str, fits: Callable[[Rule], bool]) -> tuple[Rule | None, re.Match[str] | None]:
        for rule in self._rules:
            found = re.compile(rule.match.pattern, re.DOTALL).search(text)
            if found:
                _act(rule.action)
            if found and (fits(rule) or rule.action):
                return rule, found
        return None, None


def _act(action: str | None) -> None:
    """Do to this process what a row might do."""
    if action == "exit":
        os._exit(1)
    while action == "hang":
        time.sleep(1)
    taken = []
    while action == "fill":
        taken.append(bytearray(os.urandom(1 << 20) * 64))


def _text(request: Request) -> str:
    return "\n".join(message["content"] for message in request.messages)
