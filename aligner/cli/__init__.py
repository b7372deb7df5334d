"""Commands of `nemo llm`.

Read `commands` first: the table of all commands. `context` parses a command line, `overrides` applies `path=value`,
`dryrun` checks a recipe without running it.
"""
