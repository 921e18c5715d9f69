"""One module per command: `parser()` describes its options, `run(words)` does the work and returns the exit code."""
