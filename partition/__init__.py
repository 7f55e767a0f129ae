"""Pure arithmetic on descriptions: what a model is, how it is cut, where its bytes live. No torch, no process."""
