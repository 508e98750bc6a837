"""A model as a service: through vLLM, or through transformers' own server with our limits before it."""
