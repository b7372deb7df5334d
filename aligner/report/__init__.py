"""HTML pages about runs, read from their folders; no module imports NeMo at its top.

Read `run_page` first. `run_data` reads and diagnoses a run, `samples` adds responses before and after training.
"""
