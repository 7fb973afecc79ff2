"""janus_ds.observe: see the package's architecture notes in docs/architecture.md."""
