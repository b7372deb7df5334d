"""HTML pages about runs, read from their folders; nothing here imports NeMo at its top.

Read `run_page` first. `run_data` reads a run and says what to look at, `samples` adds answers before and after training.
"""
