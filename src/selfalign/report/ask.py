"""Use a trained model: a full one, an adapter, or the last one of a run."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from selfalign.core.errors import UsageError
from selfalign.core.identity import seed_for
from selfalign.core.locations import Location, located
from selfalign.core.protocols import Request, Sampling
from selfalign.engines.adapters import check_adapter
from selfalign.engines.config import ModelConfig, on_this_machine
from selfalign.engines.open import open_engine
from selfalign.report.run import RunView
from selfalign.stages.prompting import chat


@dataclass(frozen=True)
class Found:
    """A model, how to load it, and how it is addressed."""

    config: ModelConfig
    adapter: Path | None = None
    system: str | None = None


def ask(model: str, prompts: Sequence[str], sampling: Sampling, seed: int) -> list[str]:
    """The model's replies to single-turn prompts, in order."""
    found = find(model)
    config = on_this_machine(found.config)
    if found.adapter is not None and config.engine == "transformers":
        # Before the base is loaded, which takes its time.
        check_adapter(found.adapter, config)
    engine = open_engine(config)
    requests = [
        Request(str(n), chat(prompt, found.system), seed_for(seed, str(n), "generate"))
        for n, prompt in enumerate(prompts)
    ]
    return [reply.text for reply in engine.generate(requests, sampling, found.adapter)]


def find(model: str) -> Found:
    """What `model` names: a run (its final model, loaded as it was evaluated), an adapter, or a model.

    Raises UsageError where nothing is there.
    """
    root = located(model)
    if (root / "run.json").exists():
        return _of_run(root)
    folder = Path(model)
    if not folder.is_dir() and not _may_be_on_the_hub(folder):
        raise UsageError(
            f"there is no folder {model}; name a run, an adapter or a model by its folder, or a model on the Hub as "
            "org/name (gpt2 is openai-community/gpt2)"
        )
    settings = folder / "adapter_config.json"
    if not settings.exists():
        return Found(ModelConfig(path=str(folder) if folder.is_dir() else model))
    adapter = json.loads(settings.read_bytes())
    base = adapter.get("base_model_name_or_path")
    if not base:
        raise UsageError(f"{settings} does not say which base its adapter belongs to")
    template = folder / "chat_template.jinja"
    name = str(template) if template.exists() else None
    return Found(ModelConfig(path=base, revision=adapter.get("revision"), chat_template=name), folder)


def _may_be_on_the_hub(name: Path) -> bool:
    """Whether it has the form org/name. The Hub's few names of one word have such a name too, and a typing error in a
    folder's name is far likelier than one of them."""
    return len(name.parts) == 2 and not name.parent.is_dir()


def _of_run(root: Location) -> Found:
    trained = RunView.open(root).final_model()
    if trained is None:
        raise UsageError(f"{root} has no trained forward model yet")
    # These alone: what else the recipe holds may be another version's.
    recipe = json.loads((root / "recipe.json").read_bytes())
    model, system = ModelConfig.model_validate(recipe["model"]), recipe["evaluate"]["system"]
    files = trained.local_files()
    if (files / "adapter_config.json").exists():
        adapter = find(str(files))
        # Precision and quantisation are the recipe's, base and template those that the adapter was trained with.
        update = adapter.config.model_dump(include={"path", "revision", "chat_template"})
        return Found(model.model_copy(update=update), files, system)
    update = {"path": str(files), "revision": None, "chat_template": None}
    return Found(model.model_copy(update=update), None, system)
