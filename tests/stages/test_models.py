"""Which model a step talks to."""

from collections.abc import Callable

from selfalign.core.records import Document
from selfalign.core.stage import Context
from selfalign.engines.config import ModelConfig
from selfalign.stages.models import identity_of, model_at, open_model
from stages.conftest import FakeEngine, Stored

Seen = Callable[..., Context]
BASE = ModelConfig(path="org/base", revision="abc", chat_template="plain", slots=4)


def test_the_base_is_loaded_as_the_recipe_says(engine: FakeEngine, seen: Seen) -> None:
    assert model_at(BASE, seen()) == BASE
    assert identity_of(seen()) == "digest of base"
    assert open_model(BASE, seen()) == (engine, None)


def test_a_model_trained_in_full_takes_the_bases_place_with_its_own_template(seen: Seen, stored: Stored) -> None:
    trained = stored("train", [], Document)
    found = model_at(BASE, seen(model=trained))
    assert (found.path, found.revision, found.chat_template) == (str(trained.files), None, None)
    assert found.slots == 4
    assert identity_of(seen(model=trained)) == "identity of train"


def test_an_adapter_goes_on_top_of_the_base(engine: FakeEngine, seen: Seen, stored: Stored) -> None:
    adapter = stored("train", [], Document)
    context = seen(adapter=adapter)
    assert model_at(BASE, context) == BASE
    assert open_model(BASE, context) == (engine, adapter.files)
    assert identity_of(context) == "identity of train"
