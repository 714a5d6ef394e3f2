"""Requests to an offline travel assistant for Nepal: an original, generated data set.

To add an intent, write one file in intents/ (copy a short one such as sim_card.yaml), run
`python -m tinyllama_lab.data.travel.generate`, and run the tests. answers.py explains the rules.
"""
