"""Load for an OpenAI endpoint: requests at chosen times, a clock at the client, figures and a report."""
