"""The real pipeline: which steps there are, in which order, and what changes with which key."""

from dataclasses import replace
from pathlib import Path

import pytest

import small
from selfalign.core.errors import RecipeError, UsageError
from selfalign.core.stage import Step
from selfalign.pipelines.backtranslate import steps
from selfalign.pipelines.externals import Externals
from selfalign.pipelines.runner import in_order
from selfalign.recipe import load


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write(tmp_path_factory.mktemp("small"))


def made(recipe: Path, *overrides: str) -> list[Step]:
    return in_order(steps(load(recipe, overrides), Externals()))


def identities(recipe: Path, *overrides: str) -> dict[str, str]:
    return {step.key: step.identity for step in made(recipe, *overrides) if step.arm is None}


FORWARD_1 = {"forward.compose@1", "forward.train@1", "evaluate.forward@1"}
ROUND_2 = {
    "curate.calibrate@2",
    "curate.rate@2",
    "curate.select@2",
    "forward.compose@2",
    "forward.train@2",
    "evaluate.forward@2",
}
AFTER_SELECT = {"curate.select@1", *FORWARD_1, *ROUND_2}
CURATE_1 = {"curate.calibrate@1", "curate.rate@1", *AFTER_SELECT}
FORWARD_0 = {"forward.compose@0", "forward.train@0", "evaluate.forward@0"}
FORWARD = {*FORWARD_0, *CURATE_1}
BACKWARD = {"backward.train", "evaluate.backward", "augment.generate", "augment.filter"}
AUGMENTED = {"curate.rate@1", *AFTER_SELECT}
DOCUMENTS = {"prepare.pick_corpus", "augment.generate", "augment.filter", *AUGMENTED}
EVALUATE_FORWARD = {"evaluate.base", "evaluate.forward@0", "evaluate.forward@1", "evaluate.forward@2"}


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("curate.threshold=2", AFTER_SELECT),
        ("curate.min_auc=0.5", set()),
        ("curate.min_rated=0.5", set()),
        ("curate.max_off_scale=0.5", {"curate.calibrate@1", *AFTER_SELECT}),
        ("curate.reasoning_tokens=9", CURATE_1),
        ("curate.readout=parsed", CURATE_1),
        ("augment.temperature=0.8", {"augment.generate", "augment.filter", *AUGMENTED}),
        ("augment.filters=[]", {"augment.filter", *AUGMENTED}),
        ("backward.max_steps=5", {*BACKWARD, *AUGMENTED}),
        ("backward.num_processes=2", {*BACKWARD, *AUGMENTED}),
        ("backward.deepspeed=zero2", {*BACKWARD, *AUGMENTED}),
        # No weight depends on these.
        ("backward.save_steps=7", set()),
        ("backward.logging_steps=7", set()),
        ("backward.gradient_checkpointing=true", set()),
        ("forward.max_steps=5", {"forward.train@0", "evaluate.forward@0", *CURATE_1}),
        ("forward.seed_max_steps=5", {"forward.train@0", "evaluate.forward@0", *CURATE_1}),
        ("forward.augmented_system=x", FORWARD),
        ("evaluate.forward_questions=null", EVALUATE_FORWARD),
        ("evaluate.system=x", EVALUATE_FORWARD),
        ("prepare.corpus.near_duplicates=0.8", DOCUMENTS),
        ("prepare.corpus.min_chars=1", {"prepare.filter_corpus", *DOCUMENTS}),
        # As it is told from the rows, and another.
        ("prepare.corpus.format=document", set()),
        ("prepare.corpus.format=guanaco", {"prepare.read_corpus", "prepare.filter_corpus", *DOCUMENTS}),
        ("resources.augment.workers=4", set()),
        ("arms=null", set()),
        ("rounds=1", set()),
    ],
)
def test_changing_a_key_changes_exactly_the_steps_that_follow_from_it(
    recipe: Path, override: str, changed: set[str]
) -> None:
    before, after = identities(recipe), identities(recipe, override)
    assert {key for key in after if before[key] != after[key]} == changed


