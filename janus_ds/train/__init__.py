"""janus_ds.train: see the package's architecture notes in docs/architecture.md."""
