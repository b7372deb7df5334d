"""Memory, FLOPs and time of a recipe by arithmetic; nothing is run.

Read `parameters` first: the size of a model. `memory` and `step_time` hold the formulas, `recipe_plan` reads a recipe,
`report_text` formats the estimate.
"""
