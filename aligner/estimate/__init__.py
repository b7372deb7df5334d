"""Memory, FLOPs and time of a recipe by arithmetic, without running it.

Read `parameters` first: the size of a model. `memory` and `step_time` contain the formulas, `recipe_plan` reads a
recipe, `report_text` formats the estimate.
"""
