"""The subcommands of `python -m janus_ds`: plan, check, explain, verify, inspect, convert, bench."""
