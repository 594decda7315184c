"""One model in one process: samplers, learners, and the plain-PyTorch pair that specifies them."""
