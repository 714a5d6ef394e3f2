"""`ask`: what a question needs and costs, before anything is trained."""
