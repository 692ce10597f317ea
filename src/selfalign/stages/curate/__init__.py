"""Self-curation: rate each pair from 1 to 5 and keep the good ones."""
