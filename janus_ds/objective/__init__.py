"""janus_ds.objective: see the package's architecture notes in docs/architecture.md."""