BY_EPOCHS = ("max_steps=-1", "num_train_epochs=3")


@pytest.mark.parametrize(
    ("direction", "changed", "added"),
    [
        ("backward", {*BACKWARD, *AUGMENTED}, {"evaluate.backward_epoch_1", "evaluate.backward_epoch_2"}),
        (
            "forward",
            {"forward.train@0", "evaluate.forward@0", *CURATE_1},
            {f"evaluate.forward_epoch_{epoch}@{k}" for epoch in (1, 2) for k in (0, 1, 2)},
        ),
    ],
)
def test_keeping_epochs_trains_anew_runs_what_follows_and_measures_each_epoch_before_the_last(
    recipe: Path, direction: str, changed: set[str], added: set[str]
) -> None:
    by_epochs = [f"{direction}.{key}" for key in BY_EPOCHS]
    before = identities(recipe, *by_epochs)
    after = identities(recipe, *by_epochs, f"{direction}.keep_epochs=true")
    assert after.keys() - before.keys() == added
    assert {key for key in before if before[key] != after[key]} == changed
    assert len({after[key] for key in added}) == len(added)


@pytest.mark.parametrize("lora_r", ["null", "4"])
def test_an_epoch_is_measured_as_the_last_one_is_and_nothing_depends_on_it(recipe: Path, lora_r: str) -> None:
    overrides = [f"forward.{key}" for key in (*BY_EPOCHS, "keep_epochs=true", f"lora_r={lora_r}")]
    run = made(recipe, *overrides, "evaluate.min_gain=0", "arms=null")
    by_name = {step.name: step for step in run}
    last = by_name["evaluate.forward@2"]
    for n in (1, 2):
        epoch = by_name[f"evaluate.forward_epoch_{n}@2"]
        assert epoch.stage == replace(last.stage, epoch=n, may_stop=False)
        assert epoch.inputs == {role: source for role, source in last.inputs.items() if role != "before"}
        assert (epoch.section, epoch.round) == ("evaluate", 2)
        assert not any(epoch in step.parents() for step in run)
        assert run.index(epoch) < run.index(last)


def test_an_m0_that_goes_by_steps_keeps_no_epochs(recipe: Path) -> None:
    overrides = [f"forward.{key}" for key in (*BY_EPOCHS, "keep_epochs=true", "seed_max_steps=5")]
    names = {step.name for step in made(recipe, *overrides)}
    assert "evaluate.forward_epoch_1@1" in names
    assert "evaluate.forward_epoch_1@0" not in names


@pytest.mark.parametrize(
    ("override", "kept"),
    [
        ("prepare.seed.top=20", {"prepare.read_seed", "prepare.filter_seed"}),
        ("prepare.seed.min_words=1", {"prepare.read_seed"}),
        ("prepare.seed.turns=all", set()),
    ],
)
def test_other_seed_pairs_change_all_but_the_documents(recipe: Path, override: str, kept: set[str]) -> None:
    before, after = identities(recipe), identities(recipe, override)
    corpus = {f"prepare.{verb}_corpus" for verb in ("read", "filter", "pick")}
    assert {key for key in before if before[key] == after[key]} == corpus | kept


def test_an_evaluation_set_counts_by_its_bytes(recipe: Path) -> None:
    override = f"prepare.corpus.decontaminate=[{recipe.parent / 'questions.jsonl'}]"
    before, after = identities(recipe), identities(recipe, override)
    assert {key for key in before if before[key] != after[key]} == {"prepare.filter_corpus", *DOCUMENTS}
    with pytest.raises(UsageError, match=r"prepare\.corpus\.decontaminate: there is no file or folder /not/there"):
        made(recipe, "prepare.corpus.decontaminate=[/not/there.jsonl]")


