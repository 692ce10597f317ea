"""Use a trained model: a full one, an adapter, or the last one of a run."""

import json
from collections.abc import Sequence
from pathlib import Path

from selfalign.core.errors import UsageError
from selfalign.core.identity import seed_for
from selfalign.core.protocols import Request, Sampling
from selfalign.engines.config import ModelConfig, on_this_machine
from selfalign.engines.open import open_engine
from selfalign.report.run import RunView


def ask(model: str, prompts: Sequence[str], max_new_tokens: int, temperature: float, seed: int) -> list[str]:
    """The model's replies to single-turn prompts, in order."""
    config, adapter = find(model)
    engine = open_engine(on_this_machine(config))
    sampling = Sampling(temperature=temperature, max_new_tokens=max_new_tokens)
    requests = [
        Request(str(n), ({"role": "user", "content": prompt},), seed_for(seed, str(n), "generate"))
        for n, prompt in enumerate(prompts)
    ]
    return [reply.text for reply in engine.generate(requests, sampling, adapter)]


def find(model: str) -> tuple[ModelConfig, Path | None]:
    """How to load `model`, and its adapter if it is one. Raises UsageError where nothing is there."""
    folder = Path(model)
    if (folder / "run.json").exists():
        step = RunView.open(folder).final_model()
        if step is None:
            raise UsageError(f"{model} has no trained forward model yet")
        folder = step.files
    settings = folder / "adapter_config.json"
    if not settings.exists():
        return ModelConfig(path=str(folder) if folder.is_dir() else model), None
    adapter = json.loads(settings.read_bytes())
    base = adapter.get("base_model_name_or_path")
    if not base:
        raise UsageError(f"{settings} does not say which base its adapter belongs to")
    template = folder / "chat_template.jinja"
    return ModelConfig(
        path=base, revision=adapter.get("revision"), chat_template=str(template) if template.exists() else None
    ), folder
