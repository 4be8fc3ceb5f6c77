"""posttrain: difficulty screening → light SFT → asynchronous online RL → light DPO."""

__version__ = "0.1.0"
