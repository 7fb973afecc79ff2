"""janus_ds.metrics: see the package's architecture notes in docs/architecture.md."""
