"""Where prompts come from: generated problems, local files, hub datasets."""
