"""Ways to bring bytes from disk into given memory: one port, one file per way. No torch."""
