"""A small server with OpenAI's API for one trained model (L3)."""
