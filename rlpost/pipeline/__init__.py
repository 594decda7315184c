"""When things happen: asyncio control logic without Ray, GPU or I/O."""
