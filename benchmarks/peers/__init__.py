"""Parts of `benchmarks/peers.py`: environments, checkpoint, runs, report; `runners/` holds one script a peer."""
