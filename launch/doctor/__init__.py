"""What could stop a run, looked for before it starts: on every node, within seconds, with what to do about it."""
