"""From shards, here or far away, to the batches of each step."""
