"""janus_ds.decode: see the package's architecture notes in docs/architecture.md."""
