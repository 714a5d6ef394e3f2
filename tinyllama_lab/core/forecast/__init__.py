"""What packs of trials will need, computed before a base is loaded.

`python -m tinyllama_lab.core.forecast` answers the `plan` command. It asks the worker's own
planner (`training/memory.py`) and engines; only the weights are missing.
"""
