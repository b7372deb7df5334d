"""Checks of preference data before training.

Read `rules` first: the table of rules. `row_table` extracts features of rows, `linter` applies the rules, `page`
formats the report.
"""
