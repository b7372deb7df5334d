"""The words of a command line: options and errors (`entrypoint`, `refusals`), recipes by name or file (`factories`,
`yaml_recipe`), and `path=value` (`overrides`, `named_parts`)."""
