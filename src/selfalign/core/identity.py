"""Names that follow from content: identities of steps, digests of files, seeds of rows."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

if TYPE_CHECKING:
    from upath import UPath


def canonical(value: JsonValue) -> bytes:
    """The one JSON text of a value: sorted keys, no white space, no NaN (raises ValueError)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest(value: JsonValue) -> str:
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(canonical(value)).hexdigest()


def file_digest(path: "Path | UPath") -> str:
    """SHA-256 of a file's bytes."""
    opened: Any = path.open("rb")
    with opened as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def step_identity(stage: str, version: int, config: JsonValue, seed: int | None, inputs: Mapping[str, str]) -> str:
    """16 hexadecimal digits that say what a step computes, known before it runs.

    `inputs` maps each role to the identity (of a step) or the digest (of something outside) that plays it.
    """
    return digest({"stage": stage, "version": version, "config": config, "seed": seed, "inputs": dict(inputs)})[:16]


def seed_for(run_seed: int, row_id: str, step: str) -> int:
    """63-bit seed of one row in one step; independent of shards, workers, order and retries."""
    key = canonical([run_seed, row_id, step])
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1


def code_digest() -> str:
    """SHA-256 over this package's sources, prompts and templates: what driver and workers compare."""
    root = Path(__file__).parents[1]
    sha = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".txt", ".jinja", ".json")):
        sha.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return sha.hexdigest()
