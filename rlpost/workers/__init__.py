"""Where engines run: in this process (tests) or as Ray workers."""
