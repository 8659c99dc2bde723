"""From texts to sequences: reading, tokenizers, token shards, `prepare`, and the resumable loader."""
