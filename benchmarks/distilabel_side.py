"""The peer of row 2: distilabel's TransformersLLM. It runs in an environment of its own, without any of our code."""

import json
import warnings
from pathlib import Path

from measure import Work


def rates(job: str, folder: str) -> Work:
    """Replies of the model in `folder` to the job's conversations, greedy, as a task of distilabel's asks for them.

    It hands its pipeline no batch size, which then takes one conversation after the other.
    """
    # Of its own fields, by the hundred: pydantic would have them declared in another way.
    warnings.filterwarnings("ignore", module="pydantic")
    import torch
    from distilabel.models.llms import TransformersLLM

    given = json.loads(Path(job).read_text("utf-8"))
    torch.set_num_threads(1)
    llm = TransformersLLM(model=folder, torch_dtype="float32", device="cpu")
    llm.load()

    def work(count: int | None = None) -> list[str]:
        outputs = llm.generate(
            inputs=given["conversations"][:count],
            max_new_tokens=given["new"],
            do_sample=False,
            temperature=1.0,
            repetition_penalty=1.0,
        )
        return [output["generations"][0] for output in outputs]

    work(2)
    return work
