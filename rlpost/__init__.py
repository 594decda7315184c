"""Asynchronous RL post-training of language models: vLLM rollouts, verifiers, a hard staleness bound, DeepSpeed."""

__version__ = "0.1.0"
