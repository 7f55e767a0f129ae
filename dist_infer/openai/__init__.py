"""The OpenAI-compatible endpoint: HTTP types, their translation to requests, SSE. Knows nothing of Ray."""
