"""Models of the recipes' own architectures, config-made: as published in every ratio, small in every size.

Weights are random under a fixed seed: counts mean something, quality nothing. The tokenizer is the demo's, trained on
this repository's documents, so that real text has as many tokens as elsewhere; where a recipe counts them, it is the
demo's as it is, so that a changed document changes no count.
"""

from pathlib import Path
from typing import Any

from selfalign.demo.base import base_folder

# Heads are 8 wide instead of 64 or 128.
LLAMA_3_1: dict[str, Any] = {
    # Grouped queries 4:1, an MLP of 3.5 hidden sizes, positions stretched from 8,192 to 131,072.
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "intermediate_size": 224,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
LLAMA_2: dict[str, Any] = {
    # As many key heads as query heads, an MLP of 2.6875 hidden sizes.
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "hidden_size": 64,
    "intermediate_size": 172,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
TINYLLAMA: dict[str, Any] = {
    # Grouped queries 8:1, an MLP of 2.75 hidden sizes.
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "hidden_size": 64,
    "intermediate_size": 176,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}
QWEN_2_5: dict[str, Any] = {
    # Grouped queries 7:1, biases in the attention, embeddings tied, an MLP of 5.43 hidden sizes.
    "num_attention_heads": 7,
    "num_key_value_heads": 1,
    "hidden_size": 56,
    "intermediate_size": 304,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "tie_word_embeddings": True,
}
SMOLLM2: dict[str, Any] = {
    # Grouped queries 3:1, embeddings tied, an MLP of 2.67 hidden sizes.
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 72,
    "intermediate_size": 192,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    "tie_word_embeddings": True,
}
# Its chat tokens, one of which ends a reply and pads too, and its template: ChatML, with a system line where there is
# none.
SMOLLM2_TOKENS = ["<|im_start|>", "<|im_end|>"]
SMOLLM2_TEMPLATE = """
{%- set said = messages if messages[0].role == "system" else [{"role": "system", "content": "Be brief."}] + messages -%}
{%- for message in said -%}
<|im_start|>{{ message.role }}{{ "\\n" }}{{ message.content }}<|im_end|>{{ "\\n" }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant{{ "\\n" }}{%- endif -%}
"""
# By the published model's name; a chat model has its base's shape.
SHAPES = {
    "meta-llama/Llama-3.1-8B": LLAMA_3_1,
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA_3_1,
    "meta-llama/Llama-2-7b-hf": LLAMA_2,
    "meta-llama/Llama-2-7b-chat-hf": LLAMA_2,
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": TINYLLAMA,
    "Qwen/Qwen2.5-0.5B": QWEN_2_5,
    "HuggingFaceTB/SmolLM2-135M-Instruct": SMOLLM2,
}


def tiny(published: str, folder: Path, seed: int = 0) -> Path:
    """A model in the shape of `published`, saved with its tokenizer under `folder`; returns where. Made once."""
    path = folder / published.rpartition("/")[2]
    if path.is_dir():
        return path
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    if SHAPES[published] is SMOLLM2:
        tokenizer.add_special_tokens({"additional_special_tokens": SMOLLM2_TOKENS})
        tokenizer.eos_token = tokenizer.pad_token = SMOLLM2_TOKENS[1]
        tokenizer.chat_template = SMOLLM2_TEMPLATE
    else:
        texts = [file.read_text() for file in sorted((Path(__file__).parents[1] / "docs").glob("*.md"))]
        tokenizer = tokenizer.train_new_from_iterator(texts, 2048)
    torch.manual_seed(seed)
    make = Qwen2Config if published.startswith("Qwen/") else LlamaConfig
    config = make(
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SHAPES[published],
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
