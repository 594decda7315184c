"""Making prompt data sets: what is left out of the sources and why, after AceReason-Nemotron (arXiv 2505.16400)."""
