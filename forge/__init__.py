"""The build system: recipes, keys, executors, the store."""

VERSION = "0.1.0"  # of the project, as CHANGELOG.md counts
