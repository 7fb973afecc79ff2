"""janus_ds.checkpoint: see the package's architecture notes in docs/architecture.md."""
