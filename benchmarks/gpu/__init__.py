"""What the engine does on a CUDA GPU: whether it is right, how much memory it takes, how fast.

`python -m benchmarks.gpu` needs torch, transformers and peft, and nothing else. Models have
random weights, so that nothing is downloaded. Their losses say nothing about quality.
"""
