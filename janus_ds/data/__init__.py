"""janus_ds.data: see the package's architecture notes in docs/architecture.md."""
