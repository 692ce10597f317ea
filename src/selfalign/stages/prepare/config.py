"""The recipe's `prepare` section."""

from selfalign.core.frozen import Frozen
from selfalign.data.config import CorpusConfig, SeedConfig


class PrepareConfig(Frozen):
    """Both sources."""

    seed: SeedConfig
    corpus: CorpusConfig
