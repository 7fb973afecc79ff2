"""janus_ds.parallel: see the package's architecture notes in docs/architecture.md."""