def test_the_seed_changes_all_that_is_drawn_and_the_model_all_that_it_makes(recipe: Path) -> None:
    before = identities(recipe)
    seeded = identities(recipe, "seed=1")
    assert {key for key in before if before[key] == seeded[key]} == {
        f"prepare.{verb}_{what}" for verb in ("read", "filter") for what in ("seed", "corpus")
    }
    slotted = identities(recipe, "model.slots=4")
    kept = {key for key in before if before[key] == slotted[key]}
    prepared = {f"prepare.{verb}_{what}" for verb in ("read", "filter", "pick") for what in ("seed", "corpus")}
    # Fewer slots, after the engine ran out of memory, rate anew but train nothing of what precedes.
    assert kept == {*prepared, "backward.compose", "backward.train", "forward.compose@0", "forward.train@0"}


def test_a_changed_prompt_file_changes_what_uses_it(recipe: Path) -> None:
    before = identities(recipe)
    prompt = recipe.parent / "rate.txt"
    old = prompt.read_text()
    prompt.write_text("Grade it.\n" + old)
    try:
        after = identities(recipe)
    finally:
        prompt.write_text(old)
    assert {key for key in after if before[key] != after[key]} == FORWARD | {"forward.compose@0"}


def test_arms_share_every_step_whose_identity_agrees(recipe: Path) -> None:
    own = {step.key for step in made(recipe) if step.arm}
    once = {"curate.select@1", "forward.compose@1", "forward.train@1", "evaluate.forward@1"}
    # The two arms keep all pairs in different numbers; neither makes a backward model or an M0 of its own.
    assert own == {f"{arm}/{name}" for arm in ("uncurated", "exposed") for name in once}


def test_a_gate_runs_before_training_that_it_does_not_need(recipe: Path) -> None:
    names = [step.name for step in made(recipe, "curate.rater.model=base")]
    assert names.index("curate.calibrate@1") < names.index("backward.train")
    names = [step.name for step in made(recipe)]
    assert names.index("forward.train@0") < names.index("curate.calibrate@1") < names.index("forward.train@1")


def test_a_rater_of_its_own_needs_no_seed_model(recipe: Path) -> None:
    names = [step.name for step in made(recipe, f"curate.rater.model={recipe.parent}/..", "arms=null")]
    assert "forward.train@0" not in names


def test_an_arm_that_names_no_arm_is_told(recipe: Path) -> None:
    with pytest.raises(RecipeError, match="names the arm 'other'; there are main, uncurated, exposed, mine"):
        made(recipe, "arms={mine: {curate.match_size: other, curate.keep: all}}")


def test_contradicting_settings_are_refused_before_anything_loads(recipe: Path) -> None:
    with pytest.raises(UsageError, match="lora_r"):
        made(recipe, "model.quantisation=nf4")


def test_a_contradiction_is_told_with_its_section_and_arm_before_any_model_is_looked_up(recipe: Path) -> None:
    both = "forward.packing: true, forward.group_by_length: true"
    with pytest.raises(UsageError, match=r"^arms\.mine: forward: packing .* group_by_length"):
        made(recipe, "model.path=/nowhere/at/all", f"arms={{mine: {{{both}}}}}")


def test_a_model_that_is_nowhere_is_told_in_one_sentence(recipe: Path) -> None:
    with pytest.raises(UsageError, match=r"model\.path: no model at /nowhere/at/all"):
        made(recipe, "model.path=/nowhere/at/all")


def test_the_main_arm_is_matched_to_and_never_matched_itself(recipe: Path) -> None:
    with pytest.raises(RecipeError, match="belong into an arm"):
        made(recipe, "curate.match_size=uncurated")


def test_a_broken_test_is_told_before_anything_is_trained(recipe: Path) -> None:
    questions = recipe.parent / "broken.jsonl"
    questions.write_text('{"prompt": "a"}\n')
    with pytest.raises(UsageError, match=r"broken\.jsonl:1: .*needs answers"):
        made(recipe, f"evaluate.forward_questions={questions}")
