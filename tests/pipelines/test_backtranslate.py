"""The real pipeline: which steps there are, in which order, and what changes with which key."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import small
from selfalign.cli import main
from selfalign.core.errors import RecipeError, UsageError
from selfalign.core.stage import Step
from selfalign.pipelines.backtranslate import steps
from selfalign.pipelines.externals import Externals
from selfalign.pipelines.runner import in_order
from selfalign.recipe import load
from selfalign.stages.evaluate import Evaluate
from selfalign.stages.judge import Judge


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
BACKWARD = {"backward.train", "evaluate.backward", "augment.generate", "augment.filter", "augment.deduplicate"}
AUGMENTED = {"curate.rate@1", *AFTER_SELECT}
DOCUMENTS = {"prepare.pick_corpus", "augment.generate", "augment.filter", "augment.deduplicate", *AUGMENTED}
# All that has one writer, and what is made of it.
WRITTEN_WHOLE = {"prepare.pick_seed", "backward.compose", *BACKWARD, *DOCUMENTS, *FORWARD, "curate.plant"}
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
        # A rubric is tested on planted pairs, and what it keeps is not decided by them.
        ("curate.plants=[swapped]", {"curate.plant", "curate.calibrate@1", "curate.calibrate@2"}),
        ("curate.quantile=0.5", AFTER_SELECT),
        ("curate.max_per_source=9", AFTER_SELECT),
        ("curate.max_per_cluster=9", AFTER_SELECT),
        ("curate.target_precision=0.5", {"curate.calibrate@1", *AFTER_SELECT}),
        ("curate.signals=[rubric]", set()),
        ("curate.min_pairs=1", set()),
        ("augment.temperature=0.8", {"augment.generate", "augment.filter", "augment.deduplicate", *AUGMENTED}),
        ("augment.filters=[]", {"augment.filter", "augment.deduplicate", *AUGMENTED}),
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
        ("resources.augment.workers.max=4", set()),
        ("arms=null", set()),
        ("rounds=1", set()),
        ("shard_rows=512", set()),
        ("shard_rows=64", {*WRITTEN_WHOLE, "evaluate.base", "evaluate.base_backward"}),
    ],
)
def test_changing_a_key_changes_exactly_the_steps_that_follow_from_it(
    recipe: Path, override: str, changed: set[str]
) -> None:
    before, after = identities(recipe), identities(recipe, override)
    assert {key for key in after if before[key] != after[key]} == changed


CALIBRATED = (
    "curate.rater.kind=calibrated",
    "curate.threshold=0.5",
    "curate.injections=10",
    "curate.agreement={against: {reasoning_tokens: 8, max_off_scale: 1}}",
)
BESIDE_1, BESIDE_2 = ({f"curate.inject@{k}", f"curate.agree@{k}"} for k in (1, 2))
AFTER_CALIBRATION = {"curate.calibrate@1", *BESIDE_1, *BESIDE_2, *AFTER_SELECT}


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        # What only moves a threshold rates nothing anew and fits nothing anew in its round.
        ("curate.threshold=0.6", {*BESIDE_1, *BESIDE_2, *AFTER_SELECT}),
        ("curate.quantile=0.5", {*BESIDE_2, *AFTER_SELECT}),
        ("curate.plants=[swapped]", {"curate.plant", *AFTER_CALIBRATION}),
        ("curate.labels={labels}", {"curate.plant", *AFTER_CALIBRATION}),
        ("curate.target_precision=0.8", AFTER_CALIBRATION),
        ("curate.signals=[rubric, stop_token]", {"curate.rate@1", *AFTER_CALIBRATION}),
        ("curate.injections=11", {"curate.inject@1", "curate.inject@2"}),
        ("curate.agreement.sample=9", {"curate.agree@1", "curate.agree@2"}),
        ("curate.agreement.threshold=3", {"curate.agree@1", "curate.agree@2"}),
        ("curate.min_pairs=1", set()),
        ("curate.min_auc=0.5", set()),
    ],
)
def test_of_a_calibrated_rater_a_key_changes_what_follows_from_it(
    recipe: Path, override: str, changed: set[str]
) -> None:
    labels = recipe.parent / "labels.jsonl"
    labels.write_text('{"prompt": "Why?", "completion": "So.", "good": false}\n')
    before = identities(recipe, *CALIBRATED)
    after = identities(recipe, *CALIBRATED, override.format(labels=labels) if "labels" in override else override)
    assert {key for key in after if before[key] != after[key]} == changed


def test_another_label_plants_anew_and_fits_anew(recipe: Path) -> None:
    labels = recipe.parent / "more_labels.jsonl"
    found = []
    for n in (1, 2):
        labels.write_text("".join(f'{{"prompt": "Why {at}?", "completion": "So.", "rating": 1}}\n' for at in range(n)))
        found.append(identities(recipe, *CALIBRATED, f"curate.labels={labels}"))
    assert {key for key in found[0] if found[0][key] != found[1][key]} == {"curate.plant", *AFTER_CALIBRATION}


def test_injection_and_agreement_are_measured_where_the_recipe_asks_for_them_and_nothing_depends_on_them(
    recipe: Path,
) -> None:
    without = identities(recipe, *CALIBRATED[:2])
    run = made(recipe, *CALIBRATED)
    with_ = {step.key: step.identity for step in run if step.arm is None}
    assert with_.keys() - without.keys() == {*BESIDE_1, *BESIDE_2}
    assert without.items() <= with_.items()
    measured = [step for step in run if step.key in {*BESIDE_1, *BESIDE_2}]
    assert not any(step in other.parents() for step in measured for other in run)


def test_pairs_are_planted_once_and_before_anything_is_trained(recipe: Path) -> None:
    names = [step.name for step in made(recipe, *CALIBRATED)]
    assert names.count("curate.plant") == 1
    planted = names.index("curate.plant")
    assert all(step.startswith(("prepare.", "curate.plant")) for step in names[: planted + 1])


def test_a_seed_too_small_to_calibrate_on_ends_the_run_before_any_model_is_loaded(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(config: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("selfalign.engines.open.open_engine", loaded)
    root = tmp_path / "run"
    assert main(["run", str(recipe), *CALIBRATED, "--run", str(root)]) == 3
    told = "8 good pairs are held out or labelled to fit the rater on, and curate.min_pairs wants 20: 12 are missing"
    assert told in capsys.readouterr().err
    main(["status", str(root), "--json"])
    states = {step["name"]: step["state"] for step in json.loads(capsys.readouterr().out)["steps"]}
    assert states["curate.plant"] == "failed"
    assert {states[name] for name in ("evaluate.base", "backward.train", "curate.calibrate@1")} == {"waiting"}


def test_signals_that_the_engine_cannot_measure_are_refused_before_anything_runs(recipe: Path) -> None:
    scripted = (*CALIBRATED[:2], "model.engine=scripted")
    with pytest.raises(UsageError, match=r"curate\.signals: .* needs an engine that can tell how likely") as caught:
        made(recipe, *scripted)
    assert caught.value.exit_code == 2
    assert made(recipe, *scripted, "curate.signals=[rubric, ngram_overlap]")
    assert made(recipe, "model.engine=scripted")


def test_a_second_rater_of_the_model_before_needs_a_seed_model_too(recipe: Path) -> None:
    base = ("curate.rater.model=base", "arms=null")
    for who, trained in (("previous", True), ("base", False)):
        against = f"curate.agreement={{against: {{rater: {{model: {who}}}}}}}"
        assert ("forward.train@0" in identities(recipe, *base, against)) is trained


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
    prepared.add("curate.plant")
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


JUDGED = ("evaluate.replies=6", "evaluate.judge={model: base}")


def test_a_judge_compares_each_forward_model_with_the_base_and_nothing_depends_on_it(recipe: Path) -> None:
    before, run = identities(recipe, "evaluate.replies=6"), made(recipe, *JUDGED)
    after = {step.key: step.identity for step in run if step.arm is None}
    assert after.keys() - before.keys() == {f"evaluate.judge@{k}" for k in (0, 1, 2)}
    assert {key for key in before if before[key] != after[key]} == set()
    by_key = {step.key: step for step in run}
    for key, step in by_key.items():
        if "evaluate.judge" in key:
            now = by_key[key.replace("judge", "forward")]
            base = by_key["evaluate.base"]
            assert step.inputs == {"now": now, "base": base, "model": base.inputs["model"]}
            assert not any(step in other.parents() for other in run)
    assert "uncurated/evaluate.judge@1" in by_key


def test_replies_measure_anew_and_change_no_model(recipe: Path) -> None:
    before, after = identities(recipe), identities(recipe, "evaluate.replies=6")
    changed = {*EVALUATE_FORWARD, "evaluate.base_backward", "evaluate.backward"}
    assert {key for key in after if before[key] != after[key]} == changed


def test_a_judge_that_is_the_base_shares_its_engine_and_another_is_loaded_as_the_base_is(recipe: Path) -> None:
    base = next(step for step in made(recipe) if step.name == "evaluate.base").stage
    assert isinstance(base, Evaluate)
    for named in ("base", base.model.path):
        override = f"evaluate.judge={{model: {named}}}"
        (judge,) = {step.stage for step in made(recipe, "evaluate.replies=6", override) if "judge" in step.name}
        assert isinstance(judge, Judge)
        assert judge.model == base.model


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["evaluate.judge={model: base}"], "set replies to their number"),
        ([*JUDGED, "prepare.seed.held_out=0"], "prepare.seed.held_out=0 has none"),
        (
            ["evaluate.replies=6", "evaluate.judge={model: /not/there}"],
            r"evaluate\.judge\.model: no model at /not/there",
        ),
        ([*JUDGED, "evaluate.judge.prompt_file=/not/there"], "the prompt file /not/there cannot be read"),
        ([*JUDGED, "evaluate.judge.prompt_file=LACKS"], r"lacks the placeholder \{second\}"),
    ],
)
def test_a_judge_that_cannot_judge_is_told_before_anything_runs(recipe: Path, overrides: list[str], told: str) -> None:
    lacking = recipe.parent / "lacks.txt"
    lacking.write_text("{instruction} {first}")
    with pytest.raises(UsageError, match=told) as caught:
        made(recipe, *(override.replace("LACKS", str(lacking)) for override in overrides))
    assert caught.value.exit_code == 2
