"""A run as one HTML file."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from report.conftest import Run
from report.whole import HOSTILE, change, lines, log, whole
from selfalign.core.errors import StorageError
from selfalign.core.records import Candidate, Rated, SeedPair
from selfalign.core.store import commit
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
    assert "complete, 19 steps" in text
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
        ("Rated in round 1", 6),
        ("Selected", 2),
        ("Training rows of M1", 6),
    ]
    assert levels[1].dropped == (("not_json (quarantined)", 1),)
    assert levels[2].dropped == (("too_short", 2), ("x", 1))
    assert levels[6].dropped == (("below_threshold", 4),)
    assert levels[7].parts == (("curated", 2), ("seed", 4))


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
    run.steps = [step for step in run.steps if step["name"] != "augment.filter"]
    run.add("augment.filter", rows=rows, record=Candidate)
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


def test_a_failed_gate_stands_on_top_with_what_it_measured(run: Run) -> None:
    whole(run, "x")
    change(run, "curate.calibrate@1", state="failed", message="calibration: an AUC of 0.51 <b>")
    for name in ("curate.rate@1", "curate.select@1", "forward.compose@1", "forward.train@1", "evaluate.forward@1"):
        change(run, name, state="waiting")
    page = read(run)
    assert page.text.index("an AUC of 0.51 <b>") < page.text.index("M0 answers") < page.text.index("Round 1: AUC")
    assert "curate.rate@1 is waiting." in page.text
    assert ("div", {"class": "alert failed", "role": "alert"}) in page.elements


def test_a_stop_is_told_once(run: Run) -> None:
    whole(run, "x")
    for name in ("curate.rate@2", "curate.select@2"):
        run.add(name, state="skipped")
        change(run, name, message="evaluate.forward@1 stopped the rounds: no gain")
    page = read(run)
    assert page.text.count("The rounds were stopped evaluate.forward@1 stopped the rounds: no gain") == 1
    assert "This run is not complete" not in page.text


@pytest.mark.parametrize("done", [0, 1, 3, 5, 7, 8, 10, 13, 16])
def test_a_run_that_stands_still_anywhere_is_shown_as_far_as_it_got(run: Run, done: int) -> None:
    for step in whole(run, "x").steps[done:]:
        change(run, step["name"], state="waiting")
    assert "This run is not complete" in read(run).text


@pytest.mark.parametrize("name", ["curate.rate@1", "augment.filter", "evaluate.base", "backward.train", "recipe.json"])
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
    run.add("augment.filter", rows=rows, record=SeedPair)
    assert [row.texts[0] for row in Facts(run.view()).samples(5)["pairs"]] == [("Instruction", "old")]


def test_a_damaged_shard_is_named(run: Run) -> None:
    folder = whole(run, "x").store.artifact("augment.filter", f"{5:016x}").folder
    shard = folder / "shard-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(StorageError, match=r"shard-00000\.parquet is damaged"):
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
    run.add("augment.filter", rows=[row], record=Candidate)
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
    folder = whole(run, "x").store.artifact("forward.train", f"{12:016x}").folder
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


def test_text_and_marks_stand_out_in_both_themes(page: str) -> None:
    blocks = re.findall(r":root {(.*?)}", page, re.DOTALL)[:2]
    themes = [dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in blocks]
    assert len(themes) == 2
    for theme in themes:
        for ground in ("page", "card"):
            for name, least in (("ink", 7), ("muted", 4.5), ("first", 4.5), ("second", 3), ("third", 3)):
                light, dark = sorted((_luminance(theme[ground]), _luminance(theme[name])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= least, (ground, name)
        for message, ground in (("bad", "bad-pale"), ("ink", "bad-pale"), ("ink", "note-pale")):
            light, dark = sorted((_luminance(theme[ground]), _luminance(theme[message])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ground, message)
