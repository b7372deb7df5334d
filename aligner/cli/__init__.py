"""Commands of `nemo llm`.

Read `commands` first: the table of all commands. `context` runs a command that takes a recipe, `dryrun` checks a recipe
without running it, `parsing` reads the words of a command line.
"""
