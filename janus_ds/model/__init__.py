"""janus_ds.model: see the package's architecture notes in docs/architecture.md."""
