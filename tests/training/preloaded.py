"""Imported once by the process that the trainings are forked from; it computes nothing, so that they can be forked."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import bitsandbytes  # noqa: F401
import datasets  # noqa: F401
import peft  # noqa: F401
import trl  # noqa: F401
from transformers import LlamaForCausalLM, Trainer  # noqa: F401
from trl import SFTConfig, SFTTrainer  # noqa: F401

import selfalign.training.sft
import selfalign.training.trainer

selfalign.training.trainer.trainer_class()
