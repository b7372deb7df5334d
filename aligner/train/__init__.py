"""One run, from the arguments of `align` to its folder.

Read `training_run` first: its `__call__` lists the steps. `arguments` describes the run, `config_checks` validates it,
`resume_settings` compares a resumed run with its checkpoint, `provenance` records each job.
"""
