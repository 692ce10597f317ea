"""A recipe small enough to run in a test, with every step of the real one: the demo's base on a few rows."""

import json
import random
from pathlib import Path

from selfalign.demo.base import base_folder

PLACES = ["Vage", "Loke", "Kage", "Zogi", "Tovi", "Nani", "Rafi", "Dose"]
COLOURS = ["red", "blue", "green", "black"]

RECIPE = """\
name: small
model: {{path: {base}, dtype: float32}}
prepare:
  seed: {{path: ./seed.jsonl, held_out: 8}}
  corpus: {{path: ./corpus.jsonl}}
backward: &training
  learning_rate: 1.0e-3
  per_device_train_batch_size: 8
  max_steps: 4
  max_length: 256
augment: {{prompt_file: ./instruct.txt, temperature: 0.7, max_new_tokens: 12, filters: [empty]}}
curate:
  prompt_file: ./rate.txt
  reasoning_tokens: 8
  threshold: 1
  max_off_scale: 1
  min_auc: 0
  min_rated: 0
forward:
  <<: *training
  rating_replay: {{path: ./ratings.jsonl}}
evaluate: {{max_new_tokens: 8, forward_questions: ./questions.jsonl}}
rounds: 2
arms:
  uncurated: {{curate.keep: all, curate.match_size: main}}
  exposed: {{curate.keep: all, forward.match_exposure: main}}
"""


def write(folder: Path) -> Path:
    """The recipe and its files in `folder`; returns the recipe's path."""
    chance = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    facts = [(place, chance.choice(COLOURS)) for place in PLACES * 4]
    seed = [
        {"prompt": f"Which colour has {p}, no. {n}?", "completion": f"It is {c}."} for n, (p, c) in enumerate(facts)
    ]
    corpus = [{"text": f"In {p} all is {c}, as page {n} says."} for n, (p, c) in enumerate(facts)]
    ratings = [{**row, "reply": "Same place.\nScore: 4"} for row in seed[:6]]
    questions = [{"prompt": f"Colour of {p}?", "contains": [c]} for p, c in facts[:6]]
    for name, rows in (("seed", seed), ("corpus", corpus), ("ratings", ratings), ("questions", questions)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "instruct.txt").write_text("{response}\n")
    (folder / "rate.txt").write_text("Rate it.\nQuestion: {instruction}\nAnswer: {response}\n")
    recipe = folder / "small.yaml"
    recipe.write_text(RECIPE.format(base=base_folder()))
    return recipe
