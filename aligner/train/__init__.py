"""One run, from the arguments of `align` to its folder.

Read `training_run` first: its `__call__` lists the steps. `arguments` holds what was asked for, `config_checks` what is
refused, `resume_settings` what a resumed run must not change, `provenance` what is recorded.
"""
