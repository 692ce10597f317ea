"""Instruction backtranslation and curation, from a base model and unlabelled text to an aligned model."""

__version__ = "0.1.0"
