"""Requests to an offline travel assistant for Nepal: an original, generated data set.

To add an intent, write one file in intents/ (copy a short one such as sim_card.yaml), run
`python -m tinyllama_lab.travel.generate`, and run the tests. Rules are explained in answers.py.
"""
