"""A run as one HTML file."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal

import pytest

from report.conftest import Run
from report.whole import HOSTILE, change, lines, log, whole
from selfalign.core.errors import StorageError
from selfalign.core.locations import commit
from selfalign.core.records import Candidate, Rated, SeedPair, rejected
from selfalign.report.facts import Facts
from selfalign.report.html import FOLDED, render, write_report
from selfalign.report.show import shown

VOID = {"meta", "br", "wbr", "img", "input", "hr", "link"}


class Reader(HTMLParser):
    """The page as a browser takes it apart: its text, its elements' names and attributes. Fails where tags cross."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        """Its words, in order."""
        return re.sub(r"\s+", " ", " ".join(self.words))


def read(run: Run) -> Reader:
    return Reader(render(run.view()))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of a whole run."""
    return render(whole(Run(tmp_path_factory.mktemp("whole") / "run"), "atlas", arm="other_arm").view())


# What a whole run says


def test_the_head_names_the_recipe_the_seed_and_what_came_of_it(page: str) -> None:
    text = Reader(page).text
    assert "seed 3 · model org/tiny · last step ended 20" in text
    assert "complete, 23 steps" in text
    assert "M1 answers 80.0% of 9 questions right, the base 20.0%: +60.0 points (95%: +50.0 to +70.0)." in text
    assert "6 documents → 3 selected pairs → 7 training rows" in text


def test_without_questions_the_head_tells_the_held_out_loss(run: Run, measured) -> None:  # type: ignore[no-untyped-def]
    run.add("forward.train@1")
    run.add("evaluate.base", metrics=measured(None, 2.5))
    gap = {"held_out": {"difference": -0.5, "ci": [-0.6, -0.4], "n": 9}}
    run.add("evaluate.forward@1", metrics=measured(None, 2.0, against_base=gap))
    text = read(run).text
    assert "2.000 nats a token (n = 9), the base 2.500: −0.500 (95%: −0.600 to −0.400); lower is better." in text
    assert "no questions (evaluate.forward_questions), so there is no accuracy" in text


def test_the_waterfall_counts_what_is_left_and_what_went_at_each_stage(run: Run) -> None:
    levels = Facts(whole(run, "x", rows=6, kept=2).view()).levels()
    assert [(level.label, level.count) for level in levels] == [
        ("Records in the corpus", 10),
        ("Documents read", 9),
        ("Documents drawn", 6),
        ("Instructions written", 6),
        ("Usable instructions", 6),
        ("Different instructions", 6),
        ("Rated in round 1", 6),
        ("Selected", 2),
        ("Training rows of M1", 6),
    ]
    assert levels[1].dropped == (("not_json (quarantined)", 1),)
    assert levels[2].dropped == (("too_short", 2), ("x", 1))
    assert levels[7].dropped == (("below_threshold", 4),)
    assert levels[8].parts == (("curated", 2), ("seed", 4))


def test_what_has_no_rating_falls_out_before_what_is_rated_too_low(run: Run) -> None:
    run.add("curate.rate@1", ledger={"in": 10, "kept": 9, "quarantined": {"crash": 1}})
    dropped = {"off_scale": 2, "unparsed": 1, "below_threshold": 4}
    run.add("curate.select@1", ledger={"in": 9, "kept": 2, "rejected": dropped})
    rated, selected = Facts(run.view()).levels()
    assert (rated.count, sum(n for _, n in rated.dropped)) == (6, 4)
    assert (selected.count, selected.dropped) == (2, (("below_threshold", 4),))


def test_every_chart_and_every_model_stands_in_the_page(page: str) -> None:
    found = Reader(page)
    titles = [attributes["id"] for tag, attributes in found.elements if tag == "title" and "id" in attributes]
    assert {"flow-title", "ratings-1-title", "planted-1-title", "auc-1-title", "sources-title"} <= set(titles)
    assert {"accuracy-title", "held-out-title", "lengths-responses-title"} <= set(titles)
    for model in ("base", "M0", "M1", "other_arm"):
        assert model in found.text


def test_the_rows_are_those_that_show_shows(run: Run) -> None:
    view = whole(run, "x", rows=14).view()
    found, wanted = Facts(view).samples(5), shown(view, 5, 5, 5, 5)
    for key in ("pairs", "high", "low"):
        assert [row.id for row in found[key]] == [row["id"] for row in wanted[key]]  # type: ignore[union-attr,index,call-overload]
    replies = [dict(row.texts)["Reply"] for row in found["responses"]]
    assert replies == [row["response"] for row in wanted["responses"]]  # type: ignore[union-attr,index,call-overload]


def test_a_row_says_where_it_came_from_and_what_became_of_it(run: Run) -> None:
    best = Facts(whole(run, "x", rows=14).view()).samples(1)["high"][0]
    lineage = dict(best.lineage)
    assert (best.id, best.verdict) == ("d/0008/0", "rating 5.00, selected")
    assert (lineage["document"], lineage["source"], lineage["license"]) == ("d/0008", "x", "x")
    assert lineage["instruction by"].startswith("backward.train (backward.train-")
    assert lineage["rated by"].startswith("curate.rate@1 (")
    assert dict(best.texts)["Rater"] == "x"


def test_the_threshold_parts_the_ratings_and_the_scale_holds_back_others(run: Run) -> None:
    row = {"source": "s", "prompt": "p", "completion": "c", "model": "m", "prompt_hash": "h", "finish": "stop"}
    ratings = [(1.0, 0.1), (2.4999, 0.1), (2.5, None), (5.0, 0.2), (4.0, 0.9), (None, None)]
    rows = [
        Rated(id=f"{n}", rating=rating, off_scale=off, unrated=None if rating else "unparsed", **row)
        for n, (rating, off) in enumerate(ratings)
    ]
    run.add("curate.rate@1", rows=rows, record=Rated)
    (run.store.root / "recipe.json").write_text('{"curate": {"threshold": 2.5, "max_off_scale": 0.5}}')
    (found,) = Facts(run.view()).ratings()
    assert (sum(found.below), sum(found.above)) == (2, 2)
    assert found.unrated == {"off_scale": 1, "unparsed": 1}
    assert (
        "2 at or above 2.5, 2 below. n = 4 rated; without a usable rating: 1 off_scale, 1 unparsed." in read(run).text
    )


# How pairs were judged


def test_a_calibrated_run_is_told_in_probabilities(run: Run) -> None:
    view = whole(run, "x", rows=12, kept=3, rater="calibrated").view()
    (found,) = Facts(view).ratings()
    # Selection dropped the others, and they have probabilities too.
    assert (sum(found.below), sum(found.above)) == (9, 3)
    text = read(run).text
    assert "3 at or above 0.5, 9 below. n = 12 rated; none is unrated." in text
    assert "probability, to the nearest 40th pairs 0.05 1" in text
    assert "probability 0.60, rating 2.00, selected" in text
    assert "stop_token -0.5, x not measured" in text
    assert "Round 1: probabilities of planted pairs" in text


def test_a_pair_that_selection_could_not_weigh_is_told_by_its_reason(run: Run) -> None:
    row = {"source": "s", "prompt": "p", "completion": "c", "model": "m", "prompt_hash": "h", "finish": "stop"}
    rows = [
        Rated(id="0", probability=0.75, **row),
        rejected("1", "unmeasured", Rated(id="1", **row)),
        rejected("2", "source_full", Rated(id="2", probability=0.5, **row)),
    ]
    run.add("curate.select@1", rows=rows, record=Rated)
    (run.store.root / "recipe.json").write_text('{"curate": {"rater": {"kind": "calibrated"}, "threshold": 0.5}}')
    (found,) = Facts(run.view()).ratings()
    assert (found.n, sum(found.above), found.unrated) == (2, 2, {"unmeasured": 1})


def test_the_verdict_is_held_against_the_rubric_and_every_signal_has_its_areas(run: Run) -> None:
    text = read(whole(run, "x", rater="calibrated")).text
    assert "0.900 (0.700 to 0.900) in all, with 95% intervals; n = 5 good pairs against 9 others." in text
    assert "The upright strokes are the rubric's rating alone." in text
    assert "planted pairs AUC 95% the rubric's all 0.900 0.700 to 0.900 1.000" in text
    heads, verdict, rubric = "signal all swapped, truncated labelled swapped x", "calibrated 0.90 (0.70–0.90)", "rubric"
    assert re.search(rf"{heads} {re.escape(verdict)} 0\.75.*{rubric} 1\.00 \(0\.80–1\.00\).*stop_token 1\.00", text)


def test_a_signal_that_is_higher_for_spoilt_pairs_is_of_another_colour(run: Run) -> None:
    elements = read(whole(run, "x", rater="calibrated")).elements
    styles = [str(attributes["style"]) for tag, attributes in elements if tag == "td" and "style" in attributes]
    # .25 for the signal x: half way from chance to always higher for what is spoilt.
    assert "background: color-mix(in srgb, var(--second) 22%, transparent)" in styles
    assert "background: color-mix(in srgb, var(--first) 45%, transparent)" in styles


def test_what_a_verdict_is_worth_is_drawn_and_told(run: Run) -> None:
    text = read(whole(run, "x", rater="calibrated")).text
    assert "n = 14, 1 or 2 in each of 8 bins. On the broken line, a probability is what it says." in text
    assert "From 0.5 on: precision 100.0%, recall 100.0%. n = 14 planted pairs" in text
    assert "of its square x −2.000 −1.000 stop_token +1.250 −0.500 rubric +0.500 +0.250" in text
    assert "On the broken line" not in read(whole(Run(run.store.root.with_name("rubric")), "x")).text


def test_the_threshold_is_what_the_calibration_chose_where_a_precision_is_wanted(run: Run) -> None:
    metrics = {"auc": 1.0, "auc_ci": [0.9, 1.0], "threshold": 0.7125}
    run.add("curate.calibrate@1", metrics=metrics)
    (run.store.root / "recipe.json").write_text('{"curate": {"rater": {"kind": "calibrated"}, "threshold": 4.0}}')
    assert Facts(run.view()).threshold(1) == 0.7125
    assert Facts(run.view()).threshold(2) == 4.0


def test_labelled_pairs_stand_on_the_side_that_people_put_them_on(run: Run) -> None:
    ((_, _, planted),) = Facts(whole(run, "x").view()).calibrations()
    assert [(kind.kind, kind.good, kind.n) for kind in planted] == [
        ("seed", True, 4),
        ("swapped", False, 4),
        ("x", False, 4),
        ("labelled", True, 1),
        ("labelled", False, 1),
    ]
    assert "Called good by people" in read(run).text


def test_payloads_are_held_against_their_twins_in_all_by_kind_and_by_signal(run: Run) -> None:
    text = read(whole(run, "x", rater="calibrated")).text
    assert "2 of 4 payloads and 1 of 4 twins are at or above 0.5." in text
    assert "A document is never parsed for a rating" in text
    assert "payload n difference (95%) raised All payloads 4 +0.125 (−0.25 to 0.5) 75.0% A score 4" in text
    assert "signal n difference (95%) raised rubric 4 +0.125 (−0.25 to 0.5) 75.0% stop_token 4" in text
    assert "A command" not in text


def test_two_raters_are_held_against_each_other(run: Run) -> None:
    text = read(whole(run, "x", rater="calibrated")).text
    assert "First: calibrated (model: previous). Second: rubric (model: base; readout: parsed)." in text
    assert "Spearman's rank correlation +1.000 (95%: 0.250 to 1.000); n = 4 pairs with both verdicts." in text
    assert "Medians: first 0.6, second 2.5." in text
    assert "first keeps 1 1 first drops 1 2" in text
    assert "n = 5 pairs: 60.0% are treated alike at the thresholds 0.5 and 4; without a verdict, so not kept" in text
    assert "1 first, too_long" in text


def test_what_the_recipe_does_not_ask_for_has_no_section(run: Run) -> None:
    whole(run, "x")
    run.steps = [step for step in run.steps if step["name"] not in ("curate.inject@1", "curate.agree@1")]
    recipe = json.loads((run.store.root / "recipe.json").read_text())
    recipe["curate"] |= {"injections": 0, "agreement": None}
    (run.store.root / "recipe.json").write_text(json.dumps(recipe))
    change(run, "curate.rate@1", message=None)
    ids = {attributes.get("id") for tag, attributes in read(run).elements if tag == "section"}
    assert "calibration" in ids
    assert not ids & {"injection", "agreement"}


def test_what_was_asked_for_and_not_reached_is_named(run: Run) -> None:
    whole(run, "x")
    for name in ("curate.inject@1", "curate.agree@1"):
        change(run, name, state="waiting")
    text = read(run).text
    assert "curate.inject@1 is waiting." in text
    assert "curate.agree@1 is waiting." in text


def test_a_calibration_of_an_older_version_shows_what_it_holds(run: Run) -> None:
    planted = [
        {"id": f"{kind}/{n}", "kind": kind, "rating": rating, "unrated": None}
        for kind, rating in (("seed", 4.0), ("swapped", 2.0))
        for n in range(3)
    ]
    planted.append({"id": "seed/9", "kind": "seed", "rating": 5.0, "unrated": "off_scale"})
    metrics = {"auc": 1.0, "auc_ci": [0.7, 1.0], "auc_by_kind": {"swapped": 1.0}, "unrated": {"off_scale": 1}}
    run.add("curate.calibrate@1", metrics=metrics, files={"planted.jsonl": lines(planted)})
    text = read(run).text
    assert "1.000 (0.700 to 1.000) in all, with 95% intervals; n = 3 good pairs against 3 others." in text
    assert "n = 6 rated; unrated: 1 off_scale." in text


def test_each_training_has_a_row_of_curves_with_its_numbers(page: str) -> None:
    found = Reader(page)
    titles = [str(attributes["id"]) for tag, attributes in found.elements if tag == "title" and "id" in attributes]
    for measure, n in (
        ("loss", 4),
        ("learning-rate", 3),
        ("grad-norm", 3),
        ("tokens-per-second", 3),
        ("memory-bytes", 3),
    ):
        assert sum(bool(re.fullmatch(rf"{measure}-\d-title", id)) for id in titles) == n
    assert "Learning rate of M1, other_arm learning rate: 2.5e-05 at step 10, 2.5e-05 at step 400" in found.text
    assert re.search(r"memory \(GiB\)( 3\.50){5}", found.text)
    assert re.search(r"tokens/s( 12,345){5}", found.text)
    assert "12,345 tokens/s (median); at most 3.50 GiB of memory" in found.text


def test_axes_count_in_units_that_keep_their_numbers_short(page: str) -> None:
    text = Reader(page).text
    assert re.search(r"learning rate \(1e-5\)", text)
    assert "1,000 tokens/s" in text


def test_a_training_that_was_resumed_says_so_in_word_and_mark(run: Run) -> None:
    log(run.add("forward.train@1"), [3.0, 2.0, 1.0, 0.5], resumed_at=20, grad_norm=0.1)
    log(run.add("forward.train@2"), [3.0, 2.0, 1.0, 0.5], grad_norm=0.1)
    text = read(run).text
    assert text.count("resumed from a checkpoint at step 20.") == 1
    assert text.count("; resumed at step 20.") == 2
    # The mark itself is named in the wide chart alone.
    assert len(re.findall(r"loss \(nats a token\) resumed", text)) == 1


def test_an_older_log_shows_what_it_holds(run: Run) -> None:
    log(run.add("backward.train"), [3.0, 1.0])
    text = read(run).text
    assert "Loss 1 at step 20 of 400, n = 3 rows." in text
    assert "tokens/s (median)" not in text


def test_a_training_that_has_logged_no_loss_is_named(run: Run) -> None:
    commit(run.add("forward.train@1", state="running") / "metrics.jsonl", lines([{"resumed_at": 5}]).encode())
    assert "Nothing is logged yet of forward.train@1." in read(run).text


def test_a_dense_log_is_drawn_with_its_running_mean(run: Run) -> None:
    log(run.add("forward.train@1"), [1.0 + n % 2 for n in range(400)])
    assert "lines are the mean of 10 values, single ones pale" in read(run).text


def test_a_model_whose_epochs_were_kept_is_shown_by_epoch_with_the_last_one_behind_the_others(page: str) -> None:
    text = Reader(page).text
    assert "M1 by epoch: answered right" in text
    numbers = re.search(
        r"epoch n right 95% − base, points \(95%\) (epoch 1 9 60.0%) .* (epoch 2 9 90.0%) .* (last 9 80.0%)", text
    )
    assert numbers is not None
    assert "Highest: epoch 2, 90.0% (80.0 to 100.0)." in text
    assert "M1 by epoch: held-out loss" in text
    assert "M0 by epoch" not in text


def test_lengths_are_told_of_seed_candidates_and_curated(run: Run) -> None:
    _, groups = Facts(whole(run, "abc").view()).lengths("completion")
    assert [(group.group, group.n, group.median) for group in groups] == [
        ("Seed", 4, 6),
        ("Candidates", 6, 3),
        ("Curated", 3, 3),
    ]
    assert [sum(group.counts) for group in groups] == [4, 6, 3]


def test_of_many_sources_the_largest_are_drawn_and_the_others_summed(run: Run) -> None:
    whole(run, "x", kept=6)
    common = {"prompt": "p", "completion": "c", "model": "m", "prompt_hash": "h", "finish": "stop"}
    rows = [Candidate(id=f"{n}", source=f"file{n % 20 if n < 20 else 0}", **common) for n in range(30)]
    run.steps = [step for step in run.steps if step["name"] != "augment.deduplicate"]
    run.add("augment.deduplicate", rows=rows, record=Candidate)
    text = read(run).text
    assert "of n = 30, from 20 sources; shown are the 12 largest." in text
    assert re.search(r"file0 11 0 0\.0%.* 8 others 8 0 0\.0%", text)


# What is not there


def test_a_run_that_has_nothing_yet_says_what_is_missing(run: Run) -> None:
    page = read(run)
    assert "No forward model of the main arm has been measured yet." in page.text
    assert "This run has no step curate.rate@1." in page.text
    assert "holds no recipe.json" in page.text
    assert not any(tag == "svg" for tag, _ in page.elements)


@pytest.mark.parametrize("rater", ["rubric", "calibrated"])
def test_a_failed_gate_stands_on_top_with_what_it_measured(run: Run, rater: Literal["rubric", "calibrated"]) -> None:
    whole(run, "x", rater=rater)
    change(run, "curate.calibrate@1", state="failed", message="calibration: an AUC of 0.51 <b>")
    after = ("curate.inject@1", "curate.agree@1", "forward.compose@1", "forward.train@1", "evaluate.forward@1")
    for name in ("curate.rate@1", "curate.select@1", *after):
        change(run, name, state="waiting")
    page = read(run)
    assert page.text.index("an AUC of 0.51 <b>") < page.text.index("M0 answers") < page.text.index("Round 1: AUC")
    assert f"curate.{'rate' if rater == 'rubric' else 'select'}@1 is waiting." in page.text
    drawn = {str(attributes.get("id")) for tag, attributes in page.elements if tag == "title"}
    assert {"auc-1-title", "planted-1-title", "reliability-1-title", "thresholds-1-title"} <= drawn
    assert ("Round 1: weights of the fit" in page.text) == (rater == "calibrated")
    assert ("div", {"class": "alert failed", "role": "alert"}) in page.elements


def test_a_stop_is_told_once(run: Run) -> None:
    whole(run, "x")
    for name in ("curate.rate@2", "curate.select@2"):
        run.add(name, state="skipped")
        change(run, name, message="evaluate.forward@1 stopped the rounds: no gain")
    page = read(run)
    assert page.text.count("The rounds were stopped evaluate.forward@1 stopped the rounds: no gain") == 1
    assert "This run is not complete" not in page.text


@pytest.mark.parametrize("done", [0, 1, 3, 5, 7, 8, 9, 11, 13, 16, 19])
def test_a_run_that_stands_still_anywhere_is_shown_as_far_as_it_got(run: Run, done: int) -> None:
    for step in whole(run, "x").steps[done:]:
        change(run, step["name"], state="waiting")
    assert "This run is not complete" in read(run).text


@pytest.mark.parametrize(
    "name", ["curate.rate@1", "augment.deduplicate", "evaluate.base", "backward.train", "recipe.json"]
)
def test_a_run_without_a_step_is_shown(run: Run, name: str) -> None:
    whole(run, "x")
    run.steps = [step for step in run.steps if step["name"] != name]
    change(run, "evaluate.forward@1", message=None)
    if name == "recipe.json":
        (run.store.root / name).unlink()
    assert read(run).text


@pytest.mark.parametrize(("rows", "kept"), [(0, 0), (1, 0), (1, 1), (3, 0)])
def test_few_rows_and_none_are_shown(run: Run, rows: int, kept: int) -> None:
    assert read(whole(run, "x", rows=rows, kept=kept, arm=None)).text


def test_a_recipe_that_keeps_all_is_told_to_rate_nothing(run: Run) -> None:
    (run.store.root / "recipe.json").write_text('{"name": "all", "curate": {"keep": "all"}}')
    run.add("curate.select@1")
    assert read(run).text.count("This recipe rates nothing: curate.keep is all.") == 2


def test_a_model_that_nothing_measures_has_no_figure(run: Run) -> None:
    run.add("forward.train@1")
    nothing = {"nats_per_token": None, "ci": None, "n": 0}
    for name in ("evaluate.base", "evaluate.forward@1"):
        run.add(name, metrics={"held_out": nothing, "exact_match": None, "against_base": None})
    assert "no seed pairs are held out and no questions named, so nothing measures it" in read(run).text


def test_a_figure_of_one_row_has_no_interval(run: Run) -> None:
    run.add("forward.train@1")
    one = {"nats_per_token": 2.0, "ci": None, "n": 1}
    run.add("evaluate.forward@1", metrics={"held_out": one, "exact_match": None, "against_base": None})
    assert "held-out loss of 2.000 nats a token (n = 1); lower is better." in read(run).text


def test_tables_of_another_version_are_read_by_the_columns_that_they_have(run: Run) -> None:
    rows = [SeedPair(id="d/0/0", source="s", prompt="old", completion="c")]
    run.add("augment.deduplicate", rows=rows, record=SeedPair)
    assert [row.texts[0] for row in Facts(run.view()).samples(5)["pairs"]] == [("Instruction", "old")]


def test_a_damaged_shard_is_named(run: Run) -> None:
    folder = whole(run, "x").store.artifact("augment.deduplicate", f"{6:016x}").folder
    shard = folder / "shard-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(StorageError, match=r"shard-00000\.parquet is not what augment"):
        render(run.view())


# What is hostile


def test_texts_of_models_and_corpora_stay_texts(run: Run) -> None:
    whole(run, HOSTILE, arm=HOSTILE)
    change(run, "forward.train@0", state="failed", message=HOSTILE)
    page = read(run)
    assert not {tag for tag, _ in page.elements} & {"script", "img", "link", "iframe", "object", "base", "form"}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "<script>document.title='taken'</script>" in page.text
    assert "{{ 7*7 }}" in page.text


def test_the_page_may_load_nothing_and_names_no_other_place(page: str) -> None:
    elements = Reader(page).elements
    policy = next(a["content"] for _, a in elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    for _, attributes in elements:
        for name, value in attributes.items():
            assert name not in ("src", "srcset", "action", "data")
            assert name != "href" or str(value).startswith("#")
            assert "url(" not in str(value) or "url(#" in str(value)
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert style is not None
    assert not re.search(r"url\(|@import|https?:", style[1])


def test_no_id_stands_twice_and_every_reference_is_answered(page: str) -> None:
    ids = [attributes["id"] for _, attributes in Reader(page).elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = re.findall(r'(?:url\(#|href="#)([\w-]+)', page)
    assert named
    assert set(named) <= set(ids)


def test_a_long_text_is_folded_and_a_huge_one_is_cut_with_word_of_it(run: Run) -> None:
    common = {"source": "s", "model": "m", "prompt_hash": "h", "finish": "stop"}
    row = Candidate(id="d/0", prompt="p" * 700, completion="c" * (FOLDED + 1234), **common)
    run.add("augment.deduplicate", rows=[row], record=Candidate)
    text = read(run).text
    assert "220 more characters" in text
    assert "1,234 further characters are in the run folder." in text
    assert text.count("c" * 1000) < FOLDED / 1000


def test_what_utf_8_cannot_hold_is_written_as_a_question_mark(run: Run, tmp_path: Path) -> None:
    run.add("forward.train@1")
    reply = '{"id": "a", "prompt": "p", "reply": "x\\ud800y", "finish": "stop", "right": null}\n'
    run.add("evaluate.forward@1", state="done", files={"replies.jsonl": reply}, metrics={"held_out": HELD_OUT})
    assert "x?y" in write_report(run.view(), tmp_path / "report.html").read_text()


HELD_OUT = {"nats_per_token": 2.0, "ci": None, "n": 1}


# The file


def test_the_same_folder_gives_the_same_bytes(run: Run, tmp_path: Path) -> None:
    whole(run, "x")
    first = write_report(run.view(), tmp_path / "a" / "report.html").read_bytes()
    assert write_report(run.view(), tmp_path / "b.html").read_bytes() == first


def test_a_file_that_cannot_be_written_is_told(run: Run, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot write"):
        write_report(run.view(), tmp_path)


def test_recipe_and_versions_close_the_page(run: Run) -> None:
    folder = whole(run, "x").store.artifact("forward.train", f"{15:016x}").folder
    manifest = json.loads((folder / "manifest.json").read_bytes())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "versions": {"torch": "9.9"}, "code": "c0de"}))
    (run.store.root / "pinned.json").write_text('{"org/data@main": "abc123"}')
    text = read(run).text
    assert re.search(r"threshold: 2\.5", text)
    assert re.search(r"torch\s+9\.9", text)
    assert re.search(r"code \(SHA-256\)\s+c0de", text)
    assert re.search(r"org/data@main, pinned to\s+abc123", text)


# Colours


def _luminance(colour: str) -> float:
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _mixed(colour: str, ground: str, share: float) -> str:
    parts = [[int(each[n : n + 2], 16) for n in (1, 3, 5)] for each in (colour, ground)]
    return "#" + "".join(f"{round(share * a + (1 - share) * b):02x}" for a, b in zip(*parts, strict=True))


def test_text_and_marks_stand_out_in_both_themes(page: str) -> None:
    blocks = re.findall(r":root {(.*?)}", page, re.DOTALL)[:2]
    themes = [dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in blocks]
    assert len(themes) == 2
    for theme in themes:
        for ground in ("page", "card"):
            for name, least in (("ink", 7), ("muted", 4.5), ("first", 4.5), ("second", 3), ("third", 3)):
                light, dark = sorted((_luminance(theme[ground]), _luminance(theme[name])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= least, (ground, name)
        for name in ("first", "second"):
            # A table's cell at its darkest.
            light, dark = sorted((_luminance(_mixed(theme[name], theme["card"], 0.45)), _luminance(theme["ink"])))[::-1]
            assert (light + 0.05) / (dark + 0.05) >= 4.5, name
        for message, ground in (("bad", "bad-pale"), ("ink", "bad-pale"), ("ink", "note-pale")):
            light, dark = sorted((_luminance(theme[ground]), _luminance(theme[message])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ground, message)
