"""Instruction backtranslation (arXiv 2308.06259) as a list of steps: rounds and arms unrolled, nothing run yet."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from selfalign.core.errors import RecipeError
from selfalign.core.stage import External, Resources, Stage, Step, WholeStage
from selfalign.data.config import SourceConfig
from selfalign.engines.config import ModelConfig
from selfalign.pipelines.externals import Externals
from selfalign.recipe import Loaded, Recipe
from selfalign.stages.augment import Deduplicate, Filter, Generate
from selfalign.stages.compose import ComposeBackward, ComposeForward
from selfalign.stages.curate.agree import Agree
from selfalign.stages.curate.calibrate import Calibrate
from selfalign.stages.curate.inject import Inject
from selfalign.stages.curate.plant import PlantPairs
from selfalign.stages.curate.rate import Rate, Rater
from selfalign.stages.curate.rubric import RaterConfig
from selfalign.stages.curate.select import KeepAll, Select
from selfalign.stages.evaluate import Direction, Evaluate, read_questions
from selfalign.stages.judge import Judge, JudgeConfig
from selfalign.stages.prepare.filter import EVALUATION, FilterCorpus, FilterSeed
from selfalign.stages.prepare.pick import PickCorpus, PickSeed
from selfalign.stages.prepare.read import ReadCorpus, ReadSeed
from selfalign.stages.train import Train
from selfalign.training.config import TrainConfig, refuse_contradictions

Source = Step | External


def steps(loaded: Loaded, externals: Externals) -> list[Step]:
    """The steps of the recipe and of all its arms. A step that an arm shares with an earlier one stands once."""
    if loaded.recipe.curate.match_size or loaded.recipe.forward.match_exposure:
        raise RecipeError("curate.match_size and forward.match_exposure belong into an arm: the main one is matched to")
    recipes: dict[str | None, Recipe] = {None: loaded.recipe}
    recipes.update(loaded.arms)
    for name, recipe in recipes.items():
        # Before any model is looked up or read for its digest.
        at = "" if name is None else f"arms.{name}: "
        refuse_contradictions(recipe.backward, recipe.model, f"{at}backward")
        refuse_contradictions(recipe.forward, recipe.model, f"{at}forward")
    built: dict[str | None, _Arm] = {}
    shared: dict[tuple[str, str, str], Step] = {}
    for name in _by_reference(recipes):
        built[name] = _Arm(name, recipes[name], externals, built, shared)
        built[name].unroll()
    return list(shared.values())


def _by_reference(recipes: Mapping[str | None, Recipe]) -> list[str | None]:
    """Arms after the ones that they refer to."""
    ordered: list[str | None] = []

    def visit(name: str | None, above: tuple[str | None, ...]) -> None:
        if name in ordered:
            return
        if name in above:
            raise RecipeError(f"arms: {name} refers to itself through {' and '.join(str(a) for a in above)}")
        recipe = recipes[name]
        for key, wanted in (
            ("curate.match_size", recipe.curate.match_size),
            ("forward.match_exposure", recipe.forward.match_exposure),
        ):
            if wanted is not None:
                if _arm(wanted) not in recipes:
                    known = ", ".join(["main", *(str(r) for r in recipes if r)])
                    raise RecipeError(f"arms: {key} names the arm {wanted!r}; there are {known}")
                visit(_arm(wanted), (*above, name))
        ordered.append(name)

    for name in recipes:
        visit(name, ())
    return ordered


def _arm(name: str) -> str | None:
    return None if name == "main" else name


@dataclass(frozen=True)
class _Model:
    """A model that steps can talk to: how its base is loaded, and the inputs that provide it.

    `epochs` are those before the last whose models its training kept too. They are measured; all else goes on with the
    last one, as in the paper.
    """

    config: ModelConfig
    inputs: Mapping[str, Source]
    epochs: range = range(0)


def _kept_epochs(config: TrainConfig) -> range:
    """The epochs before the last. A training that goes by steps, as M0 may beside others, keeps none."""
    return range(1, int(config.num_train_epochs) if config.keep_epochs and config.max_steps < 0 else 1)


class _Arm:
    """Unrolls one recipe."""

    def __init__(
        self,
        name: str | None,
        recipe: Recipe,
        externals: Externals,
        others: Mapping[str | None, "_Arm"],
        shared: dict[tuple[str, str, str], Step],
    ) -> None:
        self.name, self.recipe, self.externals, self.others = name, recipe, externals, others
        self.steps: dict[str, Step] = {}
        self._shared = shared
        config, base = externals.model(recipe.model, "model.path")
        self.base = _Model(config, {"model": base})

    def add(self, name: str, stage: Stage, inputs: Mapping[str, Source], after: tuple[Step, ...] = ()) -> Step:
        """The step, which may be one that another arm has made already."""
        if isinstance(stage, WholeStage):
            stage = replace(stage, shard_rows=self.recipe.shard_rows)
        resources: Resources = getattr(self.recipe.resources, name.split(".")[0])
        stall_minutes = self.recipe.resources.stall_minutes
        step = Step(name, stage, inputs, self.recipe.seed, self.name, after, resources, stall_minutes)
        self.steps[name] = self._shared.setdefault((name, step.identity, str(stage.gates())), step)
        return self.steps[name]

    def unroll(self) -> None:
        """All steps, in the order in which people read them."""
        recipe = self.recipe
        raters = [recipe.curate.rater, *([recipe.curate.agreement.against.rater] if recipe.curate.agreement else [])]
        needs_m0 = recipe.curate.keep == "rated" and any(rater.model == "previous" for rater in raters)
        if needs_m0 and not recipe.forward.include_seed:
            raise RecipeError("curate.rater.model=previous needs M0, and forward.include_seed=false leaves it no row")
        self.seed, self.corpus = self.prepare()
        backward = self.backward()
        generate = Generate(recipe.augment, self.base.config)
        augmented = self.add("augment.generate", generate, {"rows": self.corpus, **backward.inputs})
        filtered = self.add("augment.filter", Filter(recipe.augment), {"rows": augmented})
        self.candidates = self.add("augment.deduplicate", Deduplicate(config=recipe.augment), {"rows": filtered})
        self.measured_base = self.evaluate("evaluate.base", self.base, "forward", {})
        model = self.base
        before: Step | None = None
        if needs_m0:
            model = self.train_forward(0, None)
            before = self.evaluate("evaluate.forward@0", model, "forward", {"base": self.measured_base})
            self.judge(0, before)
        for k in range(1, recipe.rounds + 1):
            model, before = self.round(k, model, before)

    def prepare(self) -> tuple[Step, Step]:
        """Seed pairs and documents."""
        seed, corpus = self.recipe.prepare.seed, self.recipe.prepare.corpus
        files = self.externals.source(seed, "prepare.seed")
        read = self.add("prepare.read_seed", ReadSeed(seed), {"rows": files})
        against = self._evaluation_sets(seed, "prepare.seed")
        pairs = FilterSeed(seed, self.base.config)
        filtered = self.add("prepare.filter_seed", pairs, {"rows": read, **against, **self._tokenizer(seed)})
        seed_step = self.add("prepare.pick_seed", PickSeed(config=seed), {"rows": filtered})
        files = self.externals.source(corpus, "prepare.corpus")
        read = self.add("prepare.read_corpus", ReadCorpus(corpus), {"rows": files})
        against = self._evaluation_sets(corpus, "prepare.corpus")
        documents = FilterCorpus(corpus, self.base.config)
        filtered = self.add("prepare.filter_corpus", documents, {"rows": read, **against, **self._tokenizer(corpus)})
        return seed_step, self.add("prepare.pick_corpus", PickCorpus(config=corpus), {"rows": filtered})

    def _tokenizer(self, source: SourceConfig) -> Mapping[str, Source]:
        """The base, where a source's rows are measured in its tokens; elsewhere no identity counts it."""
        return {} if source.max_tokens is None else self.base.inputs

    def _evaluation_sets(self, source: SourceConfig, setting: str) -> dict[str, Source]:
        """The evaluation sets that a source must share nothing with, by role."""
        sets = enumerate(source.decontaminate)
        return {f"{EVALUATION}{n}": self.externals.rows(path, f"{setting}.decontaminate") for n, path in sets}

    def backward(self) -> _Model:
        """The backward model, measured beside the base."""
        compose = ComposeBackward(augment=self.recipe.augment)
        composed = self.add("backward.compose", compose, {"rows": self.seed}, after=(self.seed,))
        model = self.train("backward.train", self.recipe.backward, {"rows": composed})
        base = self.evaluate("evaluate.base_backward", self.base, "backward", {})
        self.evaluate("evaluate.backward", model, "backward", {"base": base})
        return model

    def round(self, k: int, previous: _Model, before: Step | None) -> tuple[_Model, Step]:
        """Rate with the model before, keep the good pairs, train the next model and measure it."""
        recipe = self.recipe
        # A round begins where the one before did not stop.
        after = (before,) if before is not None and recipe.evaluate.min_gain is not None and k > 1 else ()
        if recipe.curate.keep == "all":
            inputs = {"rows": self.candidates, **self.match("curate.select", recipe.curate.match_size, k)}
            selected = self.add(f"curate.select@{k}", KeepAll(), inputs, after)
        else:
            selected = self.curate(k, previous, after)
        model = self.train_forward(k, selected)
        links: dict[str, Source] = {"base": self.measured_base}
        if before is not None and recipe.evaluate.min_gain is not None:
            links["before"] = before
        now = self.evaluate(f"evaluate.forward@{k}", model, "forward", links)
        self.judge(k, now)
        return model, now

    def curate(self, k: int, previous: _Model, after: tuple[Step, ...]) -> Step:
        """Test and fit the rater on planted pairs, rate the candidates, and keep the good ones."""
        config = self.recipe.curate
        model = self.rater(config.rater, previous, "curate.rater.model")
        rater = Rater(config, model.config, self.recipe.augment.prompt())
        planted = self.add("curate.plant", PlantPairs(config=config), {"rows": self.seed})
        tested = {"rows": planted, **model.inputs}
        gate = self.add(f"curate.calibrate@{k}", Calibrate(config, rater), tested, after)
        rated = self.add(f"curate.rate@{k}", Rate(rater), {"rows": self.candidates, **model.inputs}, (gate,))
        if config.injections:
            self.add(f"curate.inject@{k}", Inject(config, rater), {**tested, "calibration": gate})
        if config.agreement is not None:
            other = self.rater(config.agreement.against.rater, previous, "curate.agreement.against.rater.model")
            second = Rater(config.agreement.against, other.config, self.recipe.augment.prompt())
            inputs = {"rows": rated, "calibration": gate, **other.inputs}
            self.add(f"curate.agree@{k}", Agree(config, config.agreement, second), inputs)
        select = Select(config=config)
        inputs = {"rows": rated, **({"calibration": gate} if select.needs_calibration else {})}
        return self.add(f"curate.select@{k}", select, {**inputs, **self.match("curate.select", config.match_size, k)})

    def rater(self, rater: RaterConfig, previous: _Model, setting: str) -> _Model:
        """Who rates."""
        if rater.model == "previous":
            return previous
        if rater.model == "base":
            return self.base
        return self.named(rater, setting)

    def named(self, who: RaterConfig | JudgeConfig, setting: str) -> _Model:
        """A model beside the base, loaded as that is."""
        named = self.recipe.model.model_copy(
            update={"path": who.model, "revision": who.revision, "chat_template": who.chat_template}
        )
        config, external = self.externals.model(named, setting)
        return _Model(config, {"model": external})

    def train_forward(self, k: int, selected: Step | None) -> _Model:
        """Compose and train M_k."""
        config = self.recipe.forward
        inputs: dict[str, Source] = {"rows": self.seed}
        if selected is not None:
            inputs["curated"] = selected
        if config.rating_replay is not None:
            inputs["replay"] = self.externals.file(config.rating_replay.path, "forward.rating_replay.path")
        compose = ComposeForward(config=config, curate=self.recipe.curate)
        composed = self.add(f"forward.compose@{k}", compose, inputs, tuple(filter(None, [self.seed, selected])))
        match = self.match("forward.compose", config.match_exposure, k) if k else {}
        return self.train(f"forward.train@{k}", config.training(k), {"rows": composed, **match})

    def train(self, name: str, config: TrainConfig, inputs: Mapping[str, Source]) -> _Model:
        """Train from the base: an adapter goes on top of it, all weights replace it."""
        trained = self.add(name, Train(config, self.base.config), {**inputs, **self.base.inputs})
        inputs = {"model": trained} if config.lora_r is None else {**self.base.inputs, "adapter": trained}
        return _Model(self.base.config, inputs, _kept_epochs(config))

    def match(self, section: str, arm: str | None, k: int) -> dict[str, Source]:
        """The same step of the arm that this one is matched to."""
        if arm is None:
            return {}
        found = self.others[_arm(arm)].steps.get(f"{section}@{k}")
        if found is None:
            raise RecipeError(f"arms: {self.name} is matched to {arm}, which has no round {k}")
        return {"match": found}

    def evaluate(self, name: str, model: _Model, direction: Direction, links: Mapping[str, Source]) -> Step:
        """Measure a model, and before it those of its earlier epochs."""
        config = self.recipe.evaluate
        inputs: dict[str, Source] = {"seed": self.seed, **model.inputs, **links}
        key = f"{direction}_questions"
        if (path := getattr(config, key)) is not None:
            questions = self.externals.file(path, f"evaluate.{key}")
            inputs["questions"] = questions
            # A broken test is told now, not when the first model has been trained.
            read_questions(Path(questions.path))
        template = self.recipe.augment.prompt() if direction == "backward" else "{response}"
        stage = Evaluate(config, model.config, direction, template)
        verb, at, k = name.partition("@")
        alone = {role: source for role, source in inputs.items() if role != "before"}
        for epoch in model.epochs:
            self.add(f"{verb}_epoch_{epoch}{at}{k}", replace(stage, epoch=epoch), alone)
        return self.add(name, replace(stage, may_stop="before" in links), inputs)

    def judge(self, k: int, now: Step) -> None:
        """Hold the replies of M_k against the base's, where the recipe names a judge."""
        config = self.recipe.evaluate.judge
        if config is None:
            return
        if not self.recipe.prepare.seed.held_out:
            raise RecipeError("evaluate.judge compares replies to held-out pairs, and prepare.seed.held_out=0 has none")
        model = self.base if config.model == "base" else self.named(config, "evaluate.judge.model")
        inputs = {"now": now, "base": self.measured_base, **model.inputs}
        self.add(f"evaluate.judge@{k}", Judge(config, model.config), inputs)
